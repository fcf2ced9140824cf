"""Dead letters: the messages whose deliveries are exhausted, as the server's MAX_DELIVERIES advisories name them.

Source: https://docs.nats.io/running-a-nats-service/nats_admin/monitoring/monitoring_jetstream (advisories).
"""

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any, NamedTuple, TypeGuard

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import PubAck
from nats.js.errors import NotFoundError

from jobqueue.arguments import is_name
from jobqueue.errors import describe_error
from jobqueue.in_flight import ACK
from jobqueue.reading import StoredMessage, find_stored_at, format_time, get_message, parse_time
from jobqueue.streams import Durables, ack_subject, probe_ack

log = logging.getLogger(__name__)

ADVISORY = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"  # .<stream>.<consumer>
ADVISORY_TYPE = "io.nats.jetstream.advisory.v1.max_deliver"
TIMEOUT = 5.0  # seconds


class DeadLetter(NamedTuple):
    """What an advisory says: which message, and the deliveries that it had."""

    stream: str
    consumer: str
    deliveries: int
    sequence: int
    died_at: int  # nanoseconds; 0 if there is no advisory
    max_deliver: int  # of the durable, when the message died


async def warn_if_lost(nc: Client, stream: str, durable: str) -> None:
    """Log a warning when no stream keeps the advisories of a durable."""
    advisory = f"{ADVISORY}.{stream}.{durable}"
    try:
        await nc.jetstream().find_stream_name_by_subject(advisory)
    except NotFoundError:
        log.warning(
            "no stream keeps the advisories %s: dead letters will go unnoticed, until you create one with "
            "scripts/create_orders_unprocessed.sh DLQ_STREAM %s",
            advisory,
            stream,
        )
    except Error as error:
        log.warning("cannot tell whether a stream keeps the advisories %s: %s", advisory, describe_error(error))


def parse_advisory(advisory: bytes, stream: str, stored_at: int) -> DeadLetter:
    """Return what a MAX_DELIVERIES advisory of the stream says.

    Args:
        advisory: its payload.
        stream: the stream's name.
        stored_at: when the advisory was stored, in nanoseconds.

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
    died_at = stored_at
    with suppress(ValueError):  # the advisory may have been published again since
        died_at = min(stored_at, parse_time(str(event.get("timestamp"))))
    max_deliver = event.get("max_deliver")
    return DeadLetter(
        stream, consumer, deliveries, sequence, died_at, max_deliver if type(max_deliver) is int else deliveries
    )


def parse_stored(advisory: StoredMessage, stream: str) -> DeadLetter | None:
    """Return what an advisory that was read from its stream says; None if it is malformed."""
    with suppress(ValueError):
        return parse_advisory(advisory.data, stream, advisory.stored_at)
    return None


async def find_message(nc: Client, durables: Durables, dead_letter: DeadLetter, advisory: Msg) -> StoredMessage | None:
    """Return the message of an advisory; None, with a log line, if there is nothing to reprocess.

    Args:
        nc: the connection.
        durables: those of the message's stream.
        dead_letter: what the advisory says.
        advisory: the advisory, in flight.

    Raises:
        nats.errors.Error: the server didn't answer.
    """
    # jobqueue/claims.py hears this heartbeat, and leaves the dead letter to us; or it has removed the advisory before.
    await nc.publish(advisory.reply, Msg.Ack.Progress)
    await probe_ack(nc, ack_subject(*dead_letter[:4]))  # better than after the work
    metadata = advisory.metadata
    message: StoredMessage | None
    message, durable, unclaimed = await asyncio.gather(
        get_message(nc, dead_letter.stream, dead_letter.sequence),
        durables.find(dead_letter.consumer),
        get_message(nc, metadata.stream, metadata.sequence.stream),
    )
    why = why_alive(dead_letter, message, durable)
    if not why and not unclaimed:
        why = "is in the hands of dlq/manage.py"
    if why:
        log.info("nothing to reprocess: stream sequence # %d in %s %s", dead_letter.sequence, dead_letter.stream, why)
        return None
    return message


def why_alive(dead_letter: DeadLetter, message: StoredMessage | None, durable: dict[str, Any] | None) -> str:
    """Return why a message is no dead letter any more, whatever its advisory says; "" if it is.

    Args:
        dead_letter: what the advisory says.
        message: the message, None if it is gone.
        durable: what the server says of the durable, None if it is gone.
    """
    name = dead_letter.consumer
    if not message:
        return "is gone"
    if not dead_letter.died_at:
        return ""
    if message.stored_at > dead_letter.died_at:
        return "is a later message: the stream was created again"
    if not durable:
        return f"will be delivered again: the durable {name} is gone"
    if parse_time(durable["created"]) > dead_letter.died_at:
        return f"will be delivered again: the durable {name} was created after it had died"
    if dead_letter.sequence > durable["delivered"]["stream_seq"]:
        return f"will be delivered again: {name} doesn't know of a delivery"
    limit = durable["config"]["max_deliver"]
    if limit > dead_letter.max_deliver or limit < 0 <= dead_letter.max_deliver:
        return f"may be delivered again: {name} has another MaxDeliver, {limit}"
    return ""


def as_delivered(nc: Client, message: StoredMessage, dead_letter: DeadLetter) -> Msg:
    """Return a dead letter as its consumer got it in its last delivery."""
    last_delivery = ack_subject(*dead_letter[:4], message.stored_at)
    return Msg(nc, message.subject, last_delivery, message.data, message.headers or None)


async def remove_message(nc: Client, dead_letter: DeadLetter, message: StoredMessage) -> None:
    """Remove a dead letter from its work queue by an ack of its last delivery, in spite of the stream's deny_delete.

    Raises:
        nats.errors.Error: the server didn't answer, and the message may still be there.
    """
    # Another message may have its sequence, if the stream was deleted and created again meanwhile.
    is_same = message.is_fresh(nc) or message.stored_at == await find_stored_at(
        nc, dead_letter.stream, message.sequence
    )
    if is_same:
        await nc.request(ack_subject(*dead_letter[:4]), ACK, TIMEOUT)


async def publish_advisory(
    nc: Client, stream: str, durable: dict[str, Any], sequence: int, died_at: int = 0, **headers: str
) -> PubAck:
    """Publish an advisory like the server's own; within the duplicate window it is stored once.

    Args:
        nc: the connection.
        stream: the stream's name.
        durable: what the server says of the durable.
        sequence: the dead letter's stream sequence.
        died_at: when it died, in nanoseconds; by default, now.
        headers: for the advisory.

    Raises:
        nats.errors.Error: it may not be stored.
    """
    name, max_deliver = durable["name"], durable["config"]["max_deliver"]
    message_id = f"{stream}.{name}.{sequence}.{durable['created']}.{max_deliver}"
    advisory = {
        "type": ADVISORY_TYPE,
        "id": message_id,
        # By the server's clock, as the durable's creation, with which it is compared.
        "timestamp": format_time(died_at) if died_at else durable["ts"],
        "stream": stream,
        "consumer": name,
        "stream_seq": sequence,
        "deliveries": max(max_deliver, 1),
        "max_deliver": max_deliver,
    }
    payload = json.dumps(advisory).encode()
    headers = {"Nats-Msg-Id": message_id} | headers
    return await nc.jetstream().publish(f"{ADVISORY}.{stream}.{name}", payload, TIMEOUT, headers=headers)


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**64  # JSON's true is no number
