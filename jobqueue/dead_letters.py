"""Dead letters: the messages whose deliveries are exhausted, as the server's MAX_DELIVERIES advisories name them.

Source: https://docs.nats.io/running-a-nats-service/nats_admin/monitoring/monitoring_jetstream (advisories).
"""

import json
import logging
from datetime import datetime
from typing import NamedTuple, TypeGuard

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.errors import NotFoundError

from jobqueue.arguments import is_name
from jobqueue.errors import describe_error
from jobqueue.in_flight import ACK
from jobqueue.streams import NO_MESSAGE_FOUND, ack_subject, probe_ack

log = logging.getLogger(__name__)

ADVISORY = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"  # .<stream>.<consumer>
REMOVE_TIMEOUT = 5.0  # seconds
CONSUMER_NOT_FOUND = 10014  # JetStream's error code


class DeadLetter(NamedTuple):
    """What an advisory says: which message, and the deliveries that it had."""

    stream: str
    consumer: str
    deliveries: int
    sequence: int

    @property
    def ack_subject(self) -> str:
        """The ack subject of its last delivery."""
        return ack_subject(*self)


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


def parse_advisory(advisory: bytes, stream: str) -> DeadLetter:
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


async def find_message(nc: Client, dead_letter: DeadLetter, died_at: datetime) -> Msg | None:
    """Return the message of an advisory; None, with a log line, if it is no dead letter any more.

    Args:
        nc: the connection.
        dead_letter: what the advisory says.
        died_at: when the stream of the advisories stored it.

    Returns:
        The message, whose `reply` is the ack subject of its last delivery.

    Raises:
        nats.errors.Error: the server didn't answer.
    """
    js = nc.jetstream()
    await probe_ack(nc, dead_letter.ack_subject)
    try:
        message = await js.get_msg(dead_letter.stream, dead_letter.sequence)
        durable = await js.consumer_info(dead_letter.stream, dead_letter.consumer)
    except NotFoundError as error:
        if error.err_code == NO_MESSAGE_FOUND:
            why = "is gone"
        elif error.err_code == CONSUMER_NOT_FOUND:
            why = f"will be delivered again: the durable {dead_letter.consumer} is gone"
        else:
            raise
    else:
        if message.time and message.time > died_at:
            why = "is a later message: the stream was created again"
        elif dead_letter.sequence > durable.delivered.stream_seq:
            why = f"will be delivered again: {dead_letter.consumer} doesn't know of a delivery"
        else:
            return Msg(nc, message.subject or "", dead_letter.ack_subject, message.data or b"", message.headers)
    log.info("nothing to reprocess: stream sequence # %d in %s %s", dead_letter.sequence, dead_letter.stream, why)
    return None


async def remove_message(nc: Client, message: Msg, dead_letter: DeadLetter, died_at: datetime) -> None:
    """Remove a dead letter from its work queue by an ack of its last delivery, in spite of the stream's deny_delete.

    Raises:
        nats.errors.Error: the server didn't answer, and the message may still be there.
    """
    if await find_message(nc, dead_letter, died_at):  # another message may have its sequence now
        await nc.request(message.reply, ACK, timeout=REMOVE_TIMEOUT)


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**64  # JSON's true is no number
