"""Publishing to a stream: each message is stored once, and a message that isn't stored is reported."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress

from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, ConnectionReconnectingError, Error, MaxPayloadError

from jobqueue.connection.client import Client
from jobqueue.connection.retrying import MAX_RETRY_DELAY, retry
from jobqueue.errors import describe_error, printable
from jobqueue.jetstream.link import MIN_RATE, OVERHEAD, LinkWindow, transfer_time
from jobqueue.jetstream.streams import is_literal
from jobqueue.publishing.message import Message, Outcome

log = logging.getLogger(__name__)

ACK_TIMEOUT = 5.0  # seconds for one attempt
LATE_CHECK_INTERVAL = 0.5  # seconds
PUBLISH_TIMEOUT = 30.0  # seconds for all attempts; well within the stream's duplicate window
WINDOW = 1000  # messages in flight
WINDOW_TIME = 1.0  # seconds that the bytes in flight may take on the link
MAX_WINDOW_BYTES = 4 * 2**20
MAX_SUBJECT = 2048  # characters; the server ends the connection at a line of 4,096


async def publish(nc: Client, subject: str, message: Message, *, timeout: float = PUBLISH_TIMEOUT) -> Outcome:  # noqa: ASYNC109
    """Publish one message, and return what has become of it.

    It is published again after a timeout, a lost connection and other transient errors. The log says why a message
    is not published. A duplicate of an earlier attempt of the same call, whose answer was lost, counts as stored.

    Args:
        nc: the connection, from `connect`.
        subject: the subject to publish to.
        message: the message.
        timeout: seconds for all attempts together.

    Returns:
        The outcome; no error of the server or the connection is raised.

    Raises:
        TypeError, ValueError: the subject or the message is malformed.

    Example:
        if not await publish(nc, "orders.new", Message(b"order-1", id="order-1"), timeout=2):
            print("not stored, or stored before")
    """
    _check_subject(subject)
    message.check()
    return await _publish_until_confirmed(nc, subject, message, timeout, may_be_stored=False)


async def _publish_until_confirmed(
    nc: Client,
    subject: str,
    message: Message,
    timeout: float,  # noqa: ASYNC109  of all attempts
    *,
    may_be_stored: bool,
) -> Outcome:
    now = asyncio.get_running_loop().time
    deadline, is_unknown = now() + timeout, False

    async def attempt() -> Outcome:
        nonlocal may_be_stored, is_unknown
        if not message.fits(nc):
            raise MaxPayloadError
        if nc.is_closed:
            raise ConnectionClosedError
        if not nc.is_connected:  # nats-py would send it later, perhaps when its id is forgotten
            raise ConnectionReconnectingError
        is_retry, may_be_stored = may_be_stored, True
        attempt_time = min(ACK_TIMEOUT + transfer_time(len(message.payload)), deadline - now())
        try:
            ack = await nc.jetstream().publish(
                subject, message.payload, timeout=attempt_time, headers=message.all_headers
            )
        except (ValueError, TypeError, KeyError):  # the answer is no JetStream ack
            raise TimeoutError("the answer did not come from a stream") from None
        except (TimeoutError, ConnectionReconnectingError):
            is_unknown = True
            raise
        return Outcome.DUPLICATE if ack.duplicate and not is_retry else Outcome.STORED

    try:
        outcome = await retry(attempt, f"{message} is not published yet", lambda _: now() + MAX_RETRY_DELAY > deadline)
    except (Error, TimeoutError) as error:
        what = "is not confirmed, and may be stored" if is_unknown else "is not published"
        log.error("%s %s: %s", message, what, describe_error(error))
        return Outcome.FAILED
    _log_stored(message, outcome)
    return outcome


async def publish_many(nc: Client, subject: str, messages: AsyncIterator[Message]) -> Counter[Outcome]:
    """Publish messages, many at a time, and return how many had each outcome.

    A message that is not confirmed is published again like `publish` does. At most WINDOW are in flight, and on a slow
    link no more than it carries in a second.

    Args:
        nc: the connection, from `connect`.
        subject: the subject to publish to.
        messages: the messages.

    Returns:
        How many messages had each outcome.

    Raises:
        Exception: `messages` has raised it, or a message is malformed; what came before is stored or failed.
        nats.errors.Error: the connection is closed.

    Example:
        async def messages():
            for number in range(1000):
                yield Message(b"order", id=f"run-7-{number}")

        outcomes = await publish_many(nc, "orders.new", messages())
        print(outcomes[Outcome.STORED], "stored")
    """
    _check_subject(subject)
    failure = None
    pipeline = _Pipeline(nc, subject)
    subscription = await nc.subscribe(f"{pipeline.inbox}.*", cb=pipeline.receive)
    watching = asyncio.create_task(pipeline.retry_late())
    try:
        try:
            async for message in messages:
                message.check()
                await pipeline.send(message)
        except Exception as error:
            failure = error
        await pipeline.wait_until_done()
    finally:
        watching.cancel()
        pipeline.cancel()
        with suppress(Error):
            await subscription.unsubscribe()
    if failure:
        raise failure
    return pipeline.outcomes


class _Pipeline:
    """The messages in flight. The last token of an answer's subject is its message's number."""

    def __init__(self, nc: Client, subject: str) -> None:
        self.inbox = nc.new_inbox()
        self.outcomes: Counter[Outcome] = Counter()
        self._nc = nc
        self._subject = subject
        self._publishing_again = set[asyncio.Task[None]]()
        self._sent: dict[int, tuple[Message, float]] = {}  # by number, and when its answer is late
        self._count = 0
        self._now = asyncio.get_running_loop().time
        self._window = LinkWindow(WINDOW_TIME, MAX_WINDOW_BYTES)
        self._in_flight = 0  # messages
        self._bytes = 0  # of these
        self._has_finished = asyncio.Event()

    async def wait_until_done(self) -> None:
        while self._in_flight:
            await self._wait()

    async def _wait(self) -> None:
        self._has_finished.clear()
        await self._has_finished.wait()

    async def send(self, message: Message) -> None:
        """Send a message, and wait until there is room for another one."""
        self._in_flight += 1
        self._bytes += _size(message)
        self._count += 1
        # Without a connection nats-py would send it much later.
        if self._nc.is_connected and message.fits(self._nc) and not self._is_refused():
            # Seconds until the link has carried it; well within the stream's duplicate window.
            ahead = min(self._bytes / max(self._window.rate, MIN_RATE), PUBLISH_TIMEOUT)
            self._sent[self._count] = message, self._now() + ACK_TIMEOUT + ahead
            reply = f"{self.inbox}.{self._count}"
            with suppress(Error):  # retry_late publishes it again
                await self._nc.publish(self._subject, message.payload, reply, message.all_headers)
        else:
            self._retry(message, may_be_stored=False)
        while self._in_flight >= WINDOW or self._bytes >= self._window.size:
            await self._wait()

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
            self._retry(message, may_be_stored=True)
            return
        outcome = Outcome.DUPLICATE if ack.get("duplicate") else Outcome.STORED
        self._window.carried += _size(message)
        self._window.update(self._now())
        _log_stored(message, outcome)
        self._finish(message, outcome)

    async def retry_late(self) -> None:
        """Publish again the messages whose answers are late, until cancelled."""
        while True:
            await asyncio.sleep(LATE_CHECK_INTERVAL)
            for number, (message, late_at) in list(self._sent.items()):
                if late_at > self._now() and not self._is_refused():
                    continue
                del self._sent[number]
                self._retry(message, may_be_stored=True)

    def _is_refused(self) -> bool:
        return self._subject.lower() in self._nc.refused_subjects

    def _retry(self, message: Message, *, may_be_stored: bool) -> None:
        async def publish_again() -> None:
            outcome = Outcome.FAILED
            try:
                outcome = await _publish_until_confirmed(
                    self._nc, self._subject, message, PUBLISH_TIMEOUT, may_be_stored=may_be_stored
                )
            finally:
                self._finish(message, outcome)

        task = asyncio.create_task(publish_again())
        self._publishing_again.add(task)
        task.add_done_callback(self._publishing_again.discard)

    def cancel(self) -> None:
        """End what is still being published, since the caller was cancelled."""
        for task in self._publishing_again:
            task.cancel()

    def _finish(self, message: Message, outcome: Outcome) -> None:
        self.outcomes[outcome] += 1
        self._in_flight -= 1
        self._bytes -= _size(message)
        self._has_finished.set()


def _check_subject(subject: str) -> None:
    if len(subject) > MAX_SUBJECT or not is_literal(subject):
        raise ValueError(f"this can't be a subject to publish to: {printable(subject)}")


def _log_stored(message: Message, outcome: Outcome) -> None:
    log.info("%s was already stored" if outcome == Outcome.DUPLICATE else "published %s", message)


def _size(message: Message) -> int:
    return OVERHEAD + len(message.payload)
