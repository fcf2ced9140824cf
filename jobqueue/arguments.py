"""The command line: the parser that all scripts share, and the types of their arguments."""

import argparse
import math
from collections.abc import Callable
from typing import TypeGuard

from jobqueue.errors import printable

EPILOG = """
environment:
  NATS_URL                    one URL, or several with commas between them (default: nats://localhost:4222)
  NATS_CREDENTIALS_FILE_PATH  a .creds file; with it alone the server is tls://connect.ngs.global
  SSL_CERT_FILE               the authority of the server's certificate, if it isn't one of the well-known ones

exit status:
  0  publisher: every order is stored; consumers: a graceful shutdown (SIGINT, SIGTERM) has finished
  1  any other error; a line says which
  2  wrong usage
"""


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a script's parser, whose help is the script's docstring and what all scripts share."""
    description, _, examples = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog=examples.replace("Usage:", "examples:") + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def subject(value: str) -> str:
    """Check a subject to publish to."""
    if not _is_subject(value) or "*" in value or ">" in value:
        raise argparse.ArgumentTypeError(f"'{printable(value)}' is no subject to publish to, such as orders.new")
    return value


def subject_filter(value: str) -> str:
    """Check a subject that may have wildcards."""
    *first, last = value.split(".")
    if not _is_subject(value) or any(
        set(token) & set("*>") and token not in wildcards
        for tokens, wildcards in ((first, ("*",)), ([last], ("*", ">")))
        for token in tokens
    ):
        raise argparse.ArgumentTypeError(f"'{printable(value)}' is no subject filter, such as orders.*")
    return value


def stream_name(value: str) -> str:
    """Check a stream's name."""
    if not is_name(value):
        raise argparse.ArgumentTypeError(f"'{printable(value)}' is no name of a stream")
    return value


def is_name(value: object) -> TypeGuard[str]:
    """Return whether a value can be the name of a stream or a consumer, by the server's rules."""
    return isinstance(value, str) and _is_subject(value) and len(value) <= 255 and not set(value) & set(".*>/\\")


def whole_number(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return a check of a whole number from `low` to `high`."""

    def check(value: str) -> int:
        # int() refuses more than some thousand digits.
        if not value.isdecimal() or len(value) > 18 or not low <= int(value) <= high:
            raise argparse.ArgumentTypeError(f"'{printable(value)}' is no whole number {_range(low, high)}")
        return int(value)

    return check


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return a check of a finite number from `low` to `high`."""

    def check(value: str) -> float:
        try:
            checked = float(value)
        except ValueError:
            checked = math.nan
        if not (low <= checked <= high and math.isfinite(checked)):
            raise argparse.ArgumentTypeError(f"'{printable(value)}' is no number {_range(low, high)}")
        return checked

    return check


def _is_subject(value: str) -> bool:
    return value.isprintable() and " " not in value and all(value.split("."))


def _range(low: float, high: float) -> str:
    return f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
