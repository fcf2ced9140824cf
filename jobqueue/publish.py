"""Publishing to a stream: each message is stored once, and a message that isn't stored is reported."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionReconnectingError, Error, MaxPayloadError

from jobqueue.errors import STREAM_FULL, describe_error
from jobqueue.retrying import retry

log = logging.getLogger(__name__)

ACK_TIMEOUT = 5.0  # seconds for one attempt
LATE_CHECK_INTERVAL = 0.5  # seconds
RETRY_FOR = 30.0  # seconds, and one more attempt; well within the stream's duplicate window
HEADER_SIZE = len("NATS/1.0\r\nNats-Msg-Id: \r\n\r\n")
WINDOW = 1000  # messages in flight
UNIT = 4096  # bytes; a message takes one place of the window for each, so that large ones don't take more memory


class Outcome(Enum):
    """What has become of a message. Only STORED is true."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # an earlier call has stored a message with this id, and this one isn't stored
    FAILED = "failed"

    def __bool__(self) -> bool:
        """Return whether the message itself is stored."""
        return self is Outcome.STORED


class Message(NamedTuple):
    """What to publish: the payload, its id, and its name in the log.

    The id is the same for every attempt, so that the server stores the message once
    (https://docs.nats.io/using-nats/developer/develop_jetstream/model_deep_dive#message-deduplication).
    """

    payload: bytes
    id: str
    label: str

    def fits(self, nc: Client) -> bool:
        """Return whether the server takes it; nats-py doesn't count the header, and the server then hangs up."""
        return HEADER_SIZE + len(self.id.encode()) + len(self.payload) <= nc.max_payload


async def publish(nc: Client, subject: str, message: Message) -> Outcome:
    """Publish one message, again and again for half a minute, and log and return what has become of it.

    A duplicate of an earlier attempt of the same call, whose answer was lost, counts as stored.

    Args:
        nc: the connection.
        subject: where to.
        message: what.
    """
    return await _publish(nc, subject, message, is_sent=False)


async def _publish(nc: Client, subject: str, message: Message, *, is_sent: bool) -> Outcome:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + RETRY_FOR

    async def attempt() -> Outcome:
        nonlocal is_sent
        if not message.fits(nc):
            raise MaxPayloadError
        if not nc.is_connected:  # nats-py would send it later, perhaps when its id is forgotten
            raise ConnectionReconnectingError
        is_retry, is_sent = is_sent, True
        headers = {"Nats-Msg-Id": message.id}
        try:
            ack = await nc.jetstream().publish(subject, message.payload, timeout=ACK_TIMEOUT, headers=headers)
        except (ValueError, TypeError):  # somebody else has answered
            raise TimeoutError("no stream has answered") from None
        return Outcome.DUPLICATE if ack.duplicate and not is_retry else Outcome.STORED

    try:
        outcome = await retry(
            attempt,
            f"{message.label} is not published yet",
            lambda error: loop.time() > deadline or getattr(error, "err_code", None) == STREAM_FULL,
        )
    except (Error, TimeoutError) as error:
        log.error("%s is not published: %s", message.label, describe_error(error))
        return Outcome.FAILED
    _log_stored(message, outcome)
    return outcome


async def publish_many(nc: Client, subject: str, messages: AsyncIterator[Message]) -> Counter[Outcome]:
    """Publish messages, many at a time, and return how many have had each outcome.

    Each is sent once, and handed to `publish` where that doesn't succeed. With WINDOW of them in flight the next one
    is not asked for.

    Args:
        nc: the connection.
        subject: where to.
        messages: what.

    Raises:
        Exception: `messages` has raised it; what came before is stored or failed.
    """
    failure = None
    async with asyncio.TaskGroup() as tasks:
        pipeline = _Pipeline(nc, subject, tasks)
        subscription = await nc.subscribe(f"{pipeline.inbox}.*", cb=pipeline.receive)
        watching = tasks.create_task(pipeline.retry_late())
        try:
            async for message in messages:
                await pipeline.send(message)
        except Exception as error:
            failure = error
        await pipeline.wait_for_room(WINDOW)
        watching.cancel()
        await subscription.unsubscribe()
    if failure:
        raise failure
    return pipeline.outcomes


class _Pipeline:
    """The messages in flight, whose answers come to one inbox, each with its message's number."""

    def __init__(self, nc: Client, subject: str, tasks: asyncio.TaskGroup) -> None:
        self.inbox = nc.new_inbox()
        self.outcomes: Counter[Outcome] = Counter()
        self._nc = nc
        self._subject = subject
        self._tasks = tasks
        self._sent: dict[int, tuple[Message, float]] = {}  # by number, with when it is late; the earliest first
        self._count = 0
        self._now = asyncio.get_running_loop().time
        self._room = WINDOW
        self._has_room = asyncio.Event()

    async def wait_for_room(self, room: int) -> None:
        while self._room < room:
            self._has_room.clear()
            await self._has_room.wait()

    async def send(self, message: Message) -> None:
        """Send a message, and wait until there is room for another one."""
        self._room -= _units(message)
        self._count += 1
        if self._nc.is_connected and message.fits(self._nc):  # nats-py would keep it, and send it later
            self._sent[self._count] = message, self._now() + ACK_TIMEOUT
            reply = f"{self.inbox}.{self._count}"
            with suppress(Error):  # late, then
                await self._nc.publish(self._subject, message.payload, reply, {"Nats-Msg-Id": message.id})
        else:
            self._tasks.create_task(self._publish(message, is_sent=False))
        await self.wait_for_room(1)

    async def receive(self, answer: Msg) -> None:
        """Take the answer to a message."""
        number = int(answer.subject.rpartition(".")[2])
        if number not in self._sent:
            return
        message, _ = self._sent.pop(number)
        try:
            ack = json.loads(answer.data.decode())
        except ValueError:  # 503: no stream takes the subject, or its leader is away
            ack = None
        if not isinstance(ack, dict) or "seq" not in ack or "error" in ack:
            self._tasks.create_task(self._publish(message, is_sent=True))
            return
        outcome = Outcome.DUPLICATE if ack.get("duplicate") else Outcome.STORED
        _log_stored(message, outcome)
        self._finish(message, outcome)

    async def retry_late(self) -> None:
        """Publish again what has had no answer in time, for ever."""
        while True:
            await asyncio.sleep(LATE_CHECK_INTERVAL)
            for number, (message, late_at) in list(self._sent.items()):
                if late_at > self._now():
                    break
                del self._sent[number]
                self._tasks.create_task(self._publish(message, is_sent=True))

    async def _publish(self, message: Message, *, is_sent: bool) -> None:
        self._finish(message, await _publish(self._nc, self._subject, message, is_sent=is_sent))

    def _finish(self, message: Message, outcome: Outcome) -> None:
        self.outcomes[outcome] += 1
        self._room += _units(message)
        self._has_room.set()


def _log_stored(message: Message, outcome: Outcome) -> None:
    log.info("%s was already stored" if outcome == Outcome.DUPLICATE else "published %s", message.label)


def _units(message: Message) -> int:
    return min(WINDOW, 1 + len(message.payload) // UNIT)
