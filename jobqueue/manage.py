"""Show the state of a queue; list dead letters, redrive them (publish them again, for fresh attempts), or discard them.

Usage:
    python -m jobqueue.manage orders_unprocessed orders_stream status
    python -m jobqueue.manage orders_unprocessed orders_stream list
    python -m jobqueue.manage orders_unprocessed orders_stream retry 17 23
    python -m jobqueue.manage orders_unprocessed orders_stream discard --all
"""

import argparse
import json
import logging
import os
import sys
from datetime import datetime

from nats.errors import Error

from jobqueue.connection.client import Client
from jobqueue.connection.connecting import connect, run_until_refused
from jobqueue.dead_letters.advisories import require_streams
from jobqueue.dead_letters.counting import read_status
from jobqueue.dead_letters.headers import find_header
from jobqueue.dead_letters.inventory import find_candidates, read_dead_letters
from jobqueue.dead_letters.letter import DeadLetter
from jobqueue.dead_letters.operating import Operation
from jobqueue.dead_letters.verifying import Verifier
from jobqueue.errors import Failure, describe_error, printable
from jobqueue.jetstream.reasons import Reason, Reasons
from jobqueue.script.arguments import make_parser, stream_name, whole_number
from jobqueue.script.running import run
from jobqueue.worker.shutdown import shutdown_on_signal

log = logging.getLogger(__name__)

COLUMNS = {"SEQUENCE": ">9", "SUBJECT": "<20", "PUBLISHED": "<19", "DIED": "<19", "DELIVERIES": ">10", "ID": "<36"}
REASON_WIDTH = 40

options = argparse.Namespace()


def parse_args() -> None:
    """Read the command line's arguments into `options`."""
    parser = make_parser(__doc__, "the command has been carried out for all")
    parser.add_argument("dlq_stream", type=stream_name, help="where the advisories are, such as orders_unprocessed")
    parser.add_argument("original_stream", type=stream_name, help="where the orders are, such as orders_stream")
    parser.add_argument(
        "--durable",
        type=stream_name,
        default="unprocessed_order_handler",
        help="the durable that the DLQ processors share (default: %(default)s)",
    )
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


def show_row(*cells: object, reason: str | None, payload: str) -> None:
    """Print a row of the list; without a stream of reasons it has no column for them."""
    row = [f"{cell:{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)]
    row += [f"{reason:<{REASON_WIDTH}}"] if reason is not None else []
    print("  ".join([*row, payload]))


def _shorten(reason: str) -> str:
    return reason if len(reason) <= REASON_WIDTH else f"{reason[: REASON_WIDTH - 3]}..."


def show(letter: DeadLetter, reason: Reason | None, *, has_reasons: bool) -> None:
    """Print one dead letter."""
    if options.json:
        print(json.dumps(letter.as_json(reason)))
        return
    message = letter.message
    published, died = (str(datetime.fromtimestamp(ns // 10**9)) for ns in (message.stored_at, letter.died_at))
    show_row(
        *(message.sequence, printable(message.subject), published, died if letter.died_at else "without advisory"),
        *(letter.deliveries, printable(find_header(message.header_block, "Nats-Msg-Id"))),
        reason=_shorten(printable(reason.text if reason else "")) if has_reasons else None,
        payload=printable(message.data, 60),
    )


async def show_all(nc: Client, reasons: Reasons) -> None:
    """Print the dead letters."""
    if not options.json:
        show_row(*COLUMNS, reason="REASON" if reasons.are_kept else None, payload="PAYLOAD")
    verifier = Verifier(nc, options.original_stream)
    await verifier.pending.start(options.original_stream)
    candidates, _ = await find_candidates(nc, options.dlq_stream, verifier, set())
    async for letter in read_dead_letters(nc, verifier, candidates):
        reason = await reasons.read(letter.message.sequence, letter.message.stored_at)
        show(letter, reason, has_reasons=reasons.are_kept)


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


async def handle_all(nc: Client, reasons: Reasons) -> None:
    """Redrive or discard dead letters; fail if some of them are skipped."""

    async def print_first(letter: DeadLetter) -> None:
        reason = await reasons.read(letter.message.sequence, letter.message.stored_at)
        try:
            print(json.dumps(letter.as_json(reason)), flush=True)
        except OSError as error:  # nobody reads any more, or the disk is full
            raise Error(f"it could not be printed: {error.strerror}") from None

    with shutdown_on_signal(lambda: "the dead letters in flight") as shutdown:
        names = options.dlq_stream, options.durable, options.original_stream
        first = print_first if options.command == "discard" else None
        operation = Operation(nc, *names, reasons, shutdown, first)
        await operation.run(set(options.sequences))
    what, tally = "redriven" if options.command == "retry" else "discarded", operation.tally
    summary = f"{tally['done']} dead letters {what}, {tally['skipped']} skipped"
    if tally["skipped"]:
        raise Failure(summary)
    log.info("%s", summary)


async def carry_out(nc: Client) -> None:
    """Carry out the command."""
    await require_streams(nc, options.dlq_stream, options.original_stream)
    try:
        if options.command == "status":
            await show_status(nc)
        else:
            reasons = await Reasons.find(nc, options.original_stream)
            await (show_all(nc, reasons) if options.command == "list" else handle_all(nc, reasons))
        sys.stdout.flush()
    except (Error, TimeoutError) as error:
        raise Failure(f"{options.command} has not finished: {describe_error(error)}; run it again") from None
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # then whoever reads the list has seen enough
            raise Failure(f"cannot print: {error.strerror}") from None
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python flushes it once more, and would end with exit status 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def main() -> None:
    """Connect, and carry out the command."""
    if sys.stdout is None:
        raise Failure("standard output is closed, where the dead letters would be printed")
    async with connect(f"manage_{options.original_stream}", no_echo=True) as nc:
        await run_until_refused(nc, carry_out(nc))


if __name__ == "__main__":
    parse_args()
    confirm()
    run(main())
