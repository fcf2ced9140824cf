"""Dead letters: the messages that the server has given up delivering, as its MAX_DELIVERIES advisories name them.

Source: https://docs.nats.io/running-a-nats-service/nats_admin/monitoring/monitoring_jetstream (advisories).
"""

import json
import logging
from datetime import datetime
from typing import NamedTuple, TypeGuard

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.js.errors import NotFoundError

from jobqueue.script import is_name
from jobqueue.worker import ACK

log = logging.getLogger(__name__)

SETTLE_TIMEOUT = 5.0  # seconds
NO_CONSUMER, NO_MESSAGE = 10014, 10037  # JetStream's error codes


class DeadLetter(NamedTuple):
    """What an advisory says: which message, and the deliveries that it had."""

    stream: str
    consumer: str
    deliveries: int
    sequence: int


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
            ack_subject = f"$JS.ACK.{dead.stream}.{dead.consumer}.{dead.deliveries}.{dead.sequence}.0.0.0"
            return Msg(nc, message.subject or "", ack_subject, message.data or b"", message.headers)
    log.info("nothing to reprocess: stream sequence # %d in %s %s", dead.sequence, dead.stream, why)
    return None


async def settle(nc: Client, message: Msg, dead: DeadLetter, died: datetime) -> None:
    """Remove a dead letter from its work queue by an ack of its last delivery, in spite of the stream's deny_delete.

    Raises:
        nats.errors.Error: the server has not answered, and the message is still there.

    """
    try:
        await nc.request(message.reply, ACK, timeout=SETTLE_TIMEOUT)
    except (TimeoutError, NoRespondersError):
        if await find(nc, dead, died):
            raise


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**64  # JSON's true is no number
