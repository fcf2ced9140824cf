"""Publish orders to a subject of a JetStream stream.

Usage:
    python publisher/publisher.py orders.new
    python publisher/publisher.py orders.new --interval 0 --input orders.txt
"""

import os
import signal

for signum in (signal.SIGINT, signal.SIGTERM):  # Until `run`. As process 1, Linux ignores what has no handler.
    signal.signal(signum, lambda signum, _: os._exit(128 + signum))

import argparse
import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress

from jobqueue import (
    Failure,
    Message,
    Outcome,
    connect,
    make_parser,
    number,
    publish,
    publish_many,
    read_lines,
    require_stream_for,
    run,
    shutdown_on_signal,
    subject,
    whole_number,
)

options = argparse.Namespace()


def parse_args() -> None:
    """Read the command line's arguments into `options`."""
    parser = make_parser(__doc__, "every order is stored")
    parser.add_argument("subject", type=subject, help="the subject to publish to, such as orders.new")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--count", type=whole_number(1), default=20, help="how many orders (default: %(default)s)")
    which.add_argument("--input", metavar="FILE", help="publish each line of a file instead; - is standard input")
    parser.add_argument(
        "--interval",
        type=number(0),
        default=1.0,
        help="seconds between them; 0 is many at a time (default: %(default)s)",
    )
    parser.parse_args(namespace=options)


async def numbered(shutdown: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield the article's orders, until the shutdown."""
    for i in range(options.count):
        if shutdown.is_set():
            break
        yield b"order-%d" % i


async def make_messages(payloads: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    """Give each order an id that is unique across runs."""
    run_id = uuid.uuid4().hex
    count = 0
    async for payload in payloads:
        yield Message(payload, f"{run_id}-{count}", f"order no. {count}")
        count += 1


async def main() -> None:
    """Publish the orders; fail if any of them is not stored."""
    outcomes: Counter[Outcome] = Counter()
    async with connect(f"publisher_{options.subject}") as nc:
        await require_stream_for(nc, options.subject)
        with shutdown_on_signal(lambda: "the orders in flight") as shutdown:
            is_numbered = options.input is None
            payloads = numbered(shutdown) if is_numbered else read_lines(options.input, nc.max_payload, shutdown)
            messages = make_messages(payloads)
            if options.interval == 0:
                outcomes = await publish_many(nc, options.subject, messages)
            else:
                async for message in messages:
                    outcomes[await publish(nc, options.subject, message)] += 1
                    with suppress(TimeoutError):
                        await asyncio.wait_for(shutdown.wait(), options.interval)
    wanted = options.count if is_numbered else outcomes.total()
    if missing := wanted - outcomes[Outcome.STORED] - outcomes[Outcome.DUPLICATE]:
        raise Failure(f"{missing} of {wanted} orders are not published")


if __name__ == "__main__":
    parse_args()
    run(main())
