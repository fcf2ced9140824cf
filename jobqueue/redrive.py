"""Sending a dead letter back: its message is published again, for fresh attempts."""

import asyncio
import logging
import re
from functools import partial

from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.dead_letters import DeadLetter, remove_message
from jobqueue.errors import printable
from jobqueue.reading import StoredMessage
from jobqueue.retrying import retry

log = logging.getLogger(__name__)

REDRIVE = "Dlq-Redrive"  # header of an advisory: somebody is sending its message back
PUBLISH_TIMEOUT = 5.0  # seconds for one attempt
RETRY_FOR = 30.0  # seconds; well within the stream's duplicate window


def is_redrive(advisory: Msg) -> bool:
    """Return whether an advisory asks for its message to be sent back."""
    return REDRIVE in (advisory.headers or {})


async def send_back(nc: Client, dead_letter: DeadLetter, message: StoredMessage) -> None:
    """Publish a message again, then remove the dead letter.

    Its headers come with it, but for those that tell the server what to do (`Nats-...`: expected sequences, TTL,
    schedule), which were meant for the first publish. Whoever sends it back, and how often, it has the same id, so that
    within the duplicate window it is stored once.

    Raises:
        nats.errors.Error: the server didn't answer, or refuses; the dead letter is still there.
    """
    stream, now = dead_letter.stream, asyncio.get_running_loop().time
    deadline = now() + RETRY_FOR
    headers = {name: value for name, value in message.headers.items() if not name.lower().startswith("nats-")}
    first_id = re.sub(r"\.retry-\d+$", "", message.headers.get("Nats-Msg-Id", stream))
    headers["Nats-Msg-Id"] = f"{first_id}.retry-{message.sequence}"
    publish = partial(nc.jetstream().publish, message.subject, message.data, PUBLISH_TIMEOUT, stream, headers)
    stored = await retry(publish, f"# {message.sequence} is not published yet", lambda _: now() > deadline)
    await remove_message(nc, dead_letter, message)
    log.info("sent back %s: # %d in %s is # %d now", printable(message.data), message.sequence, stream, stored.seq)
