"""All dead letters of a stream, with and without an advisory: which there are, and what each one is."""

import base64
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any

from nats.aio.client import Client

from jobqueue.advisories import DeadLetter, Item
from jobqueue.dead_letters import why_alive
from jobqueue.durables import Durables
from jobqueue.lost_advisories import Search
from jobqueue.reading import MAX_REQUESTS, StoredMessage, format_time, gather_some, get_message


async def find_without_advisory(nc: Client, dlq_stream: str, dlq_durable: str, stream: str) -> dict[int, Item]:
    """Return the dead letters without an advisory, by stream sequence; if there are any, that takes a while.

    Raises:
        nats.errors.Error: the request timed out, or the stream is no work queue.
    """
    found = await Search(nc, dlq_stream, dlq_durable, stream).run()
    return {
        sequence: Item(
            DeadLetter(
                stream,
                durable["name"],
                max(durable["config"]["max_deliver"], 1),
                sequence,
                died_at=0,
                max_deliver=durable["config"]["max_deliver"],
            ),
            (),
        )
        for durable, sequences in found
        for sequence in sequences
    }


async def verify_dead(
    nc: Client, durables: Durables, items: Iterable[Item]
) -> AsyncIterator[tuple[Item, StoredMessage | None, str]]:
    """Yield each item with its message, and why it is no dead letter any more, or "".

    Raises:
        nats.errors.Error: the request timed out.
    """
    unchecked = list(items)
    while unchecked:
        some, unchecked = unchecked[:MAX_REQUESTS], unchecked[MAX_REQUESTS:]
        messages = await gather_some(
            [partial(get_message, nc, item.dead_letter.stream, item.dead_letter.sequence) for item in some]
        )
        found = {name: await durables.find(name) for name in {item.dead_letter.consumer for item in some}}
        for item, message in zip(some, messages, strict=True):
            yield item, message, why_alive(item.dead_letter, message, found[item.dead_letter.consumer])


def as_json(item: Item, message: StoredMessage) -> dict[str, Any]:
    """Return all that is known of a dead letter."""
    try:
        payload = {"payload": message.data.decode()}
    except UnicodeDecodeError:
        payload = {"payload_base64": base64.b64encode(message.data).decode()}
    return {
        "sequence": message.sequence,
        "subject": message.subject,
        "published": format_time(message.stored_at),
        "died": format_time(item.dead_letter.died_at) if item.dead_letter.died_at else None,
        "deliveries": item.dead_letter.deliveries,
        "id": message.headers.get("Nats-Msg-Id"),
        "headers": message.headers,
        **payload,
    }
