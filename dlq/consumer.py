"""Process dead letters: the orders that failed as often as the consumer's MaxDeliver allows.

Usage:
    python dlq/consumer.py orders_unprocessed orders_stream
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C until `shutdown_on_signal`: end at once, without a traceback

import argparse
import asyncio
import logging
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from jobqueue.advisories import DeadLetter, parse_advisory, require_streams
from jobqueue.arguments import make_parser, number, stream_name, whole_number
from jobqueue.connection import connect_script
from jobqueue.dead_letters import as_delivered, begin_reprocessing, remove_message
from jobqueue.durables import Durables
from jobqueue.errors import TRANSIENT_ERRORS, describe_error, describe_failure, printable
from jobqueue.in_flight import ACK, LEAVE, TERM
from jobqueue.lost_advisories import keep_publishing
from jobqueue.reading import StoredMessage
from jobqueue.redelivery import attempt_of, nak_until_due, schedule_next_attempt
from jobqueue.redrive import is_redrive, redrive
from jobqueue.retrying import retry
from jobqueue.script import shutdown_on_signal, start
from jobqueue.streams import parse_ack_subject
from jobqueue.time_limit import TimeLimit
from jobqueue.worker import Worker

log = logging.getLogger("dlq")

DURABLE = "unprocessed_order_handler"
BACKOFF = [5.0]  # seconds until an advisory that was not acked is redelivered
MAX_DELIVER = 2  # or more: a later attempt needs one delivery for its delay
MAX_ACK_PENDING = 100_000  # advisories in flight or waiting for a retry; while there are more, no new ones come

options = argparse.Namespace()
tally: Counter[str] = Counter()


def parse_args() -> None:
    """Read the command line's arguments into `options`."""
    parser = make_parser(__doc__, "the graceful shutdown has finished")
    parser.add_argument("dlq_stream", type=stream_name, help="where the advisories are, such as orders_unprocessed")
    parser.add_argument("original_stream", type=stream_name, help="where the orders are, such as orders_stream")
    parser.add_argument(
        "--concurrency", type=whole_number(1, 500), default=1, help="dead letters at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--time-limit", type=number(0.1), default=600, help="seconds for the work on each (default: %(default)s)"
    )
    parser.parse_args(namespace=options)


async def reprocess(order: Msg) -> None:
    """Process one dead letter: the place for your own work. Return when it is done, raise when it failed.

    Args:
        order: `data` is the payload, `subject` and `headers` came with it. It may be redelivered, after a failure or
            a crash.
    """


async def handle(
    nc: Client, durables: Durables, shutdown: asyncio.Event, time_limit: TimeLimit, advisory: Msg
) -> bytes:
    """Process the order that an advisory is about and return how to ack the advisory."""
    stream, dlq_stream = options.original_stream, options.dlq_stream
    try:
        dead_letter = parse_advisory(advisory.data, stream, parse_ack_subject(advisory.reply)[1])
    except ValueError:
        tally["deleted"] += 1
        log.warning("deleted, for it is no advisory of %s: %s", stream, printable(advisory.data))
        return TERM
    if nak := nak_until_due(advisory):
        return nak
    # A transient error must not be one of the advisory's attempts, so it is waited out here.
    wait_out = partial(
        retry, what=f"dead letter # {dead_letter.sequence} in {stream}", should_raise=lambda _: shutdown.is_set()
    )
    try:
        found = await wait_out(partial(begin_reprocessing, nc, durables, dead_letter, advisory))
        if not found:
            return ACK
        error = await attempt(nc, time_limit, advisory, dead_letter, found)
        if error is None:
            tally["done"] += 1
            await wait_out(partial(remove_message, nc, dead_letter, found))
            return ACK
        tally["failed"] += 1
        if attempt_of(advisory, MAX_DELIVER) < MAX_DELIVER:
            return LEAVE
        delay = await wait_out(partial(schedule_next_attempt, nc, dlq_stream, advisory))
    except (*TRANSIENT_ERRORS, NotFoundError):  # a shutdown doesn't wait for the server: the advisory is redelivered
        return LEAVE
    log.error("%s stays in %s; next attempt in %g s", printable(found.data), stream, delay)
    return ACK  # of this advisory; there is another one for the next attempt


async def attempt(
    nc: Client, time_limit: TimeLimit, advisory: Msg, dead_letter: DeadLetter, found: StoredMessage
) -> BaseException | None:
    """Reprocess an order, or finish its redrive; return why that failed, or None."""
    if is_redrive(advisory):  # dlq/manage.py was killed before it had finished
        error = await time_limit.run(redrive(nc, dead_letter, found))
        if error:
            log.error("# %d in %s is not redriven: %s", found.sequence, dead_letter.stream, describe_error(error))
        return error
    log.info("reprocessing order %s", printable(found.data))
    error = await time_limit.run(reprocess(as_delivered(nc, found, dead_letter)))
    if error:
        why = describe_failure(error, attempt_of(advisory, MAX_DELIVER), MAX_DELIVER, found.sequence)
        log.error("error reprocessing order %s: %s", printable(found.data), why)
    return error


async def check_streams(nc: Client) -> None:
    """Check that the streams exist, and that one is for the other's advisories: other messages would be deleted."""
    await require_streams(nc, options.dlq_stream, options.original_stream)


async def run() -> int:
    """Process dead letters until the shutdown."""
    config = ConsumerConfig(
        name=DURABLE,
        durable_name=DURABLE,
        description="handle unprocessed jobs",
        backoff=BACKOFF,
        max_deliver=MAX_DELIVER,
        max_ack_pending=MAX_ACK_PENDING,
        ack_policy=AckPolicy.EXPLICIT,
    )
    # As many threads as orders for work in asyncio.to_thread(), and a few for threads that hang and for name look-ups.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(options.concurrency + 4))
    time_limit = TimeLimit(options.time_limit)
    async with connect_script(f"dlq_{options.original_stream}") as nc:
        await check_streams(nc)
        shutdown = asyncio.Event()
        durables = Durables(nc, options.original_stream)
        handle_advisory = partial(handle, nc, durables, shutdown, time_limit)
        worker = Worker(nc, options.dlq_stream, config, handle_advisory, options.concurrency, time_limit)
        with shutdown_on_signal(shutdown, lambda: f"{worker.in_flight} dead letters in flight"):
            publishing = asyncio.create_task(keep_publishing(nc, options.dlq_stream, DURABLE, options.original_stream))
            try:
                await worker.run(shutdown)
            finally:
                publishing.cancel()
    log.info(
        "stopped: %d dead letters done, %d attempts failed, %d advisories deleted",
        *(tally[outcome] for outcome in ("done", "failed", "deleted")),
    )
    return 0


def main() -> None:
    """Run the DLQ processor."""
    parse_args()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
