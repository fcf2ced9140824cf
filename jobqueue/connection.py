"""A connection to NATS: the first connect succeeds or fails soon, what is lost later is waited out."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from nats.errors import Error
from nats.js.errors import ServiceUnavailableError
from nats.protocol.parser import PERMISSIONS_ERR

from jobqueue.client import Client, ProgramClient, ScriptClient
from jobqueue.environment import read_environment
from jobqueue.errors import Failure, describe_error

log = logging.getLogger(__name__)
# asyncio warns of that whenever a TLS connection ends, whatever nats-py does.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in str(record.msg))

CONNECT_TIMEOUT = 10.0  # seconds until the first connect has succeeded or failed
REFUSED_SUBJECT = re.compile(r'for (?:publish|subscription) to "([^"]*)"')
CLOSE_TIMEOUT = 2.0  # seconds for what is still to be sent when a script ends

OPTIONS: dict[str, Any] = {
    "connect_timeout": 4,  # seconds for each step of one attempt
    "max_reconnect_attempts": -1,
    "reconnect_time_wait": 0.5,  # seconds; well below an ack wait, so that orders in flight stay that
    "ping_interval": 10,  # seconds; with two pings a dead connection is noticed within 30
    "max_outstanding_pings": 2,
}


class _Events:
    """What happens to a connection: logged, or raised where it ends the first connect."""

    def __init__(self, servers: list[str], on_refused: Callable[[str, str], None]) -> None:
        self.refusal = ""  # why the server last ended the connection
        self.is_connecting = True
        self.is_open = False
        self._servers = servers
        self._on_refused = on_refused
        self._failed_attempts = 0

    async def on_error(self, error: Exception) -> None:
        why = describe_error(error)
        if PERMISSIONS_ERR in str(error):
            subject = found[1] if (found := REFUSED_SUBJECT.search(why)) else ""
            self._on_refused(subject, why)
            return
        if str(error).startswith("nats: '") and why != self.refusal:  # the server's own words are in quotes
            self.refusal = why
            if self.is_open:
                log.warning("the server refused the connection: %s", why)
        elif self.is_open and not isinstance(error, Error | OSError | TimeoutError):
            log.error("%s", why)  # a mistake of ours in a subscription's callback
        if self.is_connecting:
            self._failed_attempts += 1
            if self.refusal or self._failed_attempts >= len(self._servers):
                # nats-py would try again for ever, with a wrong password too.
                why = why.strip("'")
                hint = " (are the credentials wrong, expired or revoked?)" if why.lower().startswith("auth") else ""
                raise Failure(f"cannot connect to {', '.join(self._servers)}: {why}{hint}")

    async def on_disconnected(self) -> None:
        if self.is_open:
            log.warning("connection lost; reconnecting")

    async def on_reconnected(self) -> None:
        self.refusal = ""
        log.info("connected again")


@asynccontextmanager
async def connect(name: str) -> AsyncIterator[Client]:
    """Connect to NATS, yield nats-py's client, and close it.

    Where to and as whom come from the environment: `NATS_URL` (one URL, or several with commas) and
    `NATS_CREDENTIALS_FILE_PATH` (a .creds file); with the file alone it is Synadia Cloud, with neither
    nats://localhost:4222. `SSL_CERT_FILE` names the authority of a server whose certificate isn't signed by a
    well-known one.

    A connection that is lost later reconnects by itself, however long that takes. A request to a subject that the
    server doesn't permit fails with `nats.errors.Error`; a refused subscription, or a publish that isn't a request, is
    logged.

    Args:
        name: the connection's name, as the server's monitoring shows it. Its inboxes are `_INBOX.<name>.>`, with `_`
            for all but ASCII letters, digits and `-`, so that a user may be permitted to read just these.

    Raises:
        Failure: the first connect failed, which takes ten seconds at the most, or there is no JetStream.

    Example:
        async with connect("shop") as nc:
            print(nc.connected_url.netloc)
    """
    nc = ProgramClient()

    def log_refusal(subject: str, why: str) -> None:
        if not nc.fail_requests(subject, why) and subject not in nc.refused:
            log.warning("the server refused: %s", why)
        nc.refused[subject] = why

    async with _opened(nc, name, log_refusal):
        yield nc


@asynccontextmanager
async def connect_script(name: str) -> AsyncIterator[Client]:
    """Do as `connect`, but let the first subject that the server refuses end the block.

    What a script needs and may not do would time out again and again.

    Raises:
        Failure: as `connect`, or the server refused a subject.
    """
    task = asyncio.current_task()
    assert task
    cancelling = task.cancelling()
    nc = ScriptClient()

    def end_block(subject: str, why: str) -> None:
        if not nc.refused:
            task.cancel()
        nc.refused[subject] = why

    try:
        async with _opened(nc, name, end_block):
            yield nc
    except asyncio.CancelledError:
        if not nc.refused or task.uncancel() > cancelling:
            raise
        # nats-py has made lower case of the server's own words.
        why = next(iter(nc.refused.values()))
        raise Failure(f'the server refused: {why} (in lower case; see "Permissions" in docs/deployment.md)') from None


@asynccontextmanager
async def _opened(nc: Client, name: str, on_refused: Callable[[str, str], None]) -> AsyncIterator[None]:
    servers, options = read_environment()
    events = _Events(servers, on_refused)
    try:
        await _connect_first(nc, events, name, servers, options)
        yield
    finally:
        events.is_open = False
        with suppress(Exception):
            await asyncio.wait_for(nc.close(), CLOSE_TIMEOUT)


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
            await nc.jetstream().account_info()
    except ServiceUnavailableError:
        raise Failure(f"{', '.join(servers)} has no JetStream, or none for this account") from None
    except (TimeoutError, Error) as error:
        raise Failure(f"cannot connect to {', '.join(servers)}: {events.refusal or describe_error(error)}") from None
    events.is_open = True
