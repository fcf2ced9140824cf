"""JetStream API requests, what a stream must have, and the ack subjects of its messages."""

import json
import logging
import shlex
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionReconnectingError, Error
from nats.js.errors import APIError, NotFoundError

from jobqueue.connection.retrying import retry_at_start
from jobqueue.errors import Failure, describe_error, printable

log = logging.getLogger(__name__)

ADVISORY = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"  # .<stream>.<consumer>
API_TIMEOUT = 1.0  # seconds
REQUEST_TIMEOUT = 5.0  # seconds for what a single attempt must not lose: a publish, an ack
VERSION_1_TOKENS = 9  # of an ack subject; version 2 has a domain and an account's hash before the stream


async def api_request(
    nc: Client,
    subject: str,
    payload: dict[str, Any] | None = None,
    timeout: float = API_TIMEOUT,  # noqa: ASYNC109
) -> dict[str, Any]:
    """Return the answer to a JetStream API request as it is on the wire; nats-py drops the fields that it doesn't know.

    Args:
        nc: the connection.
        subject: without `$JS.API.`, such as `STREAM.INFO.orders_stream`.
        payload: what to send as JSON.
        timeout: seconds.

    Raises:
        nats.js.errors.APIError: the answer is an error; NotFoundError where something is missing.
        nats.errors.Error: the request timed out.
    """
    answer = await nc.request(f"$JS.API.{subject}", json.dumps(payload).encode() if payload else b"", timeout)
    decoded: dict[str, Any] = json.loads(answer.data)
    if "error" in decoded:
        APIError.from_error(decoded["error"])
    return decoded


def require_connection(nc: Client, reconnects: int) -> None:
    """Raise an error unless there is a connection, and it is the one that had so many reconnects.

    To be called before anything is sent that acks, naks or publishes again: nats-py buffers that while disconnected,
    and sends it to whatever server answers next. Another stream may have the same sequences there.

    Raises:
        ConnectionReconnectingError: it isn't.
    """
    if not nc.is_connected or nc.stats["reconnects"] != reconnects:
        raise ConnectionReconnectingError


async def require_stream(nc: Client, stream: str, subject: str, *command: str) -> None:
    """Check that a stream exists, and that it may have messages of a subject, which may have wildcards.

    Raises:
        Failure: it doesn't, and `command` is what creates it; or it has other subjects.
    """
    try:
        info = await retry_at_start(lambda: api_request(nc, f"STREAM.INFO.{stream}"), stream)
    except NotFoundError:
        raise Failure(f"there is no stream {stream}: create it with {shlex.join(command)}") from None
    config = info["config"]
    subjects = config.get("subjects") or [">"]  # a mirror has those of its origin
    if any(subjects_overlap(subject, other) for other in subjects):
        return
    wrong = f"{stream} has no subject that {subject} matches: its subjects are {printable(', '.join(subjects))}"
    if not any(config.get(field) for field in ("sources", "subject_transform")):
        raise Failure(wrong)
    log.warning("%s, and those that it gets by its sources or transform", wrong)


def subjects_overlap(one: str, other: str) -> bool:
    """Return whether a subject can match both of two subjects with wildcards."""
    tokens, others = one.split("."), other.split(".")
    for token, its in zip(tokens, others, strict=False):
        if ">" in (token, its):
            return True
        if token != its and "*" not in (token, its):
            return False
    return len(tokens) == len(others)


def ack_subject(stream: str, durable: str, deliveries: int, sequence: int, consumer_seq: int = 0, time: int = 0) -> str:
    """Return the ack subject of a delivery (version 1, which every server takes); a field that nobody reads may be 0.

    Args:
        stream: the stream's name.
        durable: the durable's name.
        deliveries: how often the message had been delivered, this delivery included.
        sequence: the message's stream sequence.
        consumer_seq: the number of the delivery among all of the durable.
        time: when the message was stored, in nanoseconds.
    """
    return f"$JS.ACK.{stream}.{durable}.{deliveries}.{sequence}.{consumer_seq}.{time}.0"


def parse_ack_subject(subject: str) -> tuple[int, int, int]:
    """Return a delivery's stream sequence, when its message was stored, in nanoseconds, and its consumer sequence.

    Source: https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-15.md (both versions).
    """
    tokens = subject.split(".")
    at = 5 if len(tokens) == VERSION_1_TOKENS else 7
    return int(tokens[at]), int(tokens[at + 2]), int(tokens[at + 1])


async def probe_ack(nc: Client, subject: str) -> None:
    """Send a heartbeat, so that the server refuses at once an ack subject that this user may not publish to."""
    await nc.publish(subject, Msg.Ack.Progress)


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
