"""nats-py's client with workarounds; each docstring names the fault (seen in nats-py 2.16)."""

import asyncio
import re
from contextlib import suppress
from typing import Any

from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.errors import Error, SecureConnWantedError
from nats.protocol.parser import PERMISSIONS_ERR

from jobqueue.environment import Credentials
from jobqueue.errors import Failure

SERVER_ERROR = re.compile(rb"-ERR ('[^'\r\n]*')")


class Client(NatsClient):
    """A connection to NATS; `jobqueue.connect` makes one."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, str] = {}  # what the server doesn't permit: subject (in lower case) and its words

    def _connect_command(self) -> bytes:
        """Insist on TLS for a `tls://` URL, as nats.go does; nats-py would send the password in clear.

        And read the credentials file anew, since a user's JWT expires.
        """
        assert self._current_server
        if self._current_server.uri.scheme == "tls" and not self._server_info.get("tls_required"):
            raise SecureConnWantedError
        if isinstance(self._user_credentials, Credentials):
            with suppress(Failure):  # it may be about to be replaced
                self._user_credentials.read()
        command: bytes = super()._connect_command()
        return command

    async def _process_connect_init(self) -> None:
        """Raise what the server said before it hung up, as at its `max_connections`; nats-py has just the reset."""
        try:
            await super()._process_connect_init()
        except ConnectionError:
            reader = getattr(self._transport, "_io_reader", None)
            if said := SERVER_ERROR.search(bytes(getattr(reader, "_buffer", b""))):
                raise Error(f"nats: {said[1].decode(errors='backslashreplace')}") from None
            raise

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Msg:
        """Take any subject that the server takes; nats-py stops reading for good at one that isn't UTF-8."""
        return Msg(
            self,
            subject.decode(errors="backslashreplace"),
            reply.decode(errors="backslashreplace"),
            data,
            headers,
            _sid=sid,
        )

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        """Take any headers that the server takes; nats-py stops reading for good at too short ones."""
        if not headers:
            return None
        try:
            parsed: dict[str, str] | None = await super()._process_headers(headers)
        except Exception:
            return None
        return parsed

    async def _process_err(self, err_msg: str) -> None:
        """Reconnect when the server ends the connection; nats-py closes it for good, say at a JWT's end."""
        if PERMISSIONS_ERR in err_msg:
            await super()._process_err(err_msg)
            return
        error = Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _attempt_reconnect(self) -> None:
        """Drop what is unsent on a dead connection; nats-py waits until TCP gives up on it, or sends it much later."""
        self._pending = []
        self._pending_data_size = 0
        if isinstance(self._transport, TcpTransport) and self._transport._io_writer:
            self._transport._io_writer.transport.abort()
        await super()._attempt_reconnect()


class ScriptClient(Client):
    """Where one permission error ends the task that the script runs in."""

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        """Raise CancelledError after a permission error.

        `asyncio.wait_for` of Python 3.11 loses a cancellation when the answer comes at the same time
        (https://github.com/python/cpython/issues/86296).
        """
        answer: Msg = await super().request(*args, **kwargs)
        if self.refused:
            raise asyncio.CancelledError
        return answer


class ProgramClient(Client):
    """Where a permission error ends the requests to that subject."""

    def __init__(self) -> None:
        super().__init__()
        self._refusals: dict[asyncio.Future[str], str] = {}  # for each request: its subject

    async def request(self, subject: str, *args: Any, **kwargs: Any) -> Msg:
        """Raise an error as soon as the server refuses the subject; nats-py waits until the time-out."""
        refusal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._refusals[refusal] = subject.lower()
        request = asyncio.create_task(super().request(subject, *args, **kwargs))
        try:
            await asyncio.wait((request, refusal), return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                raise Error(f"nats: {refusal.result()}")
            return await request
        finally:
            request.cancel()
            del self._refusals[refusal]

    async def _attempt_reconnect(self) -> None:
        """Forget what was refused: the user may have other permissions now."""
        self.refused.clear()
        await super()._attempt_reconnect()

    def fail_requests(self, refused: str, why: str) -> bool:
        """Let the requests to a subject fail, or all where it is their inbox; return whether there are any."""
        is_inbox = refused == f"{(self._resp_sub_prefix or b'').decode().lower()}*"
        failing = [refusal for refusal, subject in self._refusals.items() if is_inbox or subject == refused]
        for refusal in failing:
            if not refusal.done():
                refusal.set_result(why)
        return bool(failing)
