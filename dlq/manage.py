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
import sys
from collections import Counter
from datetime import datetime
from functools import partial

from nats.aio.client import Client
from nats.errors import Error

from jobqueue.arguments import make_parser, stream_name, whole_number
from jobqueue.claims import Claims
from jobqueue.connection import connect
from jobqueue.dead_letters import ADVISORY, DeadLetter, remove_message
from jobqueue.errors import Failure, describe_error, printable
from jobqueue.inventory import Item, as_json, check, find_unknown, read_advisories
from jobqueue.reading import StoredMessage, gather_some
from jobqueue.redrive import REDRIVE, send_back
from jobqueue.script import shutdown_on_signal, start
from jobqueue.streams import Durables, require_stream

log = logging.getLogger("manage")

DURABLE = "unprocessed_order_handler"  # of dlq/consumer.py
BATCH = 256  # dead letters that are claimed at a time
ROW = "{:>9}  {:<20}  {:<19}  {:<19}  {:>10}  {:<36}  {}"

options = argparse.Namespace()
tally: Counter[str] = Counter()


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
        print(json.dumps(as_json(item.dead_letter, order)))
        return
    times = (order.stored_at, item.dead_letter.died_at)
    published, died = (str(datetime.fromtimestamp(ns // 10**9)) if ns else "without advisory" for ns in times)
    message_id, deliveries = printable(order.headers.get("Nats-Msg-Id", "")), item.dead_letter.deliveries
    columns = (order.sequence, printable(order.subject), published, died, deliveries, message_id)
    print(ROW.format(*columns, printable(order.data, 60)))


async def discard(nc: Client, dead_letter: DeadLetter, order: StoredMessage) -> None:
    """Print a dead letter with all that is known of it, then remove it.

    Raises:
        nats.errors.Error: the server didn't answer; the dead letter may still be there.
    """
    print(json.dumps(as_json(dead_letter, order)), flush=True)
    await remove_message(nc, dead_letter, order)
    log.info("discarded %s: # %d in %s", printable(order.data), order.sequence, options.original_stream)


async def select(nc: Client) -> list[Item]:
    """Return what the command is for. Some may be no dead letters any more."""
    names = options.dlq_stream, options.original_stream
    items = await read_advisories(nc, *names)
    wanted = set() if options.command == "list" else set(options.sequences)
    if not wanted or wanted - items.keys():
        items = await find_unknown(nc, options.dlq_stream, DURABLE, options.original_stream) | items
    for sequence in sorted(wanted - items.keys()):
        leave(sequence, "is no dead letter: it is alive, or gone")
    return [items[sequence] for sequence in sorted(items) if not wanted or sequence in wanted]


def leave(sequence: int, why: str) -> None:
    """Log and count an order that the command isn't carried out for."""
    tally["left"] += 1
    log.error("# %d in %s %s", sequence, options.original_stream, why)


async def show_all(nc: Client) -> None:
    """Print the dead letters."""
    items = await select(nc)
    if not options.json:
        print(ROW.format("SEQUENCE", "SUBJECT", "PUBLISHED", "DIED", "DELIVERIES", "ID", "PAYLOAD"))
    async for item, order, why in check(nc, Durables(nc, options.original_stream), items):
        if order and not why:
            show(item, order)


async def only_dead(
    nc: Client, claims: Claims, durables: Durables, items: list[Item]
) -> list[tuple[Item, StoredMessage]]:
    """Return the items that are dead letters, with their orders, and remove the advisories of orders that are gone."""
    dead: list[tuple[Item, StoredMessage]] = []
    outdated: list[int] = []
    async for item, order, why in check(nc, durables, items):
        if order and not why:
            dead.append((item, order))
        elif not options.all:
            leave(item.dead_letter.sequence, f"is no dead letter: it {why}")
        if not order:
            outdated.extend(item.advisories)
    await claims.remove(outdated)
    return dead


async def handle_batch(nc: Client, claims: Claims, durables: Durables, items: list[Item]) -> None:
    """Send back or discard some dead letters."""
    handle, headers = (send_back, {REDRIVE: "1"}) if options.command == "retry" else (discard, {})

    async def handle_one(item: Item, order: StoredMessage) -> None:
        try:
            await handle(nc, item.dead_letter, order)
        except (Error, TimeoutError) as error:
            leave(order.sequence, f"is left: {describe_error(error)}")
            await claims.release(item)
        else:
            tally["done"] += 1

    dead = [item for item, _ in await only_dead(nc, claims, durables, items)]
    claimed = await claims.claim(dead, **headers)
    for item, claim in zip(dead, claimed, strict=True):
        if not claim:
            leave(item.dead_letter.sequence, "is left: a DLQ processor has it in flight")
    # Some may have been done before they were claimed.
    ours = await only_dead(nc, claims, durables, [claim for claim in claimed if claim])
    await gather_some([partial(handle_one, item, order) for item, order in ours])
    await claims.remove(advisory for item, _ in ours for advisory in item.advisories)


async def handle_all(nc: Client) -> None:
    """Send back or discard the dead letters."""
    durables, shutdown = Durables(nc, options.original_stream), asyncio.Event()
    claims = Claims(nc, options.dlq_stream, DURABLE, durables)
    await claims.start()
    items = await select(nc)
    with shutdown_on_signal(shutdown, lambda: "the dead letters in hand"):
        while items and not shutdown.is_set():
            batch, items = items[:BATCH], items[BATCH:]
            await handle_batch(nc, claims, durables, batch)
    tally["left"] += len(items)
    what = "sent back" if options.command == "retry" else "discarded"
    log.info("%d dead letters %s, %d left", tally["done"], what, tally["left"])


async def run() -> int:
    """Carry out the command, and return the exit status: 1 if it isn't carried out for all."""
    stream, dlq_stream = options.original_stream, options.dlq_stream
    async with connect(f"manage_{stream}") as nc:
        await require_stream(nc, stream, ">", "scripts/create_orders_stream.sh", stream, "SUBJECTS")
        create = ("scripts/create_orders_unprocessed.sh", dlq_stream, stream)
        await require_stream(nc, dlq_stream, f"{ADVISORY}.{stream}.*", *create)
        try:
            await (show_all(nc) if options.command == "list" else handle_all(nc))
        except BrokenPipeError:  # whoever reads the list has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (Error, TimeoutError) as error:
            raise Failure(f"{options.command} has not finished: {describe_error(error)}; run it again") from None
    return 1 if tally["left"] else 0


def main() -> None:
    """Run the command."""
    parse_args()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
