"""Publish orders to a subject of a JetStream stream.

Usage:
    python publisher/publisher.py orders.new
"""

import argparse
import asyncio
import logging
import sys
import uuid
from contextlib import suppress

from nats.aio.client import Client
from nats.errors import Error
from nats.js.errors import NotFoundError

from jobqueue.connection import connect
from jobqueue.script import Failure, number, reason, start, stop_on_signal, subject, whole
from jobqueue.worker import PASSING, retry

log = logging.getLogger("publisher")

PUBLISH_TIMEOUT = 5.0  # seconds for one attempt
RETRY_FOR = 30.0  # seconds, and one more attempt; well within the stream's duplicate window
STREAM_FULL = 10077  # JetStream's error code


def parse_args() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Publish orders to a JetStream stream.")
    parser.add_argument("subject", type=subject, help="where to, such as orders.new")
    parser.add_argument("--count", type=whole(1), default=20, help="how many orders (default: 20)")
    parser.add_argument("--interval", type=number(0), default=1.0, help="seconds between them (default: 1.0)")
    return parser.parse_args()


async def publish(nc: Client, subject: str, order: bytes, order_id: str, label: str) -> bool:
    """Publish one order and return whether the server has stored it.

    Args:
        nc: the connection.
        subject: where to.
        order: the payload.
        order_id: the same for every attempt, so that the server stores the order once
            (https://docs.nats.io/using-nats/developer/develop_jetstream/model_deep_dive#message-deduplication).
        label: the order's name in the log.

    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + RETRY_FOR
    headers = {"Nats-Msg-Id": order_id}
    try:
        await retry(
            lambda: nc.jetstream().publish(subject, order, timeout=PUBLISH_TIMEOUT, headers=headers),
            f"{label} is not published yet",
            lambda fault: loop.time() > deadline or getattr(fault, "err_code", None) == STREAM_FULL,
        )
    except (Error, TimeoutError) as error:
        log.error("%s is not published: %s", label, reason(error))
        return False
    log.info("published %s", label)
    return True


async def check_subject(nc: Client, subject: str) -> None:
    """Check that a stream takes the subject, which a publish alone cannot tell from a stream without a leader."""
    with suppress(*PASSING):
        try:
            await nc.jetstream().find_stream_name_by_subject(subject)
        except NotFoundError:
            raise Failure(
                f"no stream takes the subject {subject} (scripts/create_orders_stream.sh creates one for orders.*)"
            ) from None


async def run(options: argparse.Namespace) -> int:
    """Publish the orders and return the exit status: 1 if any of them is missing."""
    run_id = uuid.uuid4().hex
    published = 0
    async with connect(f"publisher_{options.subject}") as nc:
        await check_subject(nc, options.subject)
        with stop_on_signal() as stop:
            for i in range(options.count):
                published += await publish(
                    nc, options.subject, f"order-{i}".encode(), f"{run_id}-{i}", f"order no. {i}"
                )
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), options.interval)
                if stop.is_set():
                    break
    if published < options.count:
        log.error("%d of %d orders are not published", options.count - published, options.count)
        return 1
    return 0


def main() -> None:
    """Run the publisher."""
    sys.exit(start(run(parse_args())))


if __name__ == "__main__":
    main()
