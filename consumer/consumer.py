"""Process orders from a JetStream work queue; any number of processes share the work.

Usage:
    python consumer/consumer.py orders_stream "orders.*"
"""

import os
import signal

for signum in (signal.SIGINT, signal.SIGTERM):  # Until `run`. As process 1, Linux ignores what has no handler.
    signal.signal(signum, lambda signum, _: os._exit(128 + signum))

import argparse
import asyncio
import logging
import random

from nats.aio.msg import Msg

from jobqueue import Retry, consume, make_parser, number, printable, run, stream_name, subject_filter, whole_number

log = logging.getLogger(__name__)

DURABLE = "processor"
BACKOFF = [5.0]  # seconds until an order that was not acked is redelivered
MAX_DELIVER = 2  # after so many deliveries without an ack the order is a dead letter

options = argparse.Namespace()


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
        raise Retry  # it fails by chance, as in the article
    log.info("received %s from stream sequence # %d", printable(order.data), order.metadata.sequence.stream)
    await asyncio.sleep(options.work_time)


async def main() -> None:
    """Process orders until the shutdown."""
    await consume(
        options.stream,
        options.subject_filter,
        process,
        durable=DURABLE,
        description="Orders processor",
        backoff=BACKOFF,
        max_deliver=MAX_DELIVER,
        concurrency=options.concurrency,
        time_limit=options.time_limit,
    )


if __name__ == "__main__":
    parse_args()
    run(main())
