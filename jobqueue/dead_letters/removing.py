"""What ends a dead letter: its removal, and its redrive (it is published again, for fresh attempts)."""

import asyncio
import json
import re

from nats.errors import ConnectionReconnectingError, Error, MaxPayloadError, NoRespondersError
from nats.js.errors import APIError

from jobqueue.connection.client import Client
from jobqueue.connection.retrying import retry
from jobqueue.dead_letters.headers import find_header, replace_nats_headers
from jobqueue.dead_letters.letter import DeadLetter
from jobqueue.dead_letters.verifying import GONE
from jobqueue.errors import describe_error
from jobqueue.jetstream.acks import ACK, ack_subject
from jobqueue.jetstream.reading import get_message
from jobqueue.jetstream.streams import REQUEST_TIMEOUT, require_connection

REDRIVE_TIMEOUT = 20.0  # seconds; well within the duplicate window


async def remove(nc: Client, letter: DeadLetter) -> bool:
    """Remove a dead letter from its work queue by an ack of its last delivery, in spite of the stream's deny_delete.

    Return whether it was there. After an error it may still be.
    """
    if not await _is_same(nc, letter):
        return False
    subject = ack_subject(letter.stream, letter.durable.name, letter.deliveries, letter.message.sequence)
    await nc.request(subject, ACK, REQUEST_TIMEOUT)
    return True


async def redrive(nc: Client, letter: DeadLetter) -> int:
    """Publish a dead letter again, remove it, and return its new stream sequence. After an error it may still be there.

    Its headers come with it as they are, but for those that tell the server what to do (`Nats-...`: expected
    sequences, TTL, schedule), which were meant for the first publish. Whoever redrives it, and how often, it has the
    same id, so that within the duplicate window it is stored once; after a lost answer it is published again at once.
    """
    message, now = letter.message, asyncio.get_running_loop().time
    first_id = re.sub(r"\.retry-\d+$", "", find_header(message.header_block, "Nats-Msg-Id"))
    first_id = first_id or f"{letter.stream}.{message.sequence}"
    added = {"Nats-Expected-Stream": letter.stream, "Nats-Msg-Id": f"{first_id}.retry-{letter.message.sequence}"}
    headers = replace_nats_headers(message.header_block, added)
    if len(headers) + len(message.data) > nc.max_payload:  # the server would end the connection
        raise MaxPayloadError

    async def publish() -> int:
        if not await _is_same(nc, letter):
            raise Error(f"it {GONE}")
        answer = await nc.request(message.subject, message.data, REQUEST_TIMEOUT, headers=headers)
        stored = json.loads(answer.data)
        if "error" in stored:
            APIError.from_error(stored["error"])  # raises
        return int(stored["seq"])

    what, deadline = f"# {letter.message.sequence} in {letter.stream}", now() + REDRIVE_TIMEOUT
    try:
        stored = await retry(publish, what, lambda _: now() > deadline)
        await retry(lambda: remove(nc, letter), what, lambda _: now() > deadline)
    except (TimeoutError, NoRespondersError, ConnectionReconnectingError) as error:
        raise Error(f"{describe_error(error)}; it may be in the queue already: retry it within two minutes") from None
    return stored


async def _is_same(nc: Client, letter: DeadLetter) -> bool:
    """Return whether the stream still has this message, on this connection; nothing is awaited after the check.

    Its sequence may have another message if the stream was created again, or another server has answered since.
    """
    if letter.message.is_fresh(nc):
        return True
    reconnects = nc.reconnects
    require_connection(nc, reconnects)
    found = await get_message(nc, letter.stream, letter.message.sequence)
    require_connection(nc, reconnects)
    return found is not None and found.stored_at == letter.message.stored_at
