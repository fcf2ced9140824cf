"""Show the state of a queue; list dead letters, redrive them (publish them again, for fresh attempts), or discard them.

Usage:
    python dlq/manage.py orders_unprocessed orders_stream status
    python dlq/manage.py orders_unprocessed orders_stream list
    python dlq/manage.py orders_unprocessed orders_stream retry 17 23
    python dlq/manage.py orders_unprocessed orders_stream discard --all
"""

import os
import signal

for signum in (signal.SIGINT, signal.SIGTERM):  # Until `start`. As process 1, Linux ignores what has no handler.
    signal.signal(signum, lambda signum, _: os._exit(128 + signum))

import argparse
import asyncio
import json
import logging
import sys
from datetime import datetime

from nats.errors import Error

from jobqueue.connection.client import Client
from jobqueue.connection.connecting import connect_script
from jobqueue.dead_letters.advisories import require_streams
from jobqueue.dead_letters.counting import read_status
from jobqueue.dead_letters.headers import find_header
from jobqueue.dead_letters.inventory import as_json, find_candidates, read_dead_letters
from jobqueue.dead_letters.operating import Operation
from jobqueue.dead_letters.verifying import DeadLetter, Verifier
from jobqueue.errors import Failure, describe_error, printable
from jobqueue.script.arguments import make_parser, stream_name, whole_number
from jobqueue.script.running import shutdown_on_signal, start

log = logging.getLogger("manage")

DURABLE = "unprocessed_order_handler"  # of dlq/consumer.py
ROW = "{:>9}  {:<20}  {:<19}  {:<19}  {:>10}  {:<36}  {}"

options = argparse.Namespace()


def parse_args() -> None:
    """Read the command line's arguments into `options`."""
    parser = make_parser(__doc__, "the command has been carried out for all")
    parser.add_argument("dlq_stream", type=stream_name, help="where the advisories are, such as orders_unprocessed")
    parser.add_argument("original_stream", type=stream_name, help="where the orders are, such as orders_stream")
    commands = parser.add_subparsers(dest="command", required=True, metavar="status|list|retry|discard")
    status = commands.add_parser("status", help="show how many orders wait, are pending, and are dead")
    status.add_argument("--json", action="store_true", help="one JSON object")
    listing = commands.add_parser("list", help="show all dead letters")
    listing.add_argument("--json", action="store_true", help="one JSON object per line, with headers and whole payload")
    retrying = commands.add_parser("retry", help="redrive: publish dead letters again, for fresh attempts")
    discarding = commands.add_parser("discard", help="print dead letters, then remove them")
    for command in (retrying, discarding):
        command.add_argument("sequences", nargs="*", type=whole_number(1), metavar="SEQUENCE", help="shown by `list`")
        command.add_argument("--all", action="store_true", help="all dead letters")
    discarding.add_argument("--yes", action="store_true", help="don't ask for confirmation of --all")
    parser.parse_args(namespace=options)
    if options.command in ("status", "list"):
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


def show(letter: DeadLetter) -> None:
    """Print one dead letter."""
    if options.json:
        print(json.dumps(as_json(letter)))
        return
    message = letter.message
    published, died = (str(datetime.fromtimestamp(ns // 10**9)) for ns in (message.stored_at, letter.died_at))
    columns = (
        *(message.sequence, printable(message.subject), published, died if letter.died_at else "without advisory"),
        *(letter.deliveries, printable(find_header(message.header_block, "Nats-Msg-Id"))),
    )
    print(ROW.format(*columns, printable(message.data, 60)))


async def show_all(nc: Client) -> None:
    """Print the dead letters."""
    if not options.json:
        print(ROW.format("SEQUENCE", "SUBJECT", "PUBLISHED", "DIED", "DELIVERIES", "ID", "PAYLOAD"))
    verifier = Verifier(nc, options.original_stream)
    await verifier.pending.start(options.original_stream)
    candidates, _ = await find_candidates(nc, options.dlq_stream, verifier, set())
    async for letter in read_dead_letters(nc, verifier, candidates):
        show(letter)


async def show_status(nc: Client) -> None:
    """Print the state of the queue."""
    status = await read_status(nc, options.dlq_stream, options.original_stream)
    if options.json:
        print(json.dumps(status))
        return
    for field, value in status.items():
        if field != "streams":
            print(f"{field.replace('_', ' '):<15}{printable(', '.join(value) if field == 'paused' else str(value))}")
    for name, stream in status["streams"].items():
        print(f"{name}: {stream['messages']} messages, {stream['bytes']} bytes, {stream['full']:.1%} full")


def print_first(letter: DeadLetter) -> None:
    """Print a dead letter before it is discarded, or raise an error."""
    try:
        print(json.dumps(as_json(letter)), flush=True)
    except OSError as error:  # nobody reads any more, or the disk is full
        raise Error(f"it could not be printed: {error.strerror}") from None


async def handle_all(nc: Client) -> int:
    """Redrive or discard dead letters, and return how many are skipped."""
    shutdown = asyncio.Event()
    show_first = print_first if options.command == "discard" else None
    operation = Operation(nc, options.dlq_stream, DURABLE, options.original_stream, show_first, shutdown)
    with shutdown_on_signal(shutdown, lambda: "the dead letters in flight"):
        await operation.run(set(options.sequences))
    what, tally = "redriven" if options.command == "retry" else "discarded", operation.tally
    log.info("%d dead letters %s, %d skipped", tally["done"], what, tally["skipped"])
    return tally["skipped"]


async def run() -> int:
    """Carry out the command, and return the exit status: 1 if it isn't carried out for all."""
    if sys.stdout is None:
        raise Failure("standard output is closed, where the dead letters would be printed")
    skipped = 0
    async with connect_script(f"manage_{options.original_stream}") as nc:
        await require_streams(nc, options.dlq_stream, options.original_stream)
        try:
            if options.command == "status":
                await show_status(nc)
            elif options.command == "list":
                await show_all(nc)
            else:
                skipped = await handle_all(nc)
            sys.stdout.flush()
        except (Error, TimeoutError) as error:
            raise Failure(f"{options.command} has not finished: {describe_error(error)}; run it again") from None
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
            if not isinstance(error, BrokenPipeError):  # then whoever reads the list has seen enough
                raise Failure(f"cannot print: {error.strerror}") from None
    return 1 if skipped else 0


def main() -> None:
    """Run the command."""
    parse_args()
    confirm()
    sys.exit(start(run(), log))


if __name__ == "__main__":
    main()
