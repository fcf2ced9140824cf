"""The server's MAX_DELIVERIES advisories: each names a message whose deliveries are exhausted.

Source: https://docs.nats.io/running-a-nats-service/nats_admin/monitoring/monitoring_jetstream (advisories).
"""

import json
from contextlib import suppress
from typing import Any, NamedTuple, TypeGuard

from nats.aio.client import Client
from nats.js.api import PubAck

from jobqueue.arguments import is_name
from jobqueue.reading import StoredMessage, format_time, parse_time, read_messages
from jobqueue.streams import REQUEST_TIMEOUT, ack_subject, api_request, require_stream

ADVISORY = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"  # .<stream>.<consumer>
ADVISORY_TYPE = "io.nats.jetstream.advisory.v1.max_deliver"


class DeadLetter(NamedTuple):
    """What an advisory says: which message, and the deliveries that it had."""

    stream: str
    consumer: str
    deliveries: int
    sequence: int
    died_at: int  # nanoseconds; 0 if there is no advisory
    max_deliver: int  # of the durable, when the message died

    @property
    def ack_subject(self) -> str:
        """The ack subject of its last delivery."""
        return ack_subject(self.stream, self.consumer, self.deliveries, self.sequence)


class Item(NamedTuple):
    """A dead letter, and the stream sequences of its advisories, if it has any; there may be more than one."""

    dead_letter: DeadLetter
    advisories: tuple[int, ...]


async def require_streams(nc: Client, dlq_stream: str, stream: str) -> None:
    """Check that both streams exist, and that the first one may have advisories of the other.

    Raises:
        Failure: they don't.
    """
    await require_stream(nc, stream, ">", "scripts/create_orders_stream.sh", stream, "SUBJECTS")
    create = ("scripts/create_orders_unprocessed.sh", dlq_stream, stream)
    await require_stream(nc, dlq_stream, f"{ADVISORY}.{stream}.*", *create)


async def read_advisories(nc: Client, dlq_stream: str, stream: str, after: int = 0) -> dict[int, Item]:
    """Return what the advisories name, by stream sequence. Some may be out of date.

    Args:
        nc: the connection.
        dlq_stream: the stream of the advisories.
        stream: the stream of the messages.
        after: read only advisories with a higher stream sequence than this one.

    Raises:
        nats.errors.Error: the request timed out.
    """

    def keep(advisory: StoredMessage) -> tuple[int, DeadLetter | None]:
        with suppress(ValueError):
            return advisory.sequence, parse_advisory(advisory.data, stream, advisory.stored_at)
        return advisory.sequence, None

    last = (await api_request(nc, f"STREAM.INFO.{dlq_stream}"))["state"]["last_seq"]
    items: dict[int, Item] = {}
    for number, dead_letter in await read_messages(nc, dlq_stream, f"{ADVISORY}.{stream}.*", [(after + 1, last)], keep):
        if dead_letter:
            known = items.get(dead_letter.sequence)
            items[dead_letter.sequence] = Item(dead_letter, (*(known.advisories if known else ()), number))
    return items


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


async def publish_advisory(
    nc: Client, stream: str, durable: dict[str, Any], sequence: int, died_at: int, headers: dict[str, str]
) -> PubAck:
    """Publish an advisory like the server's own; within the duplicate window it is stored once.

    Args:
        nc: the connection.
        stream: the stream's name.
        durable: what the server says of the durable.
        sequence: the dead letter's stream sequence.
        died_at: when it died, in nanoseconds; 0 for now.
        headers: of the advisory; `Nats-Msg-Id` is one of them.

    Raises:
        nats.errors.Error: it may not be stored.
    """
    name, max_deliver = durable["name"], durable["config"]["max_deliver"]
    advisory = {
        "type": ADVISORY_TYPE,
        "id": headers["Nats-Msg-Id"],
        # By the server's clock, as the durable's creation, with which it is compared.
        "timestamp": format_time(died_at) if died_at else durable["ts"],
        "stream": stream,
        "consumer": name,
        "stream_seq": sequence,
        "deliveries": max(max_deliver, 1),
        "max_deliver": max_deliver,
    }
    payload = json.dumps(advisory).encode()
    return await nc.jetstream().publish(f"{ADVISORY}.{stream}.{name}", payload, REQUEST_TIMEOUT, headers=headers)


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**64  # JSON's true is no number
