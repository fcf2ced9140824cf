"""Reading a stream's messages by their sequences, since a work queue takes no second consumer that could read them."""

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from nats.errors import NoRespondersError
from nats.js.errors import NotFoundError

from jobqueue.connection.client import Client
from jobqueue.jetstream.link import transfer_time
from jobqueue.jetstream.streams import API_TIMEOUT, api_request
from jobqueue.jetstream.tasks import run_all

READ_TIMEOUTS = (API_TIMEOUT, 5.0, 30.0)  # seconds of the attempts; the last one has time for 4 MB at 1 Mbit/s
MAX_READS = 64  # at a time, so that a round trip of 100 ms costs a minute for 40,000 messages
MAX_READ_BYTES = 4 * 2**20  # that are read at a time, if the next messages are no larger than the last ones
MAX_PENDING = 48 * 2**20  # bytes that may be on their way at worst; the server ends a connection at 64 MiB
ENCODED = 1.4  # bytes in an answer for each byte of a message
FRESH_FOR = 0.5  # seconds
NO_MESSAGE_FOUND = 10037  # JetStream's error code
TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")


class StoredMessage(NamedTuple):
    """A message as its stream has it."""

    sequence: int
    subject: str
    stored_at: int  # nanoseconds
    data: bytes
    header_block: bytes  # as on the wire; empty if it has none
    read_at: float  # time.monotonic()
    reconnects: int  # of the connection until then

    def is_fresh(self, nc: Client) -> bool:
        """Return whether it was just read on this connection, so that its sequence cannot have another message."""
        is_same_connection = nc.is_connected and self.reconnects == nc.reconnects
        return is_same_connection and time.monotonic() - self.read_at < FRESH_FOR


class _Reads:
    """Bounds how many messages are read at a time on a connection, by the size of the last one."""

    def __init__(self, nc: Client) -> None:
        self.limit = window_size(nc)
        self._count = 0
        self._has_ended = asyncio.Event()

    async def __aenter__(self) -> None:
        while self._count >= self.limit:
            self._has_ended.clear()
            await self._has_ended.wait()
        self._count += 1

    async def __aexit__(self, *_: object) -> None:
        self._count -= 1
        self._has_ended.set()


_reads: WeakKeyDictionary[Client, _Reads] = WeakKeyDictionary()


async def get_message(nc: Client, stream: str, sequence: int, subject: str | None = None) -> StoredMessage | None:
    """Return the message with a stream sequence, as the stream's leader has it; None if there is none.

    With a subject it is the first message from that sequence on whose subject that matches.
    """
    if not (reads := _reads.get(nc)):
        reads = _reads[nc] = _Reads(nc)
    async with reads:
        message = await _get_message(nc, stream, sequence, subject, READ_TIMEOUTS)
        if message:
            reads.limit = window_size(nc, [message])
        return message


async def _get_message(
    nc: Client, stream: str, sequence: int, subject: str | None, timeouts: Sequence[float]
) -> StoredMessage | None:
    request: dict[str, Any] = {"seq": sequence} | ({"next_by_subj": subject} if subject else {})
    for timeout in timeouts:
        now = time.monotonic(), nc.reconnects
        try:
            found = (await api_request(nc, f"STREAM.MSG.GET.{stream}", request, timeout))["message"]
            break
        except TimeoutError:
            if timeout == timeouts[-1] or not nc.is_connected:
                raise
        except NotFoundError as error:
            if error.err_code == NO_MESSAGE_FOUND:
                return None
            raise
    data, headers = (base64.b64decode(found.get(field, "")) for field in ("data", "hdrs"))
    return StoredMessage(found["seq"], found["subject"], parse_time(found["time"]), data, headers, *now)


def window_size(nc: Client, messages: Iterable[StoredMessage | None] = ()) -> int:
    """Return how many messages to read at a time after these: fewer where they were large."""
    # Nobody could have stored a larger message than `max_payload`, unless that was lowered since.
    limit = max(1, min(MAX_READS, int(MAX_PENDING / (ENCODED * nc.max_payload))))
    largest = max((len(message.data) for message in messages if message), default=MAX_READ_BYTES // 4)
    return max(1, min(limit, int(MAX_READ_BYTES / (ENCODED * largest + 1))))


async def read_messages(
    nc: Client,
    stream: str,
    subject: str,
    ranges: Iterable[tuple[int, int]],
    take: Callable[[StoredMessage], None],
    share: float = 1.0,
) -> None:
    """Call `take` with each message in some ranges of stream sequences whose subject matches, in any order.

    Each request finds the next message, so gaps cost nothing. Several ranges are read at a time; they are halved
    until there are enough of them. Reading takes a share of the time, so that the process has some left for its work.
    """
    unread, window = [(first, last) for first, last in ranges if first <= last], window_size(nc)
    while unread:
        while len(unread) < window and (widest := max(unread, key=_width))[0] < widest[1]:
            unread.remove(widest)
            middle = sum(widest) // 2
            unread += [(widest[0], middle), (middle + 1, widest[1])]
        some = unread[-window:]
        del unread[-window:]
        begun = time.monotonic()
        found = await run_all(get_message(nc, stream, first, subject) for first, _ in some)
        for message, (_, last) in zip(found, some, strict=True):
            if message and message.sequence <= last:
                take(message)
                if message.sequence < last:
                    unread.append((message.sequence + 1, last))
        window = window_size(nc, found)
        if share < 1:
            await asyncio.sleep((time.monotonic() - begun) * (1 / share - 1))


def _width(sequences: tuple[int, int]) -> int:
    return sequences[1] - sequences[0]


async def find_stored_at(nc: Client, stream: str, sequence: int, size: int) -> int | None:
    """Return when the message with a stream sequence was stored, in nanoseconds; None if there is none.

    The answer is the whole message; `size` is how large it is expected to be, in bytes.

    Any replica answers a direct get, without a leader. The leader is asked where nobody does, since the stream has no
    `allow_direct` (nats-server 2.10 then says nothing), or where the message itself has a header `Status: 503`, which
    nats-py takes for "no responders".
    """
    request, timeout = json.dumps({"seq": sequence}).encode(), API_TIMEOUT + transfer_time(size)
    try:
        answer = await nc.request(f"$JS.API.DIRECT.GET.{stream}", request, timeout)
    except (NoRespondersError, TimeoutError):
        found = await _get_message(nc, stream, sequence, None, (timeout,))
        return found.stored_at if found else None
    stored_at = (answer.headers or {}).get("Nats-Time-Stamp")
    return parse_time(stored_at) if stored_at else None


def parse_time(text: str) -> int:
    """Return the nanoseconds since 1970 of a time as the server writes it; raise ValueError if it is none."""
    parts = TIME.fullmatch(text)
    if not parts:
        raise ValueError
    seconds, fraction, zone = parts.groups()
    return int(datetime.fromisoformat(seconds + zone).timestamp()) * 10**9 + int((fraction or "").ljust(9, "0"))


def format_time(nanoseconds: int) -> str:
    """Return a time as the server writes it."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"
