"""Dead letters: whether a message is one, its reprocessing, and its removal."""

import asyncio
import logging
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.errors import NotFoundError

from jobqueue.advisories import ADVISORY, DeadLetter
from jobqueue.durables import Durables
from jobqueue.errors import describe_error
from jobqueue.in_flight import ACK
from jobqueue.reading import StoredMessage, find_stored_at, get_message, parse_time
from jobqueue.streams import REQUEST_TIMEOUT, ack_subject, probe_ack

log = logging.getLogger(__name__)


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


async def begin_reprocessing(
    nc: Client, durables: Durables, dead_letter: DeadLetter, advisory: Msg
) -> StoredMessage | None:
    """Return the message of an advisory; None, with a log line, if there is nothing to reprocess.

    This is the DLQ processor's half of the protocol that jobqueue/claims.py describes: send a heartbeat, then read
    the advisory. If that is gone, an operator has claimed the dead letter.

    Args:
        nc: the connection.
        durables: those of the message's stream.
        dead_letter: what the advisory says.
        advisory: the advisory, in flight.

    Raises:
        nats.errors.Error: the request timed out.
    """
    await nc.publish(advisory.reply, Msg.Ack.Progress)
    await probe_ack(nc, dead_letter.ack_subject)  # fail now, and not after the work
    metadata = advisory.metadata
    message: StoredMessage | None
    message, durable, unclaimed = await asyncio.gather(
        get_message(nc, dead_letter.stream, dead_letter.sequence),
        durables.find(dead_letter.consumer),
        get_message(nc, metadata.stream, metadata.sequence.stream),
    )
    if message and why_alive(dead_letter, message, durable):  # perhaps the durable was asked before it died
        durables.forget(dead_letter.consumer)
        durable = await durables.find(dead_letter.consumer)
    why = why_alive(dead_letter, message, durable)
    if not why and not unclaimed:
        why = "is claimed by dlq/manage.py"
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
    if not durable:
        return f"will be redelivered: the durable {name} is gone"
    if not dead_letter.died_at:
        return ""
    if message.stored_at > dead_letter.died_at:
        return "is a later message: the stream was created again"
    if parse_time(durable["created"]) > dead_letter.died_at:
        return f"will be redelivered: the durable {name} was created after it had died"
    if dead_letter.sequence > durable["delivered"]["stream_seq"]:
        return f"will be redelivered: {name} has not delivered it yet"
    limit = durable["config"]["max_deliver"]
    if limit > dead_letter.max_deliver or limit < 0 <= dead_letter.max_deliver:
        return f"may be redelivered: {name} has another MaxDeliver, {limit}"
    return ""


def as_delivered(nc: Client, message: StoredMessage, dead_letter: DeadLetter) -> Msg:
    """Return a dead letter as its consumer got it in its last delivery."""
    last_delivery = ack_subject(*dead_letter[:4], message.stored_at)
    return Msg(nc, message.subject, last_delivery, message.data, message.headers or None)


async def remove_message(nc: Client, dead_letter: DeadLetter, message: StoredMessage) -> bool:
    """Remove a dead letter from its work queue by an ack of its last delivery, in spite of the stream's deny_delete.

    Returns:
        Whether it was there.

    Raises:
        nats.errors.Error: the request timed out, and the message may still be there.
    """
    # Another message may have its sequence, if the stream was deleted and created again meanwhile.
    is_same = message.is_fresh(nc) or message.stored_at == await find_stored_at(
        nc, dead_letter.stream, message.sequence
    )
    if is_same:
        await nc.request(dead_letter.ack_subject, ACK, REQUEST_TIMEOUT)
    return is_same
