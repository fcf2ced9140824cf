"""Look at dead letters, send them back into their queue, or throw them away.

Usage:
    python dlq/manage.py orders_unprocessed orders_stream list
    python dlq/manage.py orders_unprocessed orders_stream retry 17 23
    python dlq/manage.py orders_unprocessed orders_stream discard --all
"""

import argparse
import asyncio
import json
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from functools import partial

from nats.aio.client import Client
from nats.errors import Error

from jobqueue.arguments import make_parser, stream_name, whole_number
from jobqueue.claims import Claims
from jobqueue.connection import connect
from jobqueue.dead_letters import ADVISORY, remove_message
from jobqueue.errors import Failure, describe_error, printable
from jobqueue.inventory import Item, as_json, check, find_unknown, read_advisories
from jobqueue.reading import StoredMessage, gather_some
from jobqueue.retrying import retry
from jobqueue.script import shutdown_on_signal, start
from jobqueue.streams import Durables, require_stream

log = logging.getLogger("manage")

DURABLE = "unprocessed_order_handler"  # of dlq/consumer.py
BATCH = 256  # dead letters that are claimed at a time
PUBLISH_TIMEOUT = 5.0  # seconds for one attempt
RETRY_FOR = 30.0  # seconds; well within the stream's duplicate window
ROW = "{:>9}  {:<20}  {:<19}  {:<19}  {:>10}  {:<36}  {}"

options = argparse.Namespace()


def parse_args() -> None:
    """Read the command line's arguments into `options`, and ask before everything is discarded."""
    parser = make_parser(__doc__)
    parser.add_argument("dlq_stream", type=stream_name, help="where the advisories are, such as orders_unprocessed")
    parser.add_argument("original_stream", type=stream_name, help="where the orders are, such as orders_stream")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|retry|discard")
    listing = commands.add_parser("list", help="show all dead letters")
    listing.add_argument("--json", action="store_true", help="an object a line, with headers and the whole payload")
    retrying = commands.add_parser("retry", help="publish dead letters again, for fresh attempts")
    discarding = commands.add_parser("discard", help="print dead letters, then remove them")
    for command in (retrying, discarding):
        command.add_argument("sequences", nargs="*", type=whole_number(1), metavar="SEQUENCE", help="stream sequence")
        command.add_argument("--all", action="store_true", help="all dead letters")
    discarding.add_argument("--yes", action="store_true", help="don't ask before --all")
    parser.parse_args(namespace=options)
    if options.command != "list" and options.all == bool(options.sequences):
        commands.choices[options.command].error("name stream sequences, or --all")
    if options.command == "discard" and options.all and not options.yes:
        if not sys.stdin.isatty():
            discarding.error("--all needs --yes where nobody can be asked")
        if input(f"discard all dead letters of {options.original_stream}? [y/N] ").lower() not in ("y", "yes"):
            sys.exit("nothing is discarded")


