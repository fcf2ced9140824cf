"""What a script needs around its coroutine: arguments, log lines, signals and the exit status."""

import argparse
import asyncio
import logging
import math
import os
import re
import signal
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TypeGuard

from nats.errors import Error as NatsError
from nats.js.errors import APIError, ServiceUnavailableError

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

log = logging.getLogger(__name__)

EPILOG = """
environment:
  NATS_URL                    one URL, or several with commas between them (default: nats://localhost:4222)
  NATS_CREDENTIALS_FILE_PATH  a .creds file; with it alone the server is tls://connect.ngs.global
  SSL_CERT_FILE               the authority of the server's certificate, if it isn't one of the well-known ones

exit status:
  0  publisher: every order is stored; consumers: told to stop (SIGINT, SIGTERM), and what was held is finished
  1  anything else, and a line says what
  2  wrong usage
"""
LONGEST_TEXT = 200  # characters of a payload in a log line
UNKNOWN_AUTHORITY = (18, 19, 20, 21)  # https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/


class Failure(Exception):  # noqa: N818  it is what the user reads, not a kind of error
    """What ends a script with exit status 1; its text is the one line that the user reads."""


def start(run: Coroutine[None, None, int]) -> int:
    """Run a script's coroutine and return the exit status: its own, or 1 after one line that says why.

    It runs on uvloop where that is installed (the extra `fast`). Logs go to standard error, in the article's format.
    """
    # Whoever is given the number of a closed one, the event loop say, would be taken for it.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%Y/%m/%d %H:%M:%S", level=logging.INFO)
    # Of each line's origin only the time is shown, so nothing else is looked up: that is a fifth of what a line costs
    # (https://docs.python.org/3/howto/logging.html#optimization).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # nats-py and asyncio log tracebacks there; what matters of them reaches us through callbacks.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Until stop_on_signal() takes over nothing is held: end at once, without a KeyboardInterrupt's traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    async def to_its_end() -> int:
        try:
            return await run
        except Failure as failure:  # told at once: a thread that is still at work holds up the end of the event loop
            log.error("%s", failure)
            return 1

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(to_its_end())
    except BaseException as error:  # what a user's own task raised may end the event loop
        log.error("%s", reason(error))
    return 1


@contextmanager
def stop_on_signal() -> Iterator[asyncio.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    def first(signum: signal.Signals) -> None:
        restore()
        log.info("%s: finishing what is held (a second signal ends it at once)", signum.name)
        stop.set()

    def restore() -> None:
        for signum in signals:
            loop.remove_signal_handler(signum)
            signal.signal(signum, signal.SIG_DFL)

    for signum in signals:
        loop.add_signal_handler(signum, first, signum)
    try:
        yield stop
    finally:
        restore()


def text(data: bytes | str) -> str:
    """Return what came from outside as one harmless piece of a log line: escaped, and cut when long."""
    shown = data[: 4 * LONGEST_TEXT]  # no character takes more than four bytes
    if isinstance(shown, bytes):
        shown = shown.decode("utf-8", "backslashreplace")
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    if len(shown) > LONGEST_TEXT or len(data) > 4 * LONGEST_TEXT:
        shown = f"{shown[:LONGEST_TEXT]}... ({len(data)} in all)"
    return shown


def reason(error: BaseException) -> str:
    """Return in one line what an error says, for people."""
    try:
        message = str(error).removeprefix("nats: ")
    except BaseException:  # it may be a user's, and anything
        message = ""
    if isinstance(error, APIError) and error.description:
        message = f"{error.description} ({error.err_code})"
    elif isinstance(error, ServiceUnavailableError):
        message = "no responders"
    elif isinstance(error, TimeoutError) and message in ("", "timeout"):
        message = "no answer in time"
    elif failed := re.search(r"\[Errno (\d+)\] Connect", message):
        message = os.strerror(int(failed[1]))  # asyncio's own text names every address that it tried
    elif isinstance(error, ssl.SSLCertVerificationError):
        message = f"its certificate is not trusted: {error.verify_message}"
        if error.verify_code in UNKNOWN_AUTHORITY:
            message += " (SSL_CERT_FILE may name its authority)"
    elif isinstance(error, socket.gaierror):
        message = str(error.strerror)
    elif not (isinstance(error, NatsError) and message):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return text(message)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a script's arguments, whose help has the script's docstring and what all scripts share."""
    description, _, examples = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog=examples.replace("Usage:", "examples:") + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def subject(value: str) -> str:
    """Check an argument: a subject to publish to."""
    if not _is_subject(value) or "*" in value or ">" in value:
        raise argparse.ArgumentTypeError(f"'{text(value)}' is no subject to publish to, such as orders.new")
    return value


def subject_filter(value: str) -> str:
    """Check an argument: a subject that may have wildcards."""
    tokens = value.split(".")
    if (
        not _is_subject(value)
        or any("*" in token and token != "*" for token in tokens)
        or any(">" in token and token != ">" for token in tokens)
        or ">" in tokens[:-1]
    ):
        raise argparse.ArgumentTypeError(f"'{text(value)}' is no subject filter, such as orders.*")
    return value


def name(value: str) -> str:
    """Check an argument: a stream's name."""
    if not is_name(value):
        raise argparse.ArgumentTypeError(f"'{text(value)}' is no name of a stream")
    return value


def is_name(value: object) -> TypeGuard[str]:
    """Return whether a value can be the name of a stream or a consumer, by the server's rules."""
    return isinstance(value, str) and _is_subject(value) and len(value) <= 255 and not set(value) & set(".*>/\\")


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return a check of an argument: a whole number from `low` to `high`."""

    def check(value: str) -> int:
        # int() refuses more than some thousand digits.
        if not value.isdecimal() or len(value) > 18 or not low <= int(value) <= high:
            raise argparse.ArgumentTypeError(f"'{text(value)}' is no whole number {_range(low, high)}")
        return int(value)

    return check


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return a check of an argument: a finite number from `low` to `high`."""

    def check(value: str) -> float:
        try:
            checked = float(value)
        except ValueError:
            checked = math.nan
        if not (low <= checked <= high and math.isfinite(checked)):
            raise argparse.ArgumentTypeError(f"'{text(value)}' is no number {_range(low, high)}")
        return checked

    return check


def _is_subject(value: str) -> bool:
    return value.isprintable() and " " not in value and all(value.split("."))


def _range(low: float, high: float) -> str:
    return f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
