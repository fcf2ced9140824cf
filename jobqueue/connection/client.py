"""nats-py's client with workarounds; each docstring names the fault (seen in nats-py 2.16)."""

import asyncio
import re
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import nats.errors
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.errors import ConnectionReconnectingError, Error, SecureConnWantedError
from nats.protocol.command import hpub_cmd
from nats.protocol.parser import AWAITING_MSG_PAYLOAD, PERMISSIONS_ERR

from jobqueue.connection.environment import Credentials
from jobqueue.errors import Failure

LARGE_MESSAGE = 32 * 1024  # bytes
TOKEN_LENGTH = 26  # characters at the end of a request's inbox
SERVER_ERROR = re.compile(rb"-ERR ('[^'\r\n]*')")


class Client(NatsClient):
    """A connection to NATS, made by `connect`: nats-py's client, with its faults worked around.

    Example:
        async def queue_order(nc: Client, number: int) -> Outcome:
            return await publish(nc, "orders.new", Message(b"order", id=f"order-{number}"))
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused_subjects: dict[str, str] = {}  # subject (in lower case, as nats-py has it): the server's message
        self.ends_at_refusal = False  # whether `has_refused` ends all work; else requests fail
        self.has_refused = asyncio.Event()
        # Beginnings of subjects (in lower case) whose refusal ends no work, and those that were refused.
        self.may_be_refused, self._is_done_without = {"$js.api.stream.names"}, set[str]()
        self._requests: WeakKeyDictionary[asyncio.Future[Msg], str] = WeakKeyDictionary()  # and their subjects
        self._is_inbox_refused = False

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,  # noqa: ASYNC109
        *args: Any,
        **kwargs: Any,
    ) -> Msg:
        """Keep the timeout when the server reads nothing; nats-py waits until it does.

        Raise an error when the server refuses the subject or the inbox; nats-py waits until the timeout. And end when
        cancelled; `wait_for` of Python 3.11 returns an answer that comes at the same time
        (https://github.com/python/cpython/issues/86296).
        """
        if self._is_inbox_refused:
            self._is_inbox_refused = False
            self._resp_sub_prefix = None  # so that nats-py subscribes again: it may be permitted now
        task = asyncio.current_task()
        cancelling = task.cancelling() if task else 0
        try:
            async with asyncio.timeout(timeout):
                answer: Msg = await super().request(subject, payload, timeout, *args, **kwargs)
        except TimeoutError:
            raise nats.errors.TimeoutError from None
        finally:
            if (task and task.cancelling() > cancelling) or (self.ends_at_refusal and self.has_refused.is_set()):
                raise asyncio.CancelledError
        self.refused_subjects.pop(subject.lower(), None)
        return answer

    def refuse(self, subject: str, why: str) -> bool:
        """Fail the requests to a subject, or all if it is their inbox; return whether no log line is needed."""
        is_inbox = subject == f"{(self._resp_sub_prefix or b'').decode().lower()}*"
        self._is_inbox_refused |= is_inbox
        is_known = subject in self.refused_subjects
        if optional := next((one for one in self.may_be_refused if subject.startswith(one)), ""):
            is_known = optional in self._is_done_without
            self._is_done_without.add(optional)
        else:
            self.refused_subjects[subject] = why
            self.has_refused.set()
            if self.ends_at_refusal:
                return True
        failing = [one for one, requested in self._requests.items() if is_inbox or requested == subject]
        for waiting in failing:
            _fail(waiting, Error(f"nats: {why}"))
        return bool(failing) or is_known

    def _connect_command(self) -> bytes:
        """Insist on TLS for a `tls://` URL, or with certificates, as nats.go does; nats-py would send all in clear.

        Reread the credentials file, because a user's JWT expires.
        """
        assert self._current_server
        is_tls_wanted = self._current_server.uri.scheme == "tls" or "tls" in self.options
        if is_tls_wanted and not self._server_info.get("tls_required"):
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
        """Take any subject that the server takes; nats-py's read loop ends at one that isn't UTF-8."""
        return Msg(
            self,
            subject.decode(errors="backslashreplace"),
            reply.decode(errors="backslashreplace"),
            data,
            headers,
            _sid=sid,
        )

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        """Take any headers that the server takes; nats-py's read loop ends at headers that are too short."""
        if not headers:
            return None
        try:
            parsed: dict[str, str] | None = await super()._process_headers(headers)
        except Exception:
            return None
        return parsed

    async def _send_publish(
        self, subject: str, reply: str, payload: bytes, payload_size: int, headers: dict[str, Any] | bytes | None
    ) -> None:
        """Take a header block as it is on the wire; nats-py's headers have one value for each name, and only UTF-8.

        And note which request has which subject, for `refuse`.
        """
        if self._resp_map and (waiting := self._resp_map.get(reply[-TOKEN_LENGTH:])):
            self._requests[waiting] = subject.lower()
        if not isinstance(headers, bytes):
            await super()._send_publish(subject, reply, payload, payload_size, headers)
            return
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += payload_size
        await self._send_command(hpub_cmd(subject, reply, headers, payload))
        await self._flush_pending()

    async def _process_err(self, err_msg: str) -> None:
        """Reconnect when the server ends the connection; nats-py closes it for good, as when a JWT expires."""
        if PERMISSIONS_ERR in err_msg:
            await super()._process_err(err_msg)
            return
        error = Error(f"nats: {err_msg}")
        await self._error_cb(error)
        await self._process_op_err(error)

    async def _attempt_reconnect(self) -> None:
        """Drop what is unsent on a dead connection; nats-py waits until TCP times out, or sends it much later.

        And fail the requests that wait: nobody answers them any more, and nats-py waits until their timeouts. Forget
        what was refused: the user may have other permissions now.
        """
        for waiting in list(self._resp_map.values()):
            _fail(waiting, ConnectionReconnectingError())
        self.refused_subjects.clear()
        self._is_inbox_refused = False
        self.abort()
        await super()._attempt_reconnect()

    @property
    def reconnects(self) -> int:
        """How often it has reconnected: what was heard before another number may be of another server."""
        return int(self.stats["reconnects"])

    @property
    def is_receiving(self) -> bool:
        """Whether a large message is arriving: what is behind it is not late."""
        return self._ps.state == AWAITING_MSG_PAYLOAD and self._ps.needed > LARGE_MESSAGE

    def abort(self) -> None:
        """Drop the TCP connection and what is unsent."""
        self._pending = []
        self._pending_data_size = 0
        if isinstance(self._transport, TcpTransport) and self._transport._io_writer:
            with suppress(AttributeError):  # of asyncio's, where TLS has ended already
                self._transport._io_writer.transport.abort()


def _fail(waiting: asyncio.Future[Msg], error: Exception) -> None:
    """Let a request that waits for its answer raise an error."""
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # nobody has to read it
