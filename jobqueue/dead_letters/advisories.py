"""The server's MAX_DELIVERIES advisories. Each is a hint that a message may be dead: anybody may have written it.

Source: https://docs.nats.io/running-a-nats-service/nats_admin/monitoring/monitoring_jetstream (advisories).
"""

import json
from contextlib import suppress
from sys import intern
from typing import NamedTuple, TypeGuard

from nats.js.api import PubAck

from jobqueue.connection.client import Client
from jobqueue.jetstream.durables import Durable
from jobqueue.jetstream.reading import StoredMessage, get_message, parse_time, read_messages
from jobqueue.jetstream.streams import (
    ADVISORY,
    REQUEST_TIMEOUT,
    api_request,
    dlq_command,
    is_name,
    queue_command,
    require_connection,
    require_stream,
)

ADVISORY_TYPE = "io.nats.jetstream.advisory.v1.max_deliver"


class Hint(NamedTuple):
    """What an advisory says of a message."""

    sequence: int
    consumer: str
    deliveries: int = 0
    died_at: int = 0  # nanoseconds; 0 if there is no advisory
    advisories: tuple[int, ...] = ()  # the stream sequences of all advisories of this message


async def require_streams(nc: Client, dlq_stream: str, stream: str) -> None:
    """Check that both streams exist, and that the first one may have advisories of the other.

    Raises:
        Failure: they don't.
    """
    await require_stream(nc, stream, ">", queue_command(stream, "SUBJECTS"))
    await require_stream(nc, dlq_stream, f"{ADVISORY}.{stream}.*", dlq_command(dlq_stream, stream))


async def read_hints(nc: Client, dlq_stream: str, stream: str, after: int = 0, share: float = 1.0) -> dict[int, Hint]:
    """Return what the advisories say whose own stream sequence is above `after`, by the message's stream sequence.

    It takes this share of the time.
    """
    hints: dict[int, Hint] = {}

    def take(advisory: StoredMessage) -> None:
        with suppress(ValueError):
            hint = parse_advisory(advisory.data, stream, advisory.stored_at)
            others = hints[hint.sequence].advisories if hint.sequence in hints else ()
            hints[hint.sequence] = hint._replace(advisories=(*others, advisory.sequence))

    last = (await api_request(nc, f"STREAM.INFO.{dlq_stream}"))["state"]["last_seq"]
    await read_messages(nc, dlq_stream, f"{ADVISORY}.{stream}.*", [(after + 1, last)], take, share)
    return hints


def parse_advisory(advisory: bytes, stream: str, stored_at: int = 0) -> Hint:
    """Return what an advisory of the stream says, or raise ValueError if it is none.

    Without a time of death in it that is `stored_at`, in nanoseconds: when the advisory itself was stored.
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
    with suppress(ValueError):  # the advisory may have been published later, but not before
        died_at = min(stored_at, max(0, parse_time(str(event.get("timestamp")))))
    return Hint(sequence, intern(consumer), deliveries, died_at)  # 100,000 of them may be in memory


async def publish_advisory(nc: Client, stream: str, durable: Durable, sequence: int) -> PubAck:
    """Publish an advisory like the server's own; within the duplicate window it is stored once, whoever publishes it.

    `durable` is the message's, as the server has just described it.
    """
    message_id = f"{stream}.{durable.name}.{sequence}.{durable.created}"
    advisory = {
        "type": ADVISORY_TYPE,
        "id": message_id,
        "timestamp": durable.described_at,
        "stream": stream,
        "consumer": durable.name,
        "stream_seq": sequence,
        "deliveries": max(durable.config["max_deliver"], 1),
        "max_deliver": durable.config["max_deliver"],
    }
    subject, payload = f"{ADVISORY}.{stream}.{durable.name}", json.dumps(advisory).encode()
    require_connection(nc, durable.reconnects)
    stored = await nc.jetstream().publish(subject, payload, REQUEST_TIMEOUT, headers={"Nats-Msg-Id": message_id})
    if stored.duplicate and not await get_message(nc, stored.stream, stored.seq):  # it has been purged since
        require_connection(nc, durable.reconnects)
        headers = {"Nats-Msg-Id": f"{message_id}.{stored.seq}"}
        stored = await nc.jetstream().publish(subject, payload, REQUEST_TIMEOUT, headers=headers)
    return stored


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**64  # JSON's true is no number
