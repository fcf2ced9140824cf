"""Process dead letters: the orders that failed as often as the consumer's MaxDeliver allows.

Usage:
    python dlq/consumer.py orders_unprocessed orders_stream
"""

import argparse
import asyncio
import logging
import sys
from functools import partial

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue import dead_letters
from jobqueue.connection import connect
from jobqueue.script import arguments, name, number, reason, start, stop_on_signal, text
from jobqueue.worker import ACK, LEAVE, TERM, Worker, attempt, check_stream, retry

log = logging.getLogger("dlq")

DURABLE = "unprocessed_order_handler"
BACKOFF = [5.0]  # seconds until an advisory that was not acknowledged comes again
MAX_DELIVER = 2


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = arguments(__doc__)
    parser.add_argument("dlq_stream", type=name, help="where the advisories are, such as orders_unprocessed")
    parser.add_argument("original_stream", type=name, help="where the orders are, such as orders_stream")
    parser.add_argument("--time-limit", type=number(0.1), default=600, help="limit, in seconds (default: %(default)s)")
    return parser.parse_args()


async def reprocess(order: Msg) -> None:
    """Process one dead letter: the place for your own work. Return when it is done, raise when it failed.

    Args:
        order: `data` is the payload, `subject` and `headers` came with it. It may come a second time,
            after a failure or a crash.

    """


async def handle(nc: Client, options: argparse.Namespace, stop: asyncio.Event, advisory: Msg) -> bytes:
    """Process the order that an advisory is about and return how to acknowledge the advisory."""
    stream = options.original_stream
    try:
        dead = dead_letters.parse(advisory.data, stream)
    except ValueError:
        log.warning("deleted, for it is no advisory of %s: %s", stream, text(advisory.data))
        return TERM
    died = advisory.metadata.timestamp
    # What passes by itself must not use up one of the advisory's deliveries, so it is waited out here.
    wait_out = partial(retry, what=f"dead letter # {dead.sequence} in {stream}", give_up=lambda _: stop.is_set())
    order = await wait_out(partial(dead_letters.find, nc, dead, died))
    if order is None:
        return ACK
    log.info("reprocessing order %s", text(order.data))
    error = await attempt(reprocess(order), options.time_limit)
    if error:
        log.error("error reprocessing order %s: %s", text(order.data), reason(error))
        if advisory.metadata.num_delivered >= MAX_DELIVER:
            log.error("%s stays in %s, and will be tried again within two minutes", text(order.data), stream)
        return LEAVE
    await wait_out(partial(dead_letters.settle, nc, order, dead, died))
    return ACK


async def check_streams(nc: Client, dlq_stream: str, stream: str) -> None:
    """Check that the streams are there, and that the one is for the other's advisories: all else would be deleted."""
    await check_stream(nc, stream, ">", "scripts/create_orders_stream.sh", stream, "SUBJECTS")
    advisories = f"{dead_letters.ADVISORY}.{stream}.*"
    await check_stream(nc, dlq_stream, advisories, "scripts/create_orders_unprocessed.sh", dlq_stream, stream)


async def run(options: argparse.Namespace) -> int:
    """Process dead letters until told to stop."""
    dlq_stream, original_stream = options.dlq_stream, options.original_stream
    config = ConsumerConfig(
        name=DURABLE,
        durable_name=DURABLE,
        description="handle unprocessed jobs",
        backoff=BACKOFF,
        max_deliver=MAX_DELIVER,
        ack_policy=AckPolicy.EXPLICIT,
    )
    async with connect(f"dlq_{original_stream}") as nc:
        await check_streams(nc, dlq_stream, original_stream)
        with stop_on_signal() as stop:
            reviving = asyncio.create_task(dead_letters.revive(nc, dlq_stream, original_stream, BACKOFF[0]))
            work = partial(handle, nc, options, stop)
            try:
                tally = await Worker(nc, dlq_stream, config, work, 1, stop).run()
            finally:
                reviving.cancel()
    log.info(
        "stopped: %d dead letters done, %d attempts failed, %d advisories deleted",
        tally[ACK],
        tally[LEAVE],
        tally[TERM],
    )
    return 0


def main() -> None:
    """Run the DLQ processor."""
    sys.exit(start(run(parse_args())))


if __name__ == "__main__":
    main()
