"""Redriving a dead letter: its message is published again, for fresh attempts."""

import logging
import re

from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.advisories import DeadLetter
from jobqueue.dead_letters import remove_message
from jobqueue.errors import printable
from jobqueue.reading import StoredMessage
from jobqueue.redelivery import without_instructions
from jobqueue.streams import REQUEST_TIMEOUT

log = logging.getLogger(__name__)

REDRIVE_HEADER = "Dlq-Redrive"  # of an advisory: an operator has begun to redrive its message


def is_redrive(advisory: Msg) -> bool:
    """Return whether an advisory asks for its message to be redriven."""
    return REDRIVE_HEADER in (advisory.headers or {})


async def redrive(nc: Client, dead_letter: DeadLetter, message: StoredMessage) -> None:
    """Publish a message again, then remove the dead letter.

    Its headers come with it, but for those that tell the server what to do (`Nats-...`: expected sequences, TTL,
    schedule), which were meant for the first publish. Whoever redrives it, and how often, it has the same id, so that
    within the duplicate window it is stored once.

    Raises:
        nats.errors.Error: the request timed out or was refused; the dead letter is still there.
    """
    stream = dead_letter.stream
    headers = without_instructions(message.headers)
    first_id = re.sub(r"\.retry-\d+$", "", message.headers.get("Nats-Msg-Id", stream))
    headers["Nats-Msg-Id"] = f"{first_id}.retry-{message.sequence}"
    stored = await nc.jetstream().publish(message.subject, message.data, REQUEST_TIMEOUT, stream, headers)
    await remove_message(nc, dead_letter, message)
    log.info("redriven %s: # %d in %s is # %d now", printable(message.data), message.sequence, stream, stored.seq)
