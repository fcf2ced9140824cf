"""One connection for all three scripts: where to, who as, what to log, how to fail."""

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nkeys
from nats.aio.client import Client, RawCredentials
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.errors import Error, SecureConnWantedError
from nats.js.errors import ServiceUnavailableError
from nats.protocol.parser import PERMISSIONS_ERR

from jobqueue.script import Failure, reason, text

log = logging.getLogger(__name__)
# asyncio says so whenever a connection that became a TLS one ends, for nats-py is told of it in either way.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in str(record.msg))

LOCAL = "nats://localhost:4222"
SYNADIA_CLOUD = "tls://connect.ngs.global"
LONGEST_FILE = 64 * 1024  # characters of a credentials file
FIRST_CONNECT = 10.0  # seconds until the first connect has succeeded or failed
CLOSE = 2.0  # seconds for what is still to be sent when a script ends

OPTIONS: dict[str, Any] = {
    "connect_timeout": 4,  # seconds for each step of one attempt
    "max_reconnect_attempts": -1,
    "reconnect_time_wait": 0.5,  # seconds; well below an ack wait, so that held orders can stay held
    "ping_interval": 10,  # seconds; with two pings a dead connection is noticed within 30
    "max_outstanding_pings": 2,
}


class _Credentials(RawCredentials):
    """A .creds file in the form that nats-py reads (it hangs on a file without a JWT).

    Raises:
        Failure: it is no such file.

    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.renew()

    def renew(self) -> None:
        """Read the file anew."""
        try:
            with self._file.open(encoding="ascii") as file:
                content = file.read(LONGEST_FILE)
        except OSError as error:
            raise Failure(f"cannot read the credentials file {text(str(self._file))}: {error.strerror}") from None
        except UnicodeDecodeError:
            content = ""
        # As in nkeys for Go: the first two blocks between lines of dashes are the JWT and the seed.
        _, *blocks = re.split(r"^[ \t]*---.*---[ \t]*$", content, flags=re.MULTILINE)
        try:
            jwt, seed = (block.strip() for block in blocks[0:4:2])
            if not re.fullmatch(r"[\w.=-]+", jwt):
                raise ValueError
            nkeys.from_seed(bytearray(seed, "ascii")).wipe()
        except Exception:
            raise Failure(
                f"{text(str(self._file))} is not a credentials file: it needs a user JWT and its seed"
            ) from None
        self.data = (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )


class _Client(Client):
    """nats-py's client, made to hold where it doesn't: each method says how."""

    forbidden = ""  # what the server does not permit

    def _connect_command(self) -> bytes:
        """Use what the credentials file has by now, and insist on TLS for a `tls://` URL.

        nats-py leaves it to the server to ask for TLS; nats.go refuses as here (ErrSecureConnWanted).
        """
        assert self._current_server
        if self._current_server.uri.scheme == "tls" and not self._server_info.get("tls_required"):
            raise SecureConnWantedError
        if isinstance(self._user_credentials, _Credentials):
            with suppress(Failure):  # it may be about to be replaced
                self._user_credentials.renew()
        command: bytes = super()._connect_command()
        return command

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        """Be cancelled with all the rest when the server has refused a subject.

        `asyncio.wait_for` of Python 3.11 forgets that when the answer comes at the same time
        (https://github.com/python/cpython/issues/86296).
        """
        answer: Msg = await super().request(*args, **kwargs)
        if self.forbidden:
            raise asyncio.CancelledError
        return answer

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        """Take any subject that the server takes: nats-py stops reading for good at one that isn't UTF-8."""
        return Msg(self, subject.decode(errors="backslashreplace"), reply.decode(), data, headers, _sid=sid)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        """Take any headers that the server takes: nats-py stops reading for good at too short ones."""
        try:
            parsed: dict[str, str] | None = await super()._process_headers(headers)
        except Exception:
            return None
        return parsed

    async def _process_err(self, err_msg: str) -> None:
        """Reconnect when the server ends the connection: nats-py closes it for good, say when a user expires."""
        if PERMISSIONS_ERR in err_msg:
            await super()._process_err(err_msg)
            return
        error = Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _attempt_reconnect(self) -> None:
        """Drop what is unsent on a dead connection: nats-py waits until TCP gives up on it, or sends it much later."""
        self._pending = []
        self._pending_data_size = 0
        if isinstance(self._transport, TcpTransport) and self._transport._io_writer:
            self._transport._io_writer.transport.abort()
        await super()._attempt_reconnect()


@asynccontextmanager
async def connect(name: str) -> AsyncIterator[Client]:
    """Connect to NATS, yield the client, and close it.

    Where to and who as come from the environment: `NATS_URL` (one URL, or several with commas) and
    `NATS_CREDENTIALS_FILE_PATH` (a .creds file); with the file alone it is Synadia Cloud, with neither
    nats://localhost:4222. A server whose certificate isn't signed by a known authority is reached by
    naming that authority's file in `SSL_CERT_FILE`, as Python and natscli both read it.

    Args:
        name: the connection's name, as the server's monitoring shows it. Its inboxes are `_INBOX.<name>.>`, with `_`
            for all but ASCII letters, digits and `-`, so that a user may be permitted to read just these.

    Raises:
        Failure: the first connect failed, which takes ten seconds at the most, or the server has no
            JetStream. Whatever happens to the connection later is waited out, but for one thing: when the server
            refuses a subject the block is cancelled, since what isn't permitted would time out again and again.

    """
    servers, options = _destination()
    where = ", ".join(servers)
    phase = "connecting"  # then "checking", "open", "ended"
    failed_attempts = 0
    refusal = ""  # why the server last did not let us in
    task = asyncio.current_task()
    assert task
    cancelling = task.cancelling()

    nc = _Client()

    async def on_error(error: Exception) -> None:
        nonlocal failed_attempts, refusal
        if phase == "connecting":
            failed_attempts += 1
            refused = _is_refusal(error)
            if refused or failed_attempts >= len(servers):
                # nats-py would go on for ever, with a wrong password too.
                why = reason(error).strip("'")
                hint = " (are the credentials wrong, expired or revoked?)" if why.lower().startswith("auth") else ""
                raise Failure(f"cannot connect to {where}: {why}{hint}")
        elif phase != "ended" and PERMISSIONS_ERR in str(error):
            if task.done():  # nobody is left who would be told
                log.warning("the server refused: %s", reason(error))
            elif not nc.forbidden:
                nc.forbidden = reason(error)
                task.cancel()
        elif _is_refusal(error) and reason(error) != refusal:
            refusal = reason(error)
            if phase == "open":
                log.warning("the server refused the connection: %s", refusal)

    async def on_disconnected() -> None:
        if phase == "open":
            log.warning("connection lost; reconnecting")

    async def on_reconnected() -> None:
        nonlocal refusal
        refusal = ""
        log.info("connected again")

    async def sign_on() -> None:
        nonlocal phase
        try:
            async with asyncio.timeout(FIRST_CONNECT):
                await nc.connect(
                    servers,
                    name=name,
                    inbox_prefix="_INBOX." + re.sub(r"[^\w-]", "_", name, flags=re.ASCII),
                    error_cb=on_error,
                    disconnected_cb=on_disconnected,
                    reconnected_cb=on_reconnected,
                    **OPTIONS,
                    **options,
                )
                phase = "checking"
                await nc.jetstream().account_info()
        except ServiceUnavailableError:
            raise Failure(f"{where} has no JetStream, or none for this account") from None
        except (TimeoutError, Error) as error:
            raise Failure(f"cannot connect to {where}: {refusal or reason(error)}") from None
        phase = "open"

    try:
        try:
            await sign_on()
            yield nc
        finally:
            phase = "ended"
            with suppress(Exception):
                await asyncio.wait_for(nc.close(), CLOSE)
    except asyncio.CancelledError:
        if not nc.forbidden or task.uncancel() > cancelling:
            raise
        # nats-py has made lower case of the server's own words.
        raise Failure(f'the server refused: {nc.forbidden} (in lower case; see "Permissions" in the README)') from None


def _destination() -> tuple[list[str], dict[str, Any]]:
    """Return where to connect, as URLs without secrets, and nats-py's options that say who we are."""
    credentials = os.environ.get("NATS_CREDENTIALS_FILE_PATH")
    urls = os.environ.get("NATS_URL") or (SYNADIA_CLOUD if credentials else LOCAL)
    servers: list[str] = []
    options: dict[str, Any] = {}
    for url in filter(None, (url.strip() for url in urls.split(","))):
        try:
            parts = urlsplit(url if "://" in url else f"nats://{url}")
            host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
            server = f"{parts.scheme}://{host}:{parts.port or 4222}"
        except ValueError:
            host = None
        # A password's own "/", "?", "#" or "," ends the host too early, and would be shown with it.
        rest = "".join(parts[2:]) if host else ""
        cut = servers and "@" in url and "://" not in url
        if not host or rest or cut or parts.scheme not in ("nats", "tls") or text(server) != server:
            raise Failure("NATS_URL must be URLs such as nats://localhost:4222, with commas between them")
        servers.append(server)
        # Not left in the URL: nats-py takes it literally, where natscli decodes it, and would not use it
        # for the other servers of a cluster.
        if parts.password is not None:
            options = {"user": unquote(parts.username or ""), "password": unquote(parts.password)}
        elif parts.username:
            options = {"token": unquote(parts.username)}
    if not servers:
        raise Failure("NATS_URL has no URL in it")
    if credentials:
        options["user_credentials"] = _Credentials(Path(credentials))
    return servers, options


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, Error) and any(
        word in str(error).lower() for word in ("authorization", "authentication", "expired", "maximum")
    )
