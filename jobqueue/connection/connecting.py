"""A connection to NATS: it is made or fails within ten seconds; if it is lost later, it reconnects for ever."""

import asyncio
import logging
import math
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from nats.errors import Error
from nats.js.errors import ServiceUnavailableError
from nats.protocol.parser import PERMISSIONS_ERR

from jobqueue.connection.client import Client
from jobqueue.connection.environment import read_environment
from jobqueue.connection.retrying import retry_at_start
from jobqueue.errors import NO_JETSTREAM_CODES, Failure, describe_error

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0  # seconds until the first connect has succeeded or failed
REFUSED_SUBJECT = re.compile(r'for (?:publish|subscription) to "([^"]*)"')
FIRST_REPORT, MAX_REPORT_INTERVAL = 5.0, 600.0  # seconds without a connection until the log says why, then longer ones
CLOSE_TIMEOUT = 2.0  # seconds for what is still to be sent when a connection is closed
TICK = 0.1  # seconds

T = TypeVar("T")

OPTIONS: dict[str, Any] = {
    "connect_timeout": 4,  # seconds for each step of one attempt
    "max_reconnect_attempts": -1,
    "reconnect_time_wait": 0.5,  # seconds; well below an ack wait, so that messages in flight are not redelivered
    "ping_interval": 10,  # seconds; with two pings a dead connection is noticed within 30
    "max_outstanding_pings": 2,
}


class _Events:
    """Logs a connection's events, or raises Failure if one ends the first connect."""

    def __init__(self, nc: Client, servers: list[str]) -> None:
        self.disconnect_reason = ""  # why the server last ended the connection
        self.is_connecting = True
        self.is_open = False
        self._nc = nc
        self._servers = servers
        self._failed_attempts = 0
        self._now = asyncio.get_running_loop().time
        self._report_at, self._report_interval = math.inf, 0.0  # when to log why there is no connection

    async def on_error(self, error: Exception) -> None:
        why = describe_error(error)
        if PERMISSIONS_ERR in str(error):
            subject = found[1] if (found := REFUSED_SUBJECT.search(str(error))) else ""
            if not self._nc.refuse(subject, why):
                log.warning("the server refused: %s", why)
            return
        if str(error).startswith("nats: '") and why != self.disconnect_reason:  # the server's own message
            self.disconnect_reason = why
            if self.is_open:
                log.warning("the server refused the connection: %s", why)
        elif self.is_open and not isinstance(error, Error | OSError | TimeoutError):
            log.error("a subscription's callback failed: %s", why, exc_info=error)
        elif self.is_open and self._now() >= self._report_at:
            self._report_interval = min(2 * self._report_interval, MAX_REPORT_INTERVAL)
            self._report_at = self._now() + self._report_interval
            log.warning("cannot reconnect yet: %s", why.strip("'"))
        if self.is_connecting:
            self._failed_attempts += 1
            if self.disconnect_reason or self._failed_attempts >= len(self._servers):
                # nats-py would try again for ever, with a wrong password too.
                why = why.strip("'")
                hint = " (are the credentials wrong, expired or revoked?)" if why.lower().startswith("auth") else ""
                raise Failure(f"cannot connect to {', '.join(self._servers)}: {why}{hint}")

    async def on_disconnected(self) -> None:
        if self.is_open:
            log.warning("connection lost; reconnecting")
        self._report_interval = FIRST_REPORT
        self._report_at = self._now() + FIRST_REPORT

    async def on_reconnected(self) -> None:
        self.disconnect_reason, self._report_at = "", math.inf
        log.info("connected again")


@asynccontextmanager
async def connect(name: str, *, no_echo: bool = False) -> AsyncIterator[Client]:
    """Connect to NATS, yield nats-py's client, and close it.

    The environment names the server and the user: `NATS_URL` (one URL, or several with commas) and
    `NATS_CREDENTIALS_FILE_PATH` (a .creds file); with the file alone it is Synadia Cloud, with neither
    nats://localhost:4222. `SSL_CERT_FILE` or `NATS_CA` is a CA certificate, if the server's CA isn't a public one;
    `NATS_CERT` and `NATS_KEY` are a client certificate and its key.

    A connection that is lost later reconnects by itself, however long that takes. A request to a subject that the
    server doesn't permit fails with `nats.errors.Error`; a refused subscription, or a publish that isn't a request, is
    logged.

    Args:
        name: the connection's name, as the server's monitoring shows it. Its inboxes are `_INBOX.<name>.>`, with `_`
            for all but ASCII letters, digits and `-`, so that a user may be permitted to read just these.
        no_echo: whether the connection's own subscriptions don't get what it publishes.

    Raises:
        Failure: the first connect failed, which takes ten seconds at the most, or there is no JetStream (half a minute
            if a cluster has no leader).

    Example:
        async with connect("shop") as nc:
            print(nc.connected_url.netloc)
    """
    nc = Client()
    servers, options = read_environment()
    events = _Events(nc, servers)
    try:
        await _connect_first(nc, events, name, servers, {**options, "no_echo": no_echo})
        yield nc
    finally:
        events.is_open = False
        try:
            await asyncio.wait_for(nc.close(), CLOSE_TIMEOUT)
        except Exception:
            nc.abort()


async def run_until_refused(nc: Client, work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns, but end it at the first subject that the server refuses.

    Otherwise it would be refused again and again.

    Raises:
        Failure: the server has refused a subject.
    """
    nc.ends_at_refusal = True
    working, refused = asyncio.create_task(work), asyncio.create_task(nc.has_refused.wait())
    try:
        await asyncio.wait((working, refused), return_when=asyncio.FIRST_COMPLETED)
        _raise_if_refused(nc)
        return working.result()
    finally:
        refused.cancel()
        while not working.done():  # wait_for of Python 3.11 may swallow a cancellation
            working.cancel()
            await asyncio.wait((working,), timeout=TICK)


def _raise_if_refused(nc: Client) -> None:
    if nc.has_refused.is_set():
        # nats-py lower-cases the server's message.
        why = next(iter(nc.refused_subjects.values()), "a subject")
        raise Failure(f'the server refused: {why} (in lower case; see "Permissions" in docs/deployment.md)')


async def _connect_first(nc: Client, events: _Events, name: str, servers: list[str], options: dict[str, Any]) -> None:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await nc.connect(
                servers,
                name=name,
                inbox_prefix="_INBOX." + re.sub(r"[^\w-]", "_", name, flags=re.ASCII),
                error_cb=events.on_error,
                disconnected_cb=events.on_disconnected,
                reconnected_cb=events.on_reconnected,
                **OPTIONS,
                **options,
            )
            events.is_connecting = False
        await retry_at_start(nc.jetstream().account_info, f"JetStream at {', '.join(servers)}", _is_no_jetstream)
    except ServiceUnavailableError as error:
        if _is_no_jetstream(error):
            raise Failure(f"{', '.join(servers)} has no JetStream, or none for this account") from None
        raise Failure(f"JetStream at {', '.join(servers)}: {describe_error(error)}") from None
    except (TimeoutError, Error) as error:
        _raise_if_refused(nc)
        raise Failure(
            f"cannot connect to {', '.join(servers)}: {events.disconnect_reason or describe_error(error)}"
        ) from None
    events.is_open = True


def _is_no_jetstream(error: Exception) -> bool:
    """Return whether an error means more than that a cluster has no leader at the moment."""
    return isinstance(error, ServiceUnavailableError) and error.err_code in (None, *NO_JETSTREAM_CODES)
