"""List dead letters, redrive them (publish them again, for fresh attempts), or discard them.

Usage:
    python dlq/manage.py orders_unprocessed orders_stream list
    python dlq/manage.py orders_unprocessed orders_stream retry 17 23
    python dlq/manage.py orders_unprocessed orders_stream discard --all
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C until `shutdown_on_signal`: end at once, without a traceback

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

from jobqueue.advisories import Item, read_advisories, require_streams
from jobqueue.arguments import make_parser, stream_name, whole_number
from jobqueue.claims import Claims
from jobqueue.connection import connect_script
from jobqueue.dead_letters import remove_message
from jobqueue.durables import Durables
from jobqueue.errors import Failure, describe_error, printable
from jobqueue.inventory import as_json, find_without_advisory, verify_dead
from jobqueue.reading import StoredMessage, gather_some
from jobqueue.redrive import REDRIVE_HEADER, redrive
from jobqueue.script import shutdown_on_signal, start

log = logging.getLogger("manage")

DURABLE = "unprocessed_order_handler"  # of dlq/consumer.py
BATCH = 128  # dead letters that are claimed at a time
ROW = "{:>9}  {:<20}  {:<19}  {:<19}  {:>10}  {:<36}  {}"

options = argparse.Namespace()
tally: Counter[str] = Counter()


def parse_args() -> None:
    """Read the command line's arguments into `options`."""
    parser = make_parser(__doc__, "the command has been carried out for all")
    parser.add_argument("dlq_stream", type=stream_name, help="where the advisories are, such as orders_unprocessed")
    parser.add_argument("original_stream", type=stream_name, help="where the orders are, such as orders_stream")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|retry|discard")
    listing = commands.add_parser("list", help="show all dead letters")
    listing.add_argument("--json", action="store_true", help="one JSON object per line, with headers and whole payload")
    retrying = commands.add_parser("retry", help="redrive: publish dead letters again, for fresh attempts")
    discarding = commands.add_parser("discard", help="print dead letters, then remove them")
    for command in (retrying, discarding):
        command.add_argument("sequences", nargs="*", type=whole_number(1), metavar="SEQUENCE", help="shown by `list`")
        command.add_argument("--all", action="store_true", help="all dead letters")
    discarding.add_argument("--yes", action="store_true", help="don't ask for confirmation of --all")
    parser.parse_args(namespace=options)
    if options.command == "list":
        return
    if options.all == bool(options.sequences):  # both, or neither
        commands.choices[options.command].error("give stream sequences, or --all")
    if options.command == "discard" and options.all and not options.yes and not sys.stdin.isatty():
        discarding.error("--all requires --yes without a terminal")


def confirm() -> None:
    """Ask before everything is discarded."""
    if options.command == "discard" and options.all and not options.yes:
        print(f"discard all dead letters of {options.original_stream}? [y/N]", file=sys.stderr)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            sys.exit("nothing is discarded")


