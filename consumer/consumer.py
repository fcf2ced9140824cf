"""Process orders from a JetStream work queue; any number of processes share the work.

Usage:
    python consumer/consumer.py orders_stream "orders.*"
"""

import os
import signal

for signum in (signal.SIGINT, signal.SIGTERM):  # Until `start`. As process 1, Linux ignores what has no handler.
    signal.signal(signum, lambda signum, _: os._exit(128 + signum))

import argparse
import asyncio
import logging
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue.connection.connecting import connect_script
from jobqueue.errors import describe_failure, printable
from jobqueue.jetstream.durables import Durables
from jobqueue.jetstream.streams import require_stream, warn_if_lost
from jobqueue.script.arguments import make_parser, number, stream_name, subject_filter, whole_number
from jobqueue.script.running import shutdown_on_signal, start
from jobqueue.worker.in_flight import ACK, LEAVE, NAK
from jobqueue.worker.time_limit import TimeLimit
from jobqueue.worker.worker import Worker

log = logging.getLogger("consumer")

DURABLE = "processor"
BACKOFF = [5.0]  # seconds until an order that was not acked is redelivered
MAX_DELIVER = 2  # after so many deliveries without an ack the order is a dead letter
MAX_ACK_PENDING = 100_000  # orders in flight or waiting for a retry; while there are more, no new ones are delivered

options = argparse.Namespace()


class SimulatedError(Exception):
    """An order fails by chance, as in the article."""


def parse_args() -> None:
    """Read the command line's arguments into `options`."""
    parser = make_parser(__doc__, "the graceful shutdown has finished")
    parser.add_argument("stream", type=stream_name, help="the stream's name, such as orders_stream")
    parser.add_argument("subject_filter", type=subject_filter, help='subjects to process, such as "orders.*"')
    parser.add_argument(
        "--concurrency", type=whole_number(1, 500), default=1, help="orders processed at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--failure-rate", type=number(0, 1), default=0.5, help="fraction that fails, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--work-time", type=number(0), default=0.01, help="seconds of simulated work (default: %(default)s)"
    )
    parser.add_argument(
        "--time-limit", type=number(0.1), default=600, help="seconds for the work on one order (default: %(default)s)"
    )
    parser.parse_args(namespace=options)


async def process(order: Msg) -> None:
    """Process one order: the place for your own work. Return when it is done, raise when it failed.

    Args:
        order: `data` is the payload, `subject` and `headers` came with it. It may be redelivered, after a failure or
            a crash.
    """
    if random.random() < options.failure_rate:
        raise SimulatedError
    log.info("received %s from stream sequence # %d", printable(order.data), order.metadata.sequence.stream)
    await asyncio.sleep(options.work_time)


async def handle(durables: Durables, time_limit: TimeLimit, order: Msg) -> bytes:
    """Process one order and return how to ack it: a failed one not at all, so that it is redelivered."""
    error = await time_limit.run(process(order))
    if error is None:
        return ACK
    delivery, why = order.metadata, ""
    if not isinstance(error, SimulatedError):
        why = f": {describe_failure(error, delivery.num_delivered, MAX_DELIVER, delivery.sequence.stream)}"
    log.info("error processing %s%s", printable(order.data), why)
    if order.is_acked:  # by `order.nak()` in `process`, say: then that counts
        return LEAVE
    if delivery.num_delivered >= MAX_DELIVER and await durables.has_max_deliver(DURABLE, MAX_DELIVER):
        log.info("%s will be processed via DLQ", printable(order.data))
        return NAK  # so that the server publishes the advisory at once, and not after the back-off
    return LEAVE


async def check_streams(nc: Client) -> None:
    """Check that the stream exists and has what we ask for, and warn when its dead letters would be lost."""
    stream, wanted = options.stream, options.subject_filter
    await require_stream(nc, stream, wanted, "scripts/create_orders_stream.sh", stream, wanted)
    await warn_if_lost(nc, stream, DURABLE)


async def run() -> int:
    """Process orders until the shutdown."""
    config = ConsumerConfig(
        name=DURABLE,
        durable_name=DURABLE,
        description="Orders processor",
        backoff=BACKOFF,
        max_deliver=MAX_DELIVER,
        max_ack_pending=MAX_ACK_PENDING,
        filter_subject=options.subject_filter,
        ack_policy=AckPolicy.EXPLICIT,
    )
    # As many threads as orders for work in asyncio.to_thread(), and a few for threads that hang and for name look-ups.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(options.concurrency + 4))
    time_limit = TimeLimit(options.time_limit)
    async with connect_script(f"consumer_{options.stream}") as nc:
        await check_streams(nc)
        durables = Durables(nc, options.stream)
        worker = Worker(
            nc, options.stream, config, partial(handle, durables, time_limit), options.concurrency, time_limit
        )
        shutdown = asyncio.Event()
        with shutdown_on_signal(shutdown, lambda: f"{worker.in_flight} orders in flight"):
            tally = await worker.run(shutdown)
    log.info("stopped: %d orders processed, %d deliveries failed", tally[ACK], tally[LEAVE] + tally[NAK])
    return 1 if worker.in_flight else 0


def main() -> None:
    """Run the consumer."""
    parse_args()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
