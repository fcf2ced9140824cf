"""Process orders from a JetStream work queue; any number of processes share the work.

Usage:
    python consumer/consumer.py orders_stream "orders.*"
"""

import argparse
import asyncio
import logging
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue import dead_letters
from jobqueue.connection import connect
from jobqueue.script import arguments, name, number, reason, start, stop_on_signal, subject_filter, text, whole
from jobqueue.worker import ACK, LEAVE, Worker, attempt, check_stream

log = logging.getLogger("consumer")

DURABLE = "processor"
BACKOFF = [5.0]  # seconds until an order that was not acknowledged comes again
MAX_DELIVER = 2  # after so many deliveries without an ack the order is a dead letter

options = argparse.Namespace()


class SimulatedError(Exception):
    """An order fails by chance, as in the article."""


def parse_args() -> None:
    """Read the command line's arguments into `options`."""
    parser = arguments(__doc__)
    parser.add_argument("stream", type=name, help="the stream's name, such as orders_stream")
    parser.add_argument("subject_filter", type=subject_filter, help='which orders, such as "orders.*"')
    parser.add_argument("--concurrency", type=whole(1, 500), default=1, help="orders at a time (default: %(default)s)")
    parser.add_argument(
        "--failure-rate", type=number(0, 1), default=0.5, help="share that fails (default: %(default)s)"
    )
    parser.add_argument("--work-time", type=number(0), default=0.01, help="seconds of work (default: %(default)s)")
    parser.add_argument("--time-limit", type=number(0.1), default=600, help="limit, in seconds (default: %(default)s)")
    parser.parse_args(namespace=options)


async def process(order: Msg) -> None:
    """Process one order: the place for your own work. Return when it is done, raise when it failed.

    Args:
        order: `data` is the payload, `subject` and `headers` came with it. It may come a second time,
            after a failure or a crash.

    """
    if random.random() < options.failure_rate:
        raise SimulatedError
    log.info("received %s from stream sequence # %d", text(order.data), order.metadata.sequence.stream)
    await asyncio.sleep(options.work_time)


async def handle(order: Msg) -> bytes:
    """Process one order and return how to acknowledge it: a failed one not at all, so that it comes again."""
    error = await attempt(process(order), options.time_limit)
    if error is None:
        return ACK
    why = "" if isinstance(error, SimulatedError) else f": {reason(error)}"
    log.info("error processing %s%s", text(order.data), why)
    if order.metadata.num_delivered >= MAX_DELIVER:
        log.info("%s will be processed via DLQ", text(order.data))
    return LEAVE


async def check_streams(nc: Client) -> None:
    """Check that the stream is there and has what we ask for, and warn when its dead letters would be lost."""
    stream, wanted = options.stream, options.subject_filter
    await check_stream(nc, stream, wanted, "scripts/create_orders_stream.sh", stream, wanted)
    with suppress(Error):  # there is no durable yet, say
        before = (await nc.jetstream().consumer_info(stream, DURABLE)).config.filter_subject or ">"
        if before != wanted:
            log.warning("all consumers of %s get %s from now on, instead of %s", stream, wanted, text(before))
    await dead_letters.warn_if_lost(nc, stream, DURABLE)


async def run() -> int:
    """Process orders until told to stop."""
    config = ConsumerConfig(
        name=DURABLE,
        durable_name=DURABLE,
        description="Orders processor",
        backoff=BACKOFF,
        max_deliver=MAX_DELIVER,
        filter_subject=options.subject_filter,
        ack_policy=AckPolicy.EXPLICIT,
    )
    # As many threads as orders for work in asyncio.to_thread(), and a few for what hangs and for name look-ups.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(options.concurrency + 4))
    async with connect(f"consumer_{options.stream}") as nc:
        await check_streams(nc)
        with stop_on_signal() as stop:
            tally = await Worker(nc, options.stream, config, handle, options.concurrency, stop).run()
    log.info("stopped: %d orders processed, %d deliveries failed", tally[ACK], tally[LEAVE])
    return 0


def main() -> None:
    """Run the consumer."""
    parse_args()
    sys.exit(start(run()))


if __name__ == "__main__":
    main()