def show(item: Item, order: StoredMessage) -> None:
    """Print one dead letter."""
    if options.json:
        print(json.dumps(as_json(item, order)))
        return
    times = (order.stored_at, item.dead_letter.died_at)
    published, died = (str(datetime.fromtimestamp(ns // 10**9)) if ns else "without advisory" for ns in times)
    message_id, deliveries = printable(order.headers.get("Nats-Msg-Id", "")), item.dead_letter.deliveries
    columns = (order.sequence, printable(order.subject), published, died, deliveries, message_id)
    print(ROW.format(*columns, printable(order.data, 60)))


async def send_back(nc: Client, item: Item, order: StoredMessage) -> None:
    """Publish an order again for fresh attempts, then remove the dead letter.

    Its headers come with it, but for those that tell the server what to do (`Nats-...`: expected sequences, TTL,
    schedule), which were meant for the first publish. A second try of the same command has the same id, so that
    within the duplicate window the order is stored once.

    Raises:
        nats.errors.Error: the server didn't answer, or refuses; the dead letter is still there.
    """
    stream, now = options.original_stream, asyncio.get_running_loop().time
    deadline = now() + RETRY_FOR
    headers = {name: value for name, value in order.headers.items() if not name.lower().startswith("nats-")}
    first_id = re.sub(r"\.retry-\d+$", "", order.headers.get("Nats-Msg-Id", stream))
    headers["Nats-Msg-Id"] = f"{first_id}.retry-{order.sequence}"
    publish = partial(nc.jetstream().publish, order.subject, order.data, PUBLISH_TIMEOUT, stream, headers)
    stored = await retry(publish, f"# {order.sequence} is not published yet", lambda _: now() > deadline)
    await remove_message(nc, item.dead_letter, order)
    log.info("sent back %s: # %d in %s is # %d now", printable(order.data), order.sequence, stream, stored.seq)


async def discard(nc: Client, item: Item, order: StoredMessage) -> None:
    """Print a dead letter with all that is known of it, then remove it.

    Raises:
        nats.errors.Error: the server didn't answer; the dead letter may still be there.
    """
    print(json.dumps(as_json(item, order)), flush=True)
    await remove_message(nc, item.dead_letter, order)
    log.info("discarded %s: # %d in %s", printable(order.data), order.sequence, options.original_stream)


async def select(nc: Client) -> dict[int, Item]:
    """Return the dead letters that the command is for; what was named, and is none, is logged."""
    names = options.dlq_stream, options.original_stream
    items = await read_advisories(nc, *names)
    wanted = set(options.sequences if options.command != "list" else ())
    if not wanted or wanted - items.keys():
        items = await find_unknown(nc, options.dlq_stream, DURABLE, options.original_stream) | items
    for sequence in sorted(wanted - items.keys()):
        log.error("# %d in %s is no dead letter: it is alive, or gone", sequence, options.original_stream)
    return {sequence: items[sequence] for sequence in sorted(items) if not wanted or sequence in wanted}


async def still_dead(
    nc: Client, durables: Durables, items: Iterable[Item]
) -> AsyncIterator[tuple[Item, StoredMessage]]:
    """Yield the items that are dead letters, with their orders; log the others."""
    async for item, order, why in check(nc, durables, items):
        if order and not why:
            yield item, order
        else:
            sequence = item.dead_letter.sequence
            log.error("# %d in %s is no dead letter: it %s", sequence, options.original_stream, why)


async def handle_batch(nc: Client, claims: Claims, durables: Durables, batch: list[Item]) -> int:
    """Send back or discard some dead letters, and return how many are done."""
    handle = send_back if options.command == "retry" else discard
    stream = options.original_stream

    async def handle_one(item: Item, order: StoredMessage) -> bool:
        try:
            await handle(nc, item, order)
        except (Error, TimeoutError) as error:
            log.error("# %d in %s is left: %s", order.sequence, stream, describe_error(error))
            await claims.release(item)
            return False
        return True

    ours = []
    for item, is_ours in zip(batch, await claims.claim(batch), strict=True):
        if is_ours:
            ours.append(item)
        else:
            log.error("# %d in %s is left: a DLQ processor has it in flight", item.dead_letter.sequence, stream)
    # Some may have been done before they were claimed.
    return sum(
        await gather_some([partial(handle_one, item, order) async for item, order in still_dead(nc, durables, ours)])
    )


async def show_all(nc: Client) -> int:
    """Print the dead letters."""
    items = await select(nc)
    if not options.json:
        print(ROW.format("SEQUENCE", "SUBJECT", "PUBLISHED", "DIED", "DELIVERIES", "ID", "PAYLOAD"))
    async for item, order, why in check(nc, Durables(nc, options.original_stream), items.values()):
        if order and not why:
            show(item, order)
    return 0


async def handle_all(nc: Client) -> int:
    """Send back or discard the dead letters, and return the exit status: 1 if one of them is left."""
    durables, shutdown = Durables(nc, options.original_stream), asyncio.Event()
    items = await select(nc)
    wanted, done = len(items) if options.all else len(set(options.sequences)), 0
    claims = Claims(nc, options.dlq_stream, DURABLE, durables)
    await claims.start()
    unhandled = list(items.values())
    with shutdown_on_signal(shutdown, lambda: "the dead letters in hand"):
        while unhandled and not shutdown.is_set():
            batch, unhandled = unhandled[:BATCH], unhandled[BATCH:]
            dead = [item async for item, _ in still_dead(nc, durables, batch)]
            done += await handle_batch(nc, claims, durables, dead)
    log.info("%d of %d dead letters %s", done, wanted, "sent back" if options.command == "retry" else "discarded")
    return 0 if done == wanted else 1


async def run() -> int:
    """Carry out the command, and return the exit status."""
    stream, dlq_stream = options.original_stream, options.dlq_stream
    async with connect(f"manage_{stream}") as nc:
        await require_stream(nc, stream, ">", "scripts/create_orders_stream.sh", stream, "SUBJECTS")
        create = ("scripts/create_orders_unprocessed.sh", dlq_stream, stream)
        await require_stream(nc, dlq_stream, f"{ADVISORY}.{stream}.*", *create)
        try:
            return await (show_all(nc) if options.command == "list" else handle_all(nc))
        except BrokenPipeError:  # whoever reads the list has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (Error, TimeoutError) as error:
            raise Failure(f"cannot {options.command} all: {describe_error(error)}; run it again") from None


def main() -> None:
    """Run the command."""
    parse_args()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