def show(item: Item, order: StoredMessage) -> None:
    """Print one dead letter."""
    if options.json:
        print(json.dumps(as_json(item, order)))
        return
    published, died = (str(datetime.fromtimestamp(ns // 10**9)) for ns in (order.stored_at, item.dead_letter.died_at))
    columns = (
        *(order.sequence, printable(order.subject), published, died if item.advisories else "without advisory"),
        *(item.dead_letter.deliveries, printable(order.headers.get("Nats-Msg-Id", ""))),
    )
    print(ROW.format(*columns, printable(order.data, 60)))


async def discard(nc: Client, item: Item, order: StoredMessage, claims: Claims) -> None:
    """Print a dead letter with all that is known of it, then remove it.

    Raises:
        nats.errors.Error: the request timed out; the dead letter may still be there.
    """
    try:
        print(json.dumps(as_json(item, order)), flush=True)
    except BrokenPipeError:
        raise Error("it could not be printed") from None
    if not claims.are_valid():  # whoever reads the output made us wait
        raise TimeoutError
    if not await remove_message(nc, item.dead_letter, order):
        raise Error("it is gone")
    log.info("discarded %s: # %d in %s", printable(order.data), order.sequence, options.original_stream)


def skip(sequence: int, why: str) -> None:
    """Log and count an order that the command isn't carried out for."""
    tally["skipped"] += 1
    log.error("# %d in %s is skipped: %s", sequence, options.original_stream, why)


async def select(nc: Client, items: dict[int, Item]) -> list[Item]:
    """Return what the command is for, by the advisories and without. Some may be no dead letters any more."""
    wanted = set() if options.command == "list" else set(options.sequences)
    if not wanted or wanted - items.keys():
        names = options.dlq_stream, DURABLE, options.original_stream
        items = await find_without_advisory(nc, *names) | items
    for sequence in sorted(wanted - items.keys()):
        skip(sequence, "it is no dead letter, but in flight, queued or gone")
    return [items[sequence] for sequence in sorted(items) if not wanted or sequence in wanted]


async def show_all(nc: Client) -> None:
    """Print the dead letters."""
    items = await select(nc, await read_advisories(nc, options.dlq_stream, options.original_stream))
    if not options.json:
        print(ROW.format("SEQUENCE", "SUBJECT", "PUBLISHED", "DIED", "DELIVERIES", "ID", "PAYLOAD"))
    async for item, order, why in verify_dead(nc, Durables(nc, options.original_stream), items):
        if order and not why:
            show(item, order)


async def verify(nc: Client, claims: Claims, items: list[Item]) -> list[tuple[Item, StoredMessage]]:
    """Return the items that are dead letters, with their orders, and remove the advisories of orders that are gone."""
    dead: list[tuple[Item, StoredMessage]] = []
    outdated: list[int] = []
    async for item, order, why in verify_dead(nc, Durables(nc, options.original_stream), items):
        if order and not why:
            dead.append((item, order))
        elif not options.all:
            skip(item.dead_letter.sequence, f"it {why}")
        if not order:
            outdated.extend(item.advisories)
    await claims.remove(outdated)
    return dead


async def handle_batch(nc: Client, claims: Claims, items: list[Item]) -> None:
    """Redrive or discard some dead letters."""

    async def handle(item: Item, order: StoredMessage) -> None:
        if not claims.are_valid():
            skip(order.sequence, "its claim has expired, and a DLQ processor takes care of it")
            return
        try:
            if options.command == "retry":
                await redrive(nc, item.dead_letter, order)
            else:
                await discard(nc, item, order, claims)
        except (Error, TimeoutError) as error:
            skip(order.sequence, describe_error(error))
            await claims.release(item)
        else:
            tally["done"] += 1
            done.extend(item.advisories)

    done: list[int] = []
    dead = [item for item, _ in await verify(nc, claims, items)]
    claimed = await claims.claim(dead, {REDRIVE_HEADER: "1"} if options.command == "retry" else {})
    for item, claim in zip(dead, claimed, strict=True):
        if not claim:
            skip(item.dead_letter.sequence, "a DLQ processor has it in flight")
    # Some may have been done before they were claimed.
    ours = await verify(nc, claims, [claim for claim in claimed if claim])
    await gather_some([partial(handle, item, order) for item, order in ours])
    await claims.remove(done)


async def handle_all(nc: Client) -> None:
    """Redrive or discard the dead letters."""
    claims = Claims(nc, options.dlq_stream, DURABLE, options.original_stream)
    items = await select(nc, await claims.start())
    shutdown = asyncio.Event()
    with shutdown_on_signal(shutdown, lambda: "the dead letters in flight"):
        while items and not shutdown.is_set():
            batch, items = items[:BATCH], items[BATCH:]
            await handle_batch(nc, claims, batch)
    tally["skipped"] += len(items)
    what = "redriven" if options.command == "retry" else "discarded"
    log.info("%d dead letters %s, %d skipped", tally["done"], what, tally["skipped"])


async def run() -> int:
    """Carry out the command, and return the exit status: 1 if it isn't carried out for all."""
    stream, dlq_stream = options.original_stream, options.dlq_stream
    if sys.stdout is None:
        raise Failure("standard output is closed, where the dead letters would be printed")
    async with connect_script(f"manage_{stream}") as nc:
        await require_streams(nc, dlq_stream, stream)
        try:
            await (show_all(nc) if options.command == "list" else handle_all(nc))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads the list has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (Error, TimeoutError) as error:
            raise Failure(f"{options.command} has not finished: {describe_error(error)}; run it again") from None
    return 1 if tally["skipped"] else 0


def main() -> None:
    """Run the command."""
    parse_args()
    confirm()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
