"""Process dead letters: the orders that failed as often as the consumer's MaxDeliver allows.

Usage:
    python dlq/consumer.py orders_unprocessed orders_stream
"""

import os
import signal

for signum in (signal.SIGINT, signal.SIGTERM):  # Until `run`. As process 1, Linux ignores what has no handler.
    signal.signal(signum, lambda signum, _: os._exit(128 + signum))

import argparse
import logging

from nats.aio.msg import Msg

from jobqueue import consume_dead_letters, make_parser, number, run, stream_name, whole_number

log = logging.getLogger(__name__)

DURABLE = "unprocessed_order_handler"
BACKOFF = [5.0]  # seconds until an advisory is redelivered whose DLQ processor was killed

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


async def main() -> None:
    """Process dead letters until the shutdown."""
    await consume_dead_letters(
        options.dlq_stream,
        options.original_stream,
        reprocess,
        durable=DURABLE,
        description="handle unprocessed jobs",
        backoff=BACKOFF,
        concurrency=options.concurrency,
        time_limit=options.time_limit,
    )


if __name__ == "__main__":
    parse_args()
    run(main())
