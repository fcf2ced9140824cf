"""Publish orders to a subject of a JetStream stream.

Usage:
    python publisher/publisher.py orders.new
    python publisher/publisher.py orders.new --interval 0 --input orders.txt
"""

import os
import signal

for signum in (signal.SIGINT, signal.SIGTERM):  # Until `start`. As process 1, Linux ignores what has no handler.
    signal.signal(signum, lambda signum, _: os._exit(128 + signum))

import argparse
import asyncio
import logging
import shlex
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress

from nats.aio.client import Client
from nats.js.errors import NotFoundError

from jobqueue.connection.connecting import connect_script
from jobqueue.errors import TRANSIENT_ERRORS, Failure
from jobqueue.publishing.message import Message, Outcome
from jobqueue.publishing.publishing import publish, publish_many
from jobqueue.script.arguments import make_parser, number, subject, whole_number
from jobqueue.script.lines import opened, read_lines
from jobqueue.script.running import shutdown_on_signal, start

log = logging.getLogger("publisher")

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


async def numbered_orders(shutdown: asyncio.Event) -> AsyncIterator[bytes]:
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


async def check_streams(nc: Client) -> None:
    """Check that a stream takes the subject, which a publish alone cannot tell from a stream without a leader."""
    with suppress(*TRANSIENT_ERRORS):
        try:
            await nc.jetstream().find_stream_name_by_subject(options.subject)
        except NotFoundError:
            create = shlex.join(["scripts/create_orders_stream.sh", "STREAM", options.subject])
            raise Failure(f"no stream takes the subject {options.subject}: create one with {create}") from None


async def run() -> int:
    """Publish the orders and return the exit status: 1 if any of them is not stored."""
    outcomes: Counter[Outcome] = Counter()
    with opened(options.input) if options.input is not None else nullcontext(-1) as file:
        async with connect_script(f"publisher_{options.subject}") as nc:
            await check_streams(nc)
            shutdown = asyncio.Event()
            with shutdown_on_signal(shutdown, lambda: "the orders in flight"):
                payloads = numbered_orders(shutdown) if file < 0 else read_lines(file, nc.max_payload, shutdown)
                messages = make_messages(payloads)
                if options.interval == 0:
                    outcomes = await publish_many(nc, options.subject, messages)
                else:
                    async for message in messages:
                        outcomes[await publish(nc, options.subject, message)] += 1
                        with suppress(TimeoutError):
                            await asyncio.wait_for(shutdown.wait(), options.interval)
    wanted = options.count if options.input is None else outcomes.total()
    missing = wanted - outcomes[Outcome.STORED] - outcomes[Outcome.DUPLICATE]
    if missing:
        log.error("%d of %d orders are not published", missing, wanted)
    return 1 if missing else 0


def main() -> None:
    """Run the publisher."""
    parse_args()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
