"""What the server knows of streams and durables, and the ack subjects of their messages."""

import json
import shlex
from datetime import datetime
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig
from nats.js.errors import APIError, NotFoundError

from jobqueue.errors import Failure, printable
from jobqueue.retrying import after_start_timeout, retry

API_TIMEOUT = 1.0  # seconds
VERSION_1_TOKENS = 9  # of an ack subject; version 2 has a domain and an account's hash before the stream
STREAM_NOT_FOUND, NO_MESSAGE_FOUND = 10059, 10037  # JetStream's error codes


async def api_request(nc: Client, subject: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the answer to a JetStream API request, as it is on the wire.

    nats-py's own methods drop the fields that they don't know, and the nanoseconds of a time.

    Args:
        nc: the connection.
        subject: without `$JS.API.`, such as `STREAM.INFO.orders_stream`.
        payload: what to send as JSON.

    Raises:
        nats.js.errors.APIError: the server's answer is an error; NotFoundError where something is missing.
        nats.errors.Error: there was no answer.

    """
    answer = await nc.request(f"$JS.API.{subject}", json.dumps(payload).encode() if payload else b"", API_TIMEOUT)
    decoded: dict[str, Any] = json.loads(answer.data)
    if "error" in decoded:
        APIError.from_error(decoded["error"])
    return decoded


async def require_stream(nc: Client, stream: str, subject: str, *command: str) -> None:
    """Check that a stream exists, and that it may have messages of a subject.

    Args:
        nc: the connection.
        stream: the stream's name.
        subject: may have wildcards.
        command: creates such a stream; named where the stream is missing.

    Raises:
        Failure: there is no such stream, or it has other subjects.

    """
    try:
        info = await retry(
            lambda: api_request(nc, f"STREAM.INFO.{stream}"), stream, after_start_timeout(or_not_found=True)
        )
    except NotFoundError:
        raise Failure(f"there is no stream {stream}: create it with {shlex.join(command)}") from None
    subjects = info["config"].get("subjects") or [">"]  # a mirror has its origin's
    if not any(subjects_overlap(subject, other) for other in subjects):
        raise Failure(
            f"{stream} has no subject that {subject} matches: its subjects are {printable(', '.join(subjects))}"
        )


def subjects_overlap(one: str, other: str) -> bool:
    """Return whether a subject can match both of two subjects with wildcards."""
    tokens, others = one.split("."), other.split(".")
    for token, its in zip(tokens, others, strict=False):
        if ">" in (token, its):
            return True
        if token != its and "*" not in (token, its):
            return False
    return len(tokens) == len(others)


async def ensure_durable(nc: Client, stream: str, config: ConsumerConfig, *, update: bool = False) -> dict[str, Any]:
    """Return the server's info of a durable consumer; create it if it is missing.

    Args:
        nc: the connection.
        stream: the stream's name.
        config: its own fields are those that are set.
        update: whether to set the own fields of a durable that exists. Its other fields are an operator's and stay.

    Raises:
        nats.errors.Error: the server refuses, or doesn't answer.

    """
    durable, own = config.durable_name, {field: value for field, value in config.as_dict().items() if value}
    try:
        info = await api_request(nc, f"CONSUMER.INFO.{stream}.{durable}")
    except NotFoundError:
        wanted = own
    else:
        wanted = info["config"] | own
        if wanted == info["config"] or not update:
            return info
    subject = f"CONSUMER.CREATE.{stream}.{durable}"
    if wanted.get("filter_subject"):
        subject += f".{wanted['filter_subject']}"
    return await api_request(nc, subject, {"stream_name": stream, "config": wanted})


async def stored_at(nc: Client, stream: str, sequence: int, *, direct: bool) -> int | None:
    """Return when the message with a stream sequence was stored, in nanoseconds; None if there is none.

    With the sequence that identifies a message, as its ack subject does.

    Args:
        nc: the connection.
        stream: the stream's name.
        sequence: the message's stream sequence.
        direct: whether the stream has `allow_direct`, so that any replica may answer, without a leader.

    Raises:
        nats.errors.Error: the server didn't answer.

    """
    if direct:
        answer = await nc.request(f"$JS.API.DIRECT.GET.{stream}", b'{"seq": %d}' % sequence, API_TIMEOUT)
        time = (answer.headers or {}).get("Nats-Time-Stamp")
        return parse_time(time) if time else None
    try:
        found = await api_request(nc, f"STREAM.MSG.GET.{stream}", {"seq": sequence})
    except NotFoundError as error:
        if error.err_code == STREAM_NOT_FOUND:
            raise
        return None
    return parse_time(found["message"]["time"])


def parse_time(time: str) -> int:
    """Return a time of the API, such as `2026-11-23T20:24:25.1234Z`, in nanoseconds since 1970."""
    seconds, _, fraction = time.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{seconds}+00:00").timestamp()) * 10**9 + int(fraction.ljust(9, "0"))


def ack_subject(stream: str, durable: str, deliveries: int, sequence: int) -> str:
    """Return the ack subject of a delivery (version 1, which every server takes), but for the numbers nobody reads."""
    return f"$JS.ACK.{stream}.{durable}.{deliveries}.{sequence}.0.0.0"


def parse_ack_subject(subject: str) -> tuple[int, int, int]:
    """Return what an ack subject says of a delivery: how many tokens it has, the stream sequence, and `stored_at`.

    Source: https://docs.nats.io/reference/reference-protocols/nats_api_reference (acks), and for version 2
    https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-15.md.
    """
    tokens = subject.split(".")
    at = 5 if len(tokens) == VERSION_1_TOKENS else 7
    return len(tokens), int(tokens[at]), int(tokens[at + 2])


async def probe_ack(nc: Client, subject: str) -> None:
    """Let the server refuse an ack subject that this user may not publish to, before anything is worked on.

    It does so before it answers the next request: make one.
    """
    await nc.publish(subject, Msg.Ack.Progress)
