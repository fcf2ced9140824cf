"""Errors: which of them are transient, and how people read them, in one printable line each."""

import os
import re
import socket
import ssl
import sysconfig
from pathlib import Path
from traceback import TracebackException

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
# Folders of installed libraries and of Python itself.
LIBRARIES = (sysconfig.get_path("stdlib"), "site-packages", "dist-packages", str(Path(__file__).parent))
MAX_RETRY_AFTER = 86400.0  # seconds; whoever looks for dead letters without an advisory waits for as long
UNKNOWN_AUTHORITY = (18, 19, 20, 21)  # https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/


class Failure(Exception):  # noqa: N818  users read its text, not its name
    """An error to show as one line; a script then exits with status 1.

    Example:
        try:
            asyncio.run(main())
        except Failure as failure:
            sys.exit(str(failure))  # one line on standard error, and exit status 1
    """


class Retry(Exception):  # noqa: N818
    """Raised by a user's work: the message failed as it may. It is tried again, and the log shows no traceback.

    It counts as an attempt: after the last one the message is a dead letter.

    Args:
        reason: for the log and for `list`.
        delay: seconds until the next attempt, up to a day; by default the back-off.

    Example:
        async def process(order):
            if is_busy():
                raise Retry("busy", delay=random.uniform(20, 40))  # jitter: not all of them at the same time
    """

    delay: float | None = None

    def __init__(self, reason: str = "", delay: float | None = None) -> None:
        super().__init__(reason)
        if delay is not None and not 0 <= delay <= MAX_RETRY_AFTER:
            raise ValueError(f"a delay is 0 to {MAX_RETRY_AFTER:g} seconds, not {delay!r}")
        self.delay = None if delay is None else float(delay)


class Dead(Exception):  # noqa: N818
    """Raised by a user's work: no further attempt makes sense. The message is a dead letter at once.

    Raised by `reprocess`, it discards the dead letter; the log shows all that was known of it.

    Args:
        reason: for the log and for `list`.

    Example:
        async def process(order):
            if not order.data:
                raise Dead("it is empty")
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


def printable(data: bytes | str, length: int = MAX_PRINTED) -> str:
    """Return text from outside as one harmless piece of a line: escaped, and cut where it is longer than `length`.

    Example:
        print(printable(bytes([27]) + b"[2J clears a terminal"))
    """
    shown = data[: 4 * length]  # no character takes more than four bytes
    if isinstance(shown, bytes):
        shown = shown.decode("utf-8", "backslashreplace")
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    if len(shown) > length or len(data) > 4 * length:
        shown = f"{shown[:length]}... ({len(data)} in all)"
    return shown


def list_errors(error: BaseException) -> list[BaseException]:
    """Return the errors of a group, and of the groups in it; any other error alone."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [one for some in error.exceptions for one in list_errors(some)]


def describe_error(error: BaseException) -> str:
    """Return in one printable line what an error says."""
    error = list_errors(error)[0]
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
            message += " (NATS_CA may name its authority)"
    elif isinstance(error, socket.gaierror):
        message = str(error.strerror)
    elif not (isinstance(error, Error | Failure | Retry | Dead) and message):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return printable(message)


def describe_attempt(error: BaseException, attempt: int, max_deliver: int, sequence: int) -> str:
    """Return what follows "error processing order-1" in the log: why, and the traceback of a user's own exception.

    `max_deliver` is 0 where the message never becomes a dead letter.
    """
    if isinstance(error, Retry) and not str(error):
        return ""
    limit = f" of {max_deliver}" if attempt <= max_deliver else ""
    lines = [f": {describe_error(error)} (attempt {attempt}{limit}, stream sequence # {sequence})"]
    if not isinstance(error, Retry | Dead):
        lines += [f"  {printable(line)}" for line in _format_traceback(error)]
    return "\n".join(lines)


def _format_traceback(error: BaseException) -> list[str]:
    """Return the lines of a traceback, without those of installed libraries: a time-out of httpx has 60 of them."""
    first = TracebackException.from_exception(error, compact=True)
    shown: TracebackException | None = first
    while shown:
        own = [frame for frame in shown.stack if not any(folder in frame.filename for folder in LIBRARIES)]
        if own or shown is not first:  # else the user's own code is installed, too
            shown.stack[:] = own
        shown = shown.__cause__ or shown.__context__
    lines = "".join(first.format()).splitlines()
    if len(lines) > MAX_TRACEBACK:
        lines[MAX_TRACEBACK // 2 : -MAX_TRACEBACK // 2] = ["..."]
    return lines
