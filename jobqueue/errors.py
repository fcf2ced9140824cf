"""Errors: which of them are transient, and how people read them, in one printable line each."""

import os
import re
import socket
import ssl
import traceback

from nats.errors import ConnectionReconnectingError, Error, NoRespondersError, OutboundBufferLimitError
from nats.js.errors import APIError, NoStreamResponseError, ServerError, ServiceUnavailableError

# The server, the leader or the connection is away, and will be back.
TRANSIENT_ERRORS = (
    *(TimeoutError, NoRespondersError, NoStreamResponseError, ConnectionReconnectingError),
    *(OutboundBufferLimitError, ServiceUnavailableError, ServerError),
)
# JetStream's error codes for a full stream and for a durable that can't be so; as a 503 and a 500 they look transient.
PERMANENT_CODES = (10077, 10012)
NO_JETSTREAM_CODES = (10035, 10039, 10076)
MAX_PRINTED = 200  # characters of a payload in a log line
MAX_TRACEBACK = 100  # lines
UNKNOWN_AUTHORITY = (18, 19, 20, 21)  # https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/


class Failure(Exception):  # noqa: N818  users read its text, not its name
    """An error to show as one line; a script then exits with status 1.

    Example:
        try:
            asyncio.run(main())
        except Failure as failure:
            sys.exit(str(failure))  # one line on standard error, and exit status 1
    """


def printable(data: bytes | str, length: int = MAX_PRINTED) -> str:
    """Return text from outside as one harmless piece of a line: escaped, and cut where it is longer than `length`."""
    shown = data[: 4 * length]  # no character takes more than four bytes
    if isinstance(shown, bytes):
        shown = shown.decode("utf-8", "backslashreplace")
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    if len(shown) > length or len(data) > 4 * length:
        shown = f"{shown[:length]}... ({len(data)} in all)"
    return shown


def describe_error(error: BaseException) -> str:
    """Return in one printable line what an error says."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    try:
        message = str(error).removeprefix("nats: ")
    except BaseException:  # a user's own exception may raise anything here
        message = ""
    if isinstance(error, APIError) and error.description:
        message = f"{error.description} ({error.err_code})"
    elif isinstance(error, ServiceUnavailableError):
        message = "no responders"
    elif isinstance(error, ConnectionReconnectingError):
        message = "not connected to the server"
    elif isinstance(error, TimeoutError) and message in ("", "timeout"):
        message = "timed out"
    elif failed := re.search(r"\[Errno (\d+)\] Connect", message):
        message = os.strerror(int(failed[1]))  # asyncio's own text names every address that it tried
    elif isinstance(error, ssl.SSLCertVerificationError):
        message = f"its certificate is not trusted: {error.verify_message}"
        if error.verify_code in UNKNOWN_AUTHORITY:
            message += " (SSL_CERT_FILE may name its authority)"
    elif isinstance(error, socket.gaierror):
        message = str(error.strerror)
    elif not (isinstance(error, Error) and message):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return printable(message)


def describe_failure(error: BaseException, attempt: int, max_deliver: int, sequence: int) -> str:
    """Return what a user's own exception says, and its traceback, each line of which is printable and indented.

    Args:
        error: the exception, as `TimeLimit.run` returns it.
        attempt: the number of the attempt, from 1.
        max_deliver: how many attempts there are before the message is a dead letter.
        sequence: the message's stream sequence.
    """
    limit = f" of {max_deliver}" if attempt <= max_deliver else ""
    lines = [f"{describe_error(error)} (attempt {attempt}{limit}, stream sequence # {sequence})"]
    if error.__traceback__:  # its first entry is TimeLimit.run
        own = traceback.format_exception(type(error), error, error.__traceback__.tb_next)
        shown = "".join(own).splitlines()
        if len(shown) > MAX_TRACEBACK:
            shown[MAX_TRACEBACK // 2 : -MAX_TRACEBACK // 2] = ["..."]
        lines += [f"  {printable(line)}" for line in shown]
    return "\n".join(lines)
