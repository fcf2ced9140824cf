"""Process dead letters: the orders that failed as often as the consumer's MaxDeliver allows.

Usage:
    python dlq/consumer.py orders_unprocessed orders_stream
"""

import os
import signal

for signum in (signal.SIGINT, signal.SIGTERM):  # Until `start`. As process 1, Linux ignores what has no handler.
    signal.signal(signum, lambda signum, _: os._exit(128 + signum))

import argparse
import asyncio
import logging
import sys
from concurrent.futures import ThreadPoolExecutor

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue.connection.connecting import connect_script
from jobqueue.dead_letters.advisories import require_streams
from jobqueue.dead_letters.processing import Processing
from jobqueue.dead_letters.searching import search
from jobqueue.dead_letters.verifying import Verifier
from jobqueue.script.arguments import make_parser, number, stream_name, whole_number
from jobqueue.script.running import shutdown_on_signal, start
from jobqueue.worker.time_limit import TimeLimit
from jobqueue.worker.worker import Worker

log = logging.getLogger("dlq")

DURABLE = "unprocessed_order_handler"
BACKOFF = [5.0]  # seconds until an advisory that was not acked, since its DLQ processor was killed, is redelivered
MAX_DELIVER = -1  # no limit: an order whose reprocessing fails is tried again until it succeeds
MAX_ACK_PENDING = 100_000  # advisories in flight or waiting for a retry; while there are more, no new ones come

options = argparse.Namespace()


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
    dlq_stream, stream = options.dlq_stream, options.original_stream
    time_limit, shutdown = TimeLimit(options.time_limit), asyncio.Event()
    async with connect_script(f"dlq_{stream}") as nc:
        await require_streams(nc, dlq_stream, stream)
        verifier = Verifier(nc, stream)
        await verifier.pending.start(stream, dlq_stream)
        processing = Processing(nc, verifier, reprocess, time_limit, shutdown)
        worker = Worker(nc, dlq_stream, config, processing.handle, options.concurrency, time_limit)
        with shutdown_on_signal(shutdown, lambda: f"{worker.in_flight} dead letters in flight"):
            searching = asyncio.create_task(search(nc, dlq_stream, verifier))
            try:
                await worker.run(shutdown)
            finally:
                searching.cancel()
    log.info(
        "stopped: %d dead letters done, %d attempts failed, %d advisories deleted",
        *(processing.tally[outcome] for outcome in ("done", "failed", "deleted")),
    )
    return 1 if worker.in_flight else 0


def main() -> None:
    """Run the DLQ processor."""
    parse_args()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
