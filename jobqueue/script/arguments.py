"""The command line: the parser that all scripts share, and the types of their arguments."""

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from jobqueue.errors import printable
from jobqueue.jetstream.streams import is_filter, is_literal, is_name

EPILOG = """
environment:
  NATS_URL                    one URL, or several with commas between them (default: nats://localhost:4222)
  NATS_CREDENTIALS_FILE_PATH  a .creds file; with it alone the server is tls://connect.ngs.global
  SSL_CERT_FILE, NATS_CA      a CA certificate, if the server's CA isn't a public one
  NATS_CERT, NATS_KEY         a client certificate and its key, if the server asks for one
  LIVENESS_FILE               a file to touch every five seconds, for a liveness probe

exit status:
  0  %s
  1  anything else; standard error says why
  2  wrong usage
"""
MAX_WHOLE_NUMBER = 10**18 - 1  # well below the server's largest sequence

T = TypeVar("T")


def make_parser(doc: str | None, success: str) -> argparse.ArgumentParser:
    """Return a script's parser.

    Args:
        doc: the script's docstring, which its help begins with.
        success: when its exit status is 0.

    Example:
        parser = make_parser("Send mails.", "all mails are sent")
    """
    description, _, examples = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=description,
        epilog=examples.replace("Usage:", "examples:") + EPILOG % success,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def subject(value: str) -> str:
    """Check a subject to publish to.

    Example:
        parser.add_argument("subject", type=subject)
    """
    return _check(value, str, is_literal, "subject to publish to, such as orders.new")


def subject_filter(value: str) -> str:
    """Check a subject that may have wildcards.

    Example:
        parser.add_argument("--filter", type=subject_filter)
    """
    return _check(value, str, is_filter, "subject filter, such as orders.*")


def stream_name(value: str) -> str:
    """Check a stream's name.

    Example:
        parser.add_argument("--stream", type=stream_name)
    """
    return _check(value, str, is_name, "name of a stream")


def whole_number(low: int, high: float = math.inf) -> Callable[[str], int]:
    """Return a check of a whole number from `low` to `high`.

    Example:
        parser.add_argument("--count", type=whole_number(1, 500), default=1)
    """
    limit = min(high, MAX_WHOLE_NUMBER)
    return lambda value: _check(value, int, lambda it: low <= it <= limit, f"whole number {_range(low, high)}")


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return a check of a finite number from `low` to `high`.

    Example:
        parser.add_argument("--interval", type=number(0), default=1.0)
    """
    return lambda value: _check(
        value, float, lambda it: low <= it <= high and it < math.inf, f"number {_range(low, high)}"
    )


def _range(low: float, high: float) -> str:
    return f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"


def _check(value: str, convert: Callable[[str], T], is_valid: Callable[[T], bool], what: str) -> T:
    with suppress(ValueError):
        if is_valid(converted := convert(value)):
            return converted
    raise argparse.ArgumentTypeError(f"'{printable(value)}' is not a {what}")
