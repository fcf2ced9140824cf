"""All dead letters of a stream, with and without an advisory: which there are, and what each one is."""

import base64
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Any, NamedTuple

from nats.aio.client import Client

from jobqueue.dead_letters import ADVISORY, DeadLetter, parse_stored, why_alive
from jobqueue.lost_advisories import Search
from jobqueue.reading import AT_A_TIME, StoredMessage, format_time, gather_some, get_message, read_messages
from jobqueue.streams import Durables, api_request


class Item(NamedTuple):
    """A dead letter, and the stream sequences of its advisories, if it has any; there may be more than one."""

    dead_letter: DeadLetter
    advisories: tuple[int, ...]


async def read_advisories(nc: Client, dlq_stream: str, stream: str) -> dict[int, Item]:
    """Return what the advisories name, by stream sequence. Some may be out of date.

    Raises:
        nats.errors.Error: the server doesn't answer.
    """

    def keep(advisory: StoredMessage) -> tuple[int, DeadLetter | None]:
        return advisory.sequence, parse_stored(advisory, stream)

    last = (await api_request(nc, f"STREAM.INFO.{dlq_stream}"))["state"]["last_seq"]
    items: dict[int, Item] = {}
    for advisory, dead_letter in await read_messages(nc, dlq_stream, f"{ADVISORY}.{stream}.*", [(1, last)], keep):
        if dead_letter:
            known = items.get(dead_letter.sequence)
            items[dead_letter.sequence] = Item(dead_letter, (*(known.advisories if known else ()), advisory))
    return items


async def find_unknown(nc: Client, dlq_stream: str, dlq_durable: str, stream: str) -> dict[int, Item]:
    """Return the dead letters without an advisory, by stream sequence; if there are any, that takes a while.

    Raises:
        nats.errors.Error: the server doesn't answer, or the stream is no work queue.
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


async def check(
    nc: Client, durables: Durables, items: Iterable[Item]
) -> AsyncIterator[tuple[Item, StoredMessage | None, str]]:
    """Yield each item with its message, and why it is no dead letter any more, or "".

    Raises:
        nats.errors.Error: the server doesn't answer.
    """
    unchecked = list(items)
    while unchecked:
        some, unchecked = unchecked[:AT_A_TIME], unchecked[AT_A_TIME:]
        messages = await gather_some(
            [partial(get_message, nc, item.dead_letter.stream, item.dead_letter.sequence) for item in some]
        )
        for item, message in zip(some, messages, strict=True):
            durable = await durables.find(item.dead_letter.consumer)
            yield item, message, why_alive(item.dead_letter, message, durable)


def as_json(dead_letter: DeadLetter, message: StoredMessage) -> dict[str, Any]:
    """Return all that is known of a dead letter."""
    try:
        payload = {"payload": message.data.decode()}
    except UnicodeDecodeError:
        payload = {"payload_base64": base64.b64encode(message.data).decode()}
    died_at = dead_letter.died_at
    return {
        "sequence": message.sequence,
        "subject": message.subject,
        "published": format_time(message.stored_at),
        "died": format_time(died_at) if died_at else None,
        "deliveries": dead_letter.deliveries,
        "id": message.headers.get("Nats-Msg-Id"),
        "headers": message.headers,
        **payload,
    }
