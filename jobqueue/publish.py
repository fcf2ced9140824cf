"""Publish messages to a stream: each is stored once, and what isn't stored is told."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import NamedTuple

from nats.aio.client import Client
from nats.errors import ConnectionReconnectingError, Error, MaxPayloadError
from nats.js.api import PubAck

from jobqueue.script import Failure, reason
from jobqueue.worker import retry

log = logging.getLogger(__name__)

PUBLISH_TIMEOUT = 5.0  # seconds for one attempt
RETRY_FOR = 30.0  # seconds, and one more attempt; well within the stream's duplicate window
STREAM_FULL = 10077  # JetStream's error code
HEADER = len("NATS/1.0\r\nNats-Msg-Id: \r\n\r\n")
ROOM = 1000  # messages on their way at a time
PIECE = 4096  # bytes; a message takes the room of one for each piece, so that large ones take no more memory


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
        return HEADER + len(self.id.encode()) + len(self.payload) <= nc.max_payload


async def publish(nc: Client, subject: str, message: Message) -> bool:
    """Publish one message, again and again for half a minute, and return whether the server has stored it.

    Args:
        nc: the connection.
        subject: where to.
        message: what. Either `published <label>` is logged, or why it isn't.

    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + RETRY_FOR

    async def attempt() -> PubAck:
        if not message.fits(nc):
            raise MaxPayloadError
        if not nc.is_connected:  # nats-py would send it later, perhaps when its id is forgotten
            raise ConnectionReconnectingError
        return await nc.jetstream().publish(
            subject, message.payload, timeout=PUBLISH_TIMEOUT, headers={"Nats-Msg-Id": message.id}
        )

    try:
        await retry(
            attempt,
            f"{message.label} is not published yet",
            lambda fault: loop.time() > deadline or getattr(fault, "err_code", None) == STREAM_FULL,
        )
    except (Error, TimeoutError) as error:
        log.error("%s is not published: %s", message.label, reason(error))
        return False
    log.info("published %s", message.label)
    return True


async def publish_many(nc: Client, subject: str, messages: AsyncIterator[Message]) -> int:
    """Publish messages, many at a time, and return how many of them the server has stored.

    Each is sent once by nats-py's `publish_async`, and then by publish() if that has failed. With many on their way
    the next one is not asked for before there is room again.

    Args:
        nc: the connection.
        subject: where to.
        messages: what.

    Raises:
        Failure: what `messages` has raised, when all before it is settled.

    """
    loop = asyncio.get_running_loop()
    js = nc.jetstream()
    room = asyncio.Semaphore(ROOM)
    sent: asyncio.Queue[tuple[Message, asyncio.Future[PubAck], float] | None] = asyncio.Queue()
    published = 0

    def settle(message: Message) -> None:
        for _ in range(_pieces(message)):
            room.release()

    async def again(message: Message) -> None:
        nonlocal published
        stored = await publish(nc, subject, message)
        published += stored
        settle(message)

    async def confirm() -> None:
        nonlocal published
        while item := await sent.get():
            message, answer, deadline = item
            if not answer.done():
                await asyncio.wait([answer], timeout=max(0, deadline - loop.time()))
            if answer.done() and not answer.exception():
                published += 1
                log.info("published %s", message.label)
                settle(message)
            else:
                answer.cancel()
                tasks.create_task(again(message))

    failure = None
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(confirm())
        try:
            async for message in messages:
                for _ in range(_pieces(message)):
                    await room.acquire()
                answer = None
                if nc.is_connected and message.fits(nc):  # nats-py never lets go of what it cannot send at once
                    with suppress(Error):
                        answer = await js.publish_async(subject, message.payload, headers={"Nats-Msg-Id": message.id})
                if answer:
                    sent.put_nowait((message, answer, loop.time() + PUBLISH_TIMEOUT))
                else:
                    tasks.create_task(again(message))
                async with room:  # the next one may not be wanted any more when there is room
                    pass
        except Failure as error:  # what is on its way is finished first
            failure = error
        sent.put_nowait(None)
    if failure:
        raise failure
    return published


def _pieces(message: Message) -> int:
    return min(ROOM, 1 + len(message.payload) // PIECE)
