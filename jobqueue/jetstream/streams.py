"""JetStream API requests, and what a stream must have."""

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any, TypeGuard

from nats.errors import ConnectionReconnectingError, Error
from nats.js.errors import APIError, NotFoundError

from jobqueue.connection.client import Client
from jobqueue.connection.retrying import retry_at_start
from jobqueue.errors import TRANSIENT_ERRORS, Failure, describe_error, printable

log = logging.getLogger(__name__)

MAX_NAME = 255  # characters
FILTER = re.compile(r"((\*|[^*>.]+)\.)*(\*|>|[^*>.]+)")
ADVISORY = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"  # .<stream>.<consumer>
API_TIMEOUT = 1.0  # seconds
REQUEST_TIMEOUT = 5.0  # seconds for what a single attempt must not lose: a publish, an ack


async def api_request(
    nc: Client,
    subject: str,
    payload: dict[str, Any] | None = None,
    timeout: float = API_TIMEOUT,  # noqa: ASYNC109
) -> dict[str, Any]:
    """Return the answer to a JetStream API request as it is on the wire; nats-py drops the fields that it doesn't know.

    The subject is without `$JS.API.`, such as `STREAM.INFO.orders_stream`.
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
    """
    if not nc.is_connected or nc.reconnects != reconnects:
        raise ConnectionReconnectingError


async def require_stream(nc: Client, stream: str, subject: str, command: str) -> None:
    """Check that a stream exists, and that it may have messages of a subject, which may have wildcards.

    Raises:
        Failure: it doesn't, and `command` is what creates it; or it has other subjects.
    """
    try:
        info = await retry_at_start(lambda: api_request(nc, f"STREAM.INFO.{stream}"), stream)
    except NotFoundError:
        raise Failure(f"there is no stream {stream}: create it with {command}") from None
    config = info["config"]
    subjects = config.get("subjects") or [">"]  # a mirror has those of its origin
    if any(subjects_overlap(subject, other) for other in subjects):
        return
    wrong = f"{stream} has no subject that {subject} matches: its subjects are {printable(', '.join(subjects))}"
    if not any(config.get(field) for field in ("sources", "subject_transform")):
        raise Failure(wrong)
    log.warning("%s, and those that it gets by its sources or transform", wrong)


def is_subject(value: object) -> TypeGuard[str]:
    """Return whether a value can be a subject, by the server's rules."""
    return isinstance(value, str) and value.isprintable() and " " not in value and all(value.split("."))


def is_literal(value: str) -> bool:
    """Return whether a value can be a subject to publish to: one without wildcards."""
    return is_subject(value) and not set(value) & set("*>")


def is_filter(value: str) -> bool:
    """Return whether a value can be a subject with or without wildcards."""
    return is_subject(value) and bool(FILTER.fullmatch(value))


def is_name(value: object) -> TypeGuard[str]:
    """Return whether a value can be the name of a stream or a consumer, by the server's rules."""
    return is_subject(value) and len(value) <= MAX_NAME and not set(value) & set(".*>/\\")


def subjects_overlap(one: str, other: str) -> bool:
    """Return whether a subject can match both of two subjects with wildcards."""
    tokens, others = one.split("."), other.split(".")
    for token, its in zip(tokens, others, strict=False):
        if ">" in (token, its):
            return True
        if token != its and "*" not in (token, its):
            return False
    return len(tokens) == len(others)


async def find_stream(nc: Client, subject: str) -> str:
    """Return the name of the stream that takes a subject; "" if there is none. A refusal ends no work."""
    names = await api_request(nc, "STREAM.NAMES", {"subject": subject})
    return next(iter(names["streams"] or []), "")


async def require_stream_for(nc: Client, subject: str) -> None:
    """Check that a stream takes a subject. A publish alone cannot tell that from a stream without a leader.

    Args:
        nc: the connection, from `connect`.
        subject: the subject to publish to.

    Raises:
        Failure: no stream takes it, or the server refuses the question.

    Example:
        async with connect("shop") as nc:
            await require_stream_for(nc, "orders.new")
    """
    try:
        stream = await find_stream(nc, subject)
    except TRANSIENT_ERRORS:
        return  # publishing tries again
    except Error as error:
        raise Failure(f"cannot tell whether a stream takes {subject}: {describe_error(error)}") from None
    if not stream:
        raise Failure(f"no stream takes the subject {subject}: create one with {queue_command('STREAM', subject)}")


def queue_command(stream: str, subjects: str) -> str:
    """Return the command that creates a work queue: the script in a clone, natscli elsewhere."""
    return _command("scripts/create_orders_stream.sh", stream, subjects, subjects)


def dlq_command(dlq_stream: str, stream: str) -> str:
    """Return the command that creates the dead letter queue of a stream."""
    return _command("scripts/create_orders_unprocessed.sh", dlq_stream, stream, f"{ADVISORY}.{stream}.*")


def _command(script: str, stream: str, argument: str, subjects: str) -> str:
    flags = ("--retention=work", "--discard=new", "--max-bytes=256MB", "--deny-delete", "--allow-direct", "--defaults")
    natscli = ("nats", "stream", "add", stream, f"--subjects={subjects}", *flags)
    return f"`{shlex.join((script, stream, argument) if Path(script).exists() else natscli)}`"


async def warn_if_lost(nc: Client, stream: str, durable: str) -> None:
    """Log a warning when no stream keeps the advisories of a durable."""
    advisory = f"{ADVISORY}.{stream}.{durable}"
    try:
        if not await find_stream(nc, advisory):
            log.warning(
                "no stream keeps the advisories %s: dead letters will go unnoticed, until you create one with %s",
                advisory,
                dlq_command("DLQ_STREAM", stream),
            )
    except (Error, TimeoutError) as error:
        log.warning("cannot tell whether a stream keeps the advisories %s: %s", advisory, describe_error(error))
