"""Publish orders to a subject of a JetStream stream.

Usage:
    python publisher/publisher.py orders.new
    python publisher/publisher.py orders.new --interval 0 --input orders.txt
"""

import argparse
import asyncio
import logging
import shlex
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress

from nats.aio.client import Client
from nats.js.errors import NotFoundError

from jobqueue.connection import connect
from jobqueue.lines import lines, opened
from jobqueue.publish import Message, publish, publish_many
from jobqueue.script import Failure, arguments, number, start, stop_on_signal, subject, whole
from jobqueue.worker import PASSING

log = logging.getLogger("publisher")


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = arguments(__doc__)
    parser.add_argument("subject", type=subject, help="where to, such as orders.new")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--count", type=whole(1), default=20, help="how many orders (default: %(default)s)")
    which.add_argument("--input", metavar="FILE", help="publish each line of a file instead; - is standard input")
    parser.add_argument(
        "--interval", type=number(0), default=1.0, help="seconds between them; 0: many at a time (default: %(default)s)"
    )
    return parser.parse_args()


async def numbered(count: int, stop: asyncio.Event) -> AsyncIterator[bytes]:
    """Yield the article's orders, until the stop."""
    for i in range(count):
        if stop.is_set():
            break
        yield b"order-%d" % i


async def check_subject(nc: Client, subject: str) -> None:
    """Check that a stream takes the subject, which a publish alone cannot tell from a stream without a leader."""
    with suppress(*PASSING):
        try:
            await nc.jetstream().find_stream_name_by_subject(subject)
        except NotFoundError:
            raise Failure(
                f"no stream takes the subject {subject}: create one with "
                f"{shlex.join(['scripts/create_orders_stream.sh', 'STREAM', subject])}"
            ) from None


async def run(options: argparse.Namespace) -> int:
    """Publish the orders and return the exit status: 1 if any of them is missing."""
    run_id = uuid.uuid4().hex
    asked = published = 0

    async def messages(payloads: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        nonlocal asked
        async for payload in payloads:
            asked += 1
            yield Message(payload, f"{run_id}-{asked - 1}", f"order no. {asked - 1}")

    with opened(options.input) if options.input is not None else nullcontext(-1) as file:
        async with connect(f"publisher_{options.subject}") as nc:
            await check_subject(nc, options.subject)
            with stop_on_signal() as stop:
                payloads = numbered(options.count, stop) if file < 0 else lines(file, nc.max_payload, stop)
                if options.interval == 0:
                    published = await publish_many(nc, options.subject, messages(payloads))
                else:
                    async for message in messages(payloads):
                        published += await publish(nc, options.subject, message)
                        with suppress(TimeoutError):
                            await asyncio.wait_for(stop.wait(), options.interval)
    wanted = options.count if options.input is None else asked
    if published < wanted:
        log.error("%d of %d orders are not published", wanted - published, wanted)
        return 1
    return 0


def main() -> None:
    """Run the publisher."""
    sys.exit(start(run(parse_args())))


if __name__ == "__main__":
    main()
