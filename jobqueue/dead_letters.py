"""Dead letters: the messages that the server has given up delivering, as its MAX_DELIVERIES advisories name them.

The server publishes an advisory once, as a plain message, so it may be lost; and it gives up on an advisory too,
when that was delivered in vain. revive() finds the dead letters that are left then.

Source: https://docs.nats.io/running-a-nats-service/nats_admin/monitoring/monitoring_jetstream (advisories).
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import NamedTuple, TypeGuard

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js import JetStreamContext
from nats.js.api import ConsumerInfo, RetentionPolicy
from nats.js.errors import NotFoundError

from jobqueue.script import is_name, reason
from jobqueue.worker import ACK

log = logging.getLogger(__name__)

ADVISORY = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"  # .<stream>.<consumer>
TYPE = "io.nats.jetstream.advisory.v1.max_deliver"
SETTLE_TIMEOUT = 5.0  # seconds
REVIVE_EVERY = 5.0  # seconds between two looks
NO_CONSUMER, NO_MESSAGE = 10014, 10037  # JetStream's error codes


class DeadLetter(NamedTuple):
    """What an advisory says: which message, and the deliveries that it had."""

    stream: str
    consumer: str
    deliveries: int
    sequence: int

    @property
    def ack_subject(self) -> str:
        """The ack subject of its last delivery; the server reads none of the last three numbers."""
        return f"$JS.ACK.{self.stream}.{self.consumer}.{self.deliveries}.{self.sequence}.0.0.0"


async def warn_if_lost(nc: Client, stream: str, durable: str) -> None:
    """Log a warning when no stream keeps the advisories of a durable."""
    advisory = f"{ADVISORY}.{stream}.{durable}"
    try:
        await nc.jetstream().find_stream_name_by_subject(advisory)
    except NotFoundError:
        log.warning(
            "no stream keeps the advisories %s: nobody will hear of dead letters, until you create one with "
            "scripts/create_orders_unprocessed.sh DLQ_STREAM %s",
            advisory,
            stream,
        )
    except Error as error:
        log.warning("cannot tell whether a stream keeps the advisories %s: %s", advisory, reason(error))


def parse(advisory: bytes, stream: str) -> DeadLetter:
    """Return what a MAX_DELIVERIES advisory of the stream says.

    Raises:
        ValueError: it is no such advisory.

    """
    try:
        event = json.loads(advisory)
    except RecursionError:
        raise ValueError from None
    if not isinstance(event, dict) or event.get("stream") != stream:
        raise ValueError
    consumer, deliveries, sequence = (event.get(key) for key in ("consumer", "deliveries", "stream_seq"))
    if not is_name(consumer) or not _is_number(deliveries) or not _is_number(sequence):
        raise ValueError
    return DeadLetter(stream, consumer, deliveries, sequence)


async def find(nc: Client, dead: DeadLetter, died: datetime) -> Msg | None:
    """Return the message of an advisory; None, with a log line, if it is no dead letter any more.

    Args:
        nc: the connection.
        dead: what the advisory says.
        died: when the stream of the advisories stored it.

    Returns:
        The message, whose `reply` is the ack subject of its last delivery.

    Raises:
        nats.errors.Error: the server could not tell.

    """
    js = nc.jetstream()
    # What may not be settled must not be worked on: the server refuses this before it answers the requests after it.
    await nc.publish(dead.ack_subject, Msg.Ack.Progress)
    try:
        message = await js.get_msg(dead.stream, dead.sequence)
        durable = await js.consumer_info(dead.stream, dead.consumer)
    except NotFoundError as error:
        if error.err_code == NO_MESSAGE:
            why = "is gone"
        elif error.err_code == NO_CONSUMER:
            why = f"will be delivered again: the durable {dead.consumer} is gone"
        else:
            raise
    else:
        if message.time and message.time > died:
            why = "is a later message: the stream was created again"
        elif dead.sequence > durable.delivered.stream_seq:
            why = f"will be delivered again: {dead.consumer} doesn't know of a delivery"
        else:
            return Msg(nc, message.subject or "", dead.ack_subject, message.data or b"", message.headers)
    log.info("nothing to reprocess: stream sequence # %d in %s %s", dead.sequence, dead.stream, why)
    return None


async def settle(nc: Client, message: Msg, dead: DeadLetter, died: datetime) -> None:
    """Remove a dead letter from its work queue by an ack of its last delivery, in spite of the stream's deny_delete.

    Raises:
        nats.errors.Error: the server has not answered, and the message is still there.

    """
    if await find(nc, dead, died):  # the ack of one that isn't there might remove what has its sequence now
        await nc.request(message.reply, ACK, timeout=SETTLE_TIMEOUT)


async def revive(nc: Client, advisories: str, stream: str, wait: float) -> None:
    """Find the dead letters of a stream that no advisory is on its way for, and publish one for each, again and again.

    Nobody heard of them, since nothing kept the server's advisory, or the advisory's own deliveries are used up.
    A message is stuck when its durable has nothing left to deliver or to wait for, and the stream still holds it.
    Any number of processes may do that at the same time: within the duplicate window they publish one advisory.

    Args:
        nc: the connection.
        advisories: the stream that keeps the advisories.
        stream: the stream of the messages.
        wait: seconds after which what is stuck must be so still; on replicas acks and advisories arrive late.

    """
    complaint = ""
    while True:
        try:
            await _revive(nc, advisories, stream, wait)
            complaint = ""
        except Exception as error:  # whatever it is, the next look comes
            if complaint != reason(error):
                complaint = reason(error)
                log.warning("cannot look for dead letters without an advisory: %s; trying again", complaint)
        await asyncio.sleep(REVIVE_EVERY)


async def _revive(nc: Client, advisories: str, stream: str, wait: float) -> None:
    js = nc.jetstream()
    if (await js.stream_info(stream)).config.retention != RetentionPolicy.WORK_QUEUE:
        raise Error(f"{stream} is no work queue, and keeps what is done")
    seen = await _idle(js, stream, advisories)
    await asyncio.sleep(wait)
    still = [seen[key] for key in await _idle(js, stream, advisories) if key in seen]
    used_up = [durable for durable in still if durable.stream_name == advisories]
    if not used_up:
        return  # advisories are on their way
    for durable in used_up:
        async for advisory in _stuck(js, durable):
            await nc.request(advisory.ack_subject, ACK, timeout=SETTLE_TIMEOUT)
    for durable in still:
        if durable.stream_name == stream:
            async for dead in _stuck(js, durable):
                await _announce(js, dead)


async def _idle(js: JetStreamContext, *streams: str) -> dict[tuple[str, str, datetime], ConsumerInfo]:
    """Return the durables that have nothing to deliver and nothing to wait for."""
    return {
        (stream, durable.name, durable.created): durable
        for stream in streams
        for durable in await js.consumers_info(stream)
        if durable.num_pending == 0 and durable.num_ack_pending == 0
    }


async def _stuck(js: JetStreamContext, durable: ConsumerInfo) -> AsyncIterator[DeadLetter]:
    """Yield what the stream still holds of all that an idle durable has delivered."""
    stream, config = durable.stream_name, durable.config
    last = durable.delivered.stream_seq if durable.delivered else 0
    for subject in config.filter_subjects or [config.filter_subject or ">"]:
        sequence = 0
        while sequence < last:
            try:
                message = await js.get_msg(stream, sequence + 1, subject, next=True)
            except NotFoundError:
                break
            sequence = message.seq or last
            if sequence <= last:
                yield DeadLetter(stream, durable.name, max(config.max_deliver or 1, 1), sequence)


async def _announce(js: JetStreamContext, dead: DeadLetter) -> None:
    """Publish an advisory like the server's own."""
    message_id = f"{dead.stream}.{dead.consumer}.{dead.sequence}"
    advisory = {
        "type": TYPE,
        "id": message_id,
        "timestamp": datetime.now(UTC).isoformat(),
        "stream": dead.stream,
        "consumer": dead.consumer,
        "stream_seq": dead.sequence,
        "deliveries": dead.deliveries,
    }
    subject = f"{ADVISORY}.{dead.stream}.{dead.consumer}"
    stored = await js.publish(subject, json.dumps(advisory).encode(), headers={"Nats-Msg-Id": message_id})
    if not stored.duplicate:
        log.info("dead letter # %d in %s had no advisory left: published one", dead.sequence, dead.stream)


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**64  # JSON's true is no number
