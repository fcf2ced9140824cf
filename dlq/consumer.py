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

from jobqueue.arguments import make_parser, number, stream_name
from jobqueue.connection import connect
from jobqueue.dead_letters import ADVISORY, find_message, parse_advisory, remove_message
from jobqueue.errors import describe_error, printable
from jobqueue.in_flight import ACK, LEAVE, TERM
from jobqueue.lost_advisories import keep_publishing
from jobqueue.retrying import retry
from jobqueue.script import shutdown_on_signal, start
from jobqueue.streams import require_stream
from jobqueue.time_limit import TimeLimit
from jobqueue.worker import Worker

log = logging.getLogger("dlq")

DURABLE = "unprocessed_order_handler"
BACKOFF = [5.0]  # seconds until an advisory that was not acked is redelivered
MAX_DELIVER = 2

options = argparse.Namespace()


def parse_args() -> None:
    """Read the command line's arguments into `options`."""
    parser = make_parser(__doc__)
    parser.add_argument("dlq_stream", type=stream_name, help="where the advisories are, such as orders_unprocessed")
    parser.add_argument("original_stream", type=stream_name, help="where the orders are, such as orders_stream")
    parser.add_argument("--time-limit", type=number(0.1), default=600, help="limit, in seconds (default: %(default)s)")
    parser.parse_args(namespace=options)


async def reprocess(order: Msg) -> None:
    """Process one dead letter: the place for your own work. Return when it is done, raise when it failed.

    Args:
        order: `data` is the payload, `subject` and `headers` came with it. It may be redelivered, after a failure or
            a crash.
    """


async def handle(nc: Client, shutdown: asyncio.Event, time_limit: TimeLimit, advisory: Msg) -> bytes:
    """Process the order that an advisory is about and return how to ack the advisory."""
    stream = options.original_stream
    try:
        dead_letter = parse_advisory(advisory.data, stream)
    except ValueError:
        log.warning("deleted, for it is no advisory of %s: %s", stream, printable(advisory.data))
        return TERM
    died_at = advisory.metadata.timestamp
    # A transient error must not be one of the advisory's attempts, so it is waited out here.
    wait_out = partial(
        retry, what=f"dead letter # {dead_letter.sequence} in {stream}", give_up=lambda _: shutdown.is_set()
    )
    order = await wait_out(partial(find_message, nc, dead_letter, died_at))
    if order is None:
        return ACK
    log.info("reprocessing order %s", printable(order.data))
    error = await time_limit.run(reprocess(order))
    if error:
        log.error("error reprocessing order %s: %s", printable(order.data), describe_error(error))
        if advisory.metadata.num_delivered >= MAX_DELIVER:
            log.error("%s stays in %s, and will be tried again within two minutes", printable(order.data), stream)
        return LEAVE
    await wait_out(partial(remove_message, nc, order, dead_letter, died_at))
    return ACK


async def check_streams(nc: Client) -> None:
    """Check that the streams exist, and that the one is for the other's advisories: all else would be deleted."""
    stream, dlq_stream = options.original_stream, options.dlq_stream
    await require_stream(nc, stream, ">", "scripts/create_orders_stream.sh", stream, "SUBJECTS")
    create = ("scripts/create_orders_unprocessed.sh", dlq_stream, stream)
    await require_stream(nc, dlq_stream, f"{ADVISORY}.{stream}.*", *create)


async def run() -> int:
    """Process dead letters until the shutdown."""
    config = ConsumerConfig(
        name=DURABLE,
        durable_name=DURABLE,
        description="handle unprocessed jobs",
        backoff=BACKOFF,
        max_deliver=MAX_DELIVER,
        ack_policy=AckPolicy.EXPLICIT,
    )
    time_limit = TimeLimit(options.time_limit)
    async with connect(f"dlq_{options.original_stream}") as nc:
        await check_streams(nc)
        shutdown = asyncio.Event()
        worker = Worker(nc, options.dlq_stream, config, partial(handle, nc, shutdown, time_limit), 1, time_limit)
        with shutdown_on_signal(shutdown, lambda: f"{worker.in_flight} dead letters in flight"):
            publishing = asyncio.create_task(
                keep_publishing(nc, options.dlq_stream, options.original_stream, BACKOFF[0])
            )
            try:
                tally = await worker.run(shutdown)
            finally:
                publishing.cancel()
    log.info(
        "stopped: %d dead letters done, %d attempts failed, %d advisories deleted",
        *(tally[ack] for ack in (ACK, LEAVE, TERM)),
    )
    return 0


def main() -> None:
    """Run the DLQ processor."""
    parse_args()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
