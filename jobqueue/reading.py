"""Reading a stream's messages by their sequences, since a work queue takes no second consumer that could read them."""

import asyncio
import base64
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from nats.aio.client import Client
from nats.errors import NoRespondersError
from nats.js.errors import NotFoundError

from jobqueue.streams import API_TIMEOUT, api_request

NO_MESSAGE_FOUND = 10037  # JetStream's error code
MAX_REQUESTS = 64  # at a time, so that a round trip of 100 ms costs a minute for 40,000 messages
FRESH_FOR = 0.5  # seconds
TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")

T = TypeVar("T")


class StoredMessage(NamedTuple):
    """A message as its stream has it."""

    sequence: int
    subject: str
    stored_at: int  # nanoseconds
    data: bytes
    headers: dict[str, str]
    read_at: float  # time.monotonic()
    reconnects: int  # of the connection until then

    def is_fresh(self, nc: Client) -> bool:
        """Return whether it was read so recently that its sequence cannot have another message."""
        return time.monotonic() - self.read_at < FRESH_FOR and self.reconnects == nc.stats["reconnects"]


async def get_message(nc: Client, stream: str, sequence: int, subject: str | None = None) -> StoredMessage | None:
    """Return the message with a stream sequence, as the stream's leader has it; None if there is none.

    Args:
        nc: the connection.
        stream: the stream's name.
        sequence: the stream sequence.
        subject: where given, the first message from that sequence on whose subject this matches is returned.

    Raises:
        nats.errors.Error: the request timed out, or there is no such stream.
    """
    now = time.monotonic(), nc.stats["reconnects"]
    request: dict[str, Any] = {"seq": sequence} | ({"next_by_subj": subject} if subject else {})
    try:
        found = (await api_request(nc, f"STREAM.MSG.GET.{stream}", request))["message"]
    except NotFoundError as error:
        if error.err_code == NO_MESSAGE_FOUND:
            return None
        raise
    headers = await nc._process_headers(base64.b64decode(found["hdrs"])) if "hdrs" in found else None
    data = base64.b64decode(found.get("data", ""))
    return StoredMessage(found["seq"], found["subject"], parse_time(found["time"]), data, headers or {}, *now)


async def read_messages(
    nc: Client, stream: str, subject: str, ranges: Iterable[tuple[int, int]], keep: Callable[[StoredMessage], T]
) -> list[T]:
    """Return what `keep` makes of each message in some ranges of stream sequences, in their order.

    Each request finds the next message, so gaps cost nothing. There are up to MAX_REQUESTS readers; an idle one takes
    the upper half of another's range.

    Args:
        nc: the connection.
        stream: the stream's name.
        subject: which messages; it may have wildcards.
        ranges: the first and the last sequence of each.
        keep: is called with each message; only what it returns stays in memory.

    Raises:
        nats.errors.Error: the request timed out.
    """
    kept: dict[int, T] = {}
    unread = list(ranges)[::-1]
    reading = 0

    async def read() -> None:
        nonlocal reading
        while unread:
            first, last = unread.pop()
            while first <= last:
                message = await get_message(nc, stream, first, subject)
                if message is None or message.sequence > last:
                    break
                kept[message.sequence] = keep(message)
                first = message.sequence + 1
                if reading < MAX_REQUESTS and first < last:
                    middle = (first + last) // 2
                    unread.append((middle + 1, last))
                    last = middle
                    reading += 1
                    tasks.create_task(read())
        reading -= 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(MAX_REQUESTS, len(unread))):
            reading += 1
            tasks.create_task(read())
    return [kept[sequence] for sequence in sorted(kept)]


async def gather_some(calls: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Return what the calls return, MAX_REQUESTS of them at a time."""
    limit = asyncio.Semaphore(MAX_REQUESTS)

    async def run(call: Callable[[], Awaitable[T]]) -> T:
        async with limit:
            return await call()

    return await asyncio.gather(*map(run, calls))


async def find_stored_at(nc: Client, stream: str, sequence: int) -> int | None:
    """Return when the message with a stream sequence was stored, in nanoseconds; None if there is none.

    Any replica answers a direct get, without a leader. The leader is asked where nobody does, since the stream has no
    `allow_direct` (nats-server 2.10 then says nothing), or where the message itself has a header `Status: 503`, which
    nats-py takes for "no responders".

    Raises:
        nats.errors.Error: the request timed out.
    """
    request = json.dumps({"seq": sequence}).encode()
    try:
        answer = await nc.request(f"$JS.API.DIRECT.GET.{stream}", request, API_TIMEOUT)
    except (NoRespondersError, TimeoutError):
        message = await get_message(nc, stream, sequence)
        return message and message.stored_at
    stored_at = (answer.headers or {}).get("Nats-Time-Stamp")
    return parse_time(stored_at) if stored_at else None


def parse_time(text: str) -> int:
    """Return the nanoseconds since 1970 of a time as the server writes it.

    Raises:
        ValueError: it is no time.
    """
    parts = TIME.fullmatch(text)
    if not parts:
        raise ValueError
    seconds, fraction, zone = parts.groups()
    return int(datetime.fromisoformat(seconds + zone).timestamp()) * 10**9 + int((fraction or "").ljust(9, "0"))


def format_time(nanoseconds: int) -> str:
    """Return a time as the server writes it."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"
