"""A connection to NATS: the first connect succeeds or fails soon, what is lost later is waited out."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from nats.errors import Error
from nats.js.errors import ServiceUnavailableError
from nats.protocol.parser import PERMISSIONS_ERR

from jobqueue.client import Client
from jobqueue.environment import read_environment
from jobqueue.errors import Failure, describe_error

log = logging.getLogger(__name__)
# asyncio warns of that whenever a TLS connection ends, whatever nats-py does.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in str(record.msg))

CONNECT_TIMEOUT = 10.0  # seconds until the first connect has succeeded or failed
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

    def __init__(self, nc: Client, servers: list[str]) -> None:
        self.refusal = ""  # why the server last ended the connection
        self.is_connecting = True
        self.is_open = False
        self._nc = nc
        self._servers = servers
        self._failed_attempts = 0
        self._task = asyncio.current_task()

    async def on_error(self, error: Exception) -> None:
        why = describe_error(error)
        if PERMISSIONS_ERR in str(error):
            self._forbid(why)
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

    def _forbid(self, what: str) -> None:
        if self._task and self._task.done():  # the program goes on without the block of `connect`
            log.warning("the server refused: %s", what)
        elif self._task and not self._nc.forbidden:
            self._nc.forbidden = what
            self._task.cancel()


@asynccontextmanager
async def connect(name: str) -> AsyncIterator[Client]:
    """Connect to NATS, yield the client, and close it.

    Where to and as whom come from the environment: `NATS_URL` (one URL, or several with commas) and
    `NATS_CREDENTIALS_FILE_PATH` (a .creds file); with the file alone it is Synadia Cloud, with neither
    nats://localhost:4222. `SSL_CERT_FILE` names the authority of a server whose certificate isn't signed by a
    well-known one.

    Args:
        name: the connection's name, as the server's monitoring shows it. Its inboxes are `_INBOX.<name>.>`, with `_`
            for all but ASCII letters, digits and `-`, so that a user may be permitted to read just these.

    Raises:
        Failure: the first connect failed, which takes ten seconds at the most, or there is no JetStream. A connection
            that is lost later is waited for, however long that takes. When the server refuses a subject, the block is
            cancelled and this raised: what isn't permitted would time out again and again.
    """
    servers, options = read_environment()
    task = asyncio.current_task()
    assert task
    cancelling = task.cancelling()
    nc = Client()
    events = _Events(nc, servers)
    try:
        try:
            await _connect_first(nc, events, name, servers, options)
            yield nc
        finally:
            events.is_open = False
            with suppress(Exception):
                await asyncio.wait_for(nc.close(), CLOSE_TIMEOUT)
    except asyncio.CancelledError:
        if not nc.forbidden or task.uncancel() > cancelling:
            raise
        # nats-py has made lower case of the server's own words.
        raise Failure(f'the server refused: {nc.forbidden} (in lower case; see "Permissions" in the README)') from None


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
