"""What the server knows of streams and durables, and the ack subjects of their messages."""

import json
import shlex
from datetime import datetime
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.js.api import ConsumerConfig
from nats.js.errors import APIError, NotFoundError

from jobqueue.errors import Failure, printable
from jobqueue.retrying import retry_at_start

API_TIMEOUT = 1.0  # seconds
VERSION_1_TOKENS = 9  # of an ack subject; version 2 has a domain and an account's hash before the stream
NO_MESSAGE_FOUND = 10037  # JetStream's error code


async def api_request(nc: Client, subject: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the answer to a JetStream API request as it is on the wire; nats-py drops the fields that it doesn't know.

    Args:
        nc: the connection.
        subject: without `$JS.API.`, such as `STREAM.INFO.orders_stream`.
        payload: what to send as JSON.

    Raises:
        nats.js.errors.APIError: the answer is an error; NotFoundError where something is missing.
        nats.errors.Error: there was no answer.
    """
    answer = await nc.request(f"$JS.API.{subject}", json.dumps(payload).encode() if payload else b"", API_TIMEOUT)
    decoded: dict[str, Any] = json.loads(answer.data)
    if "error" in decoded:
        APIError.from_error(decoded["error"])
    return decoded


async def require_stream(nc: Client, stream: str, subject: str, *command: str) -> None:
    """Check that a stream exists, and that it may have messages of a subject, which may have wildcards.

    Raises:
        Failure: it doesn't, and `command` is what creates it; or it has other subjects.
    """
    try:
        info = await retry_at_start(lambda: api_request(nc, f"STREAM.INFO.{stream}"), stream)
    except NotFoundError:
        raise Failure(f"there is no stream {stream}: create it with {shlex.join(command)}") from None
    subjects = info["config"].get("subjects") or [">"]  # a mirror has those of its origin
    if not any(subjects_overlap(subject, other) for other in subjects):
        shown = printable(", ".join(subjects))
        raise Failure(f"{stream} has no subject that {subject} matches: its subjects are {shown}")


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
    """Return what the server says of a durable consumer; create it if it is missing.

    Args:
        nc: the connection.
        stream: the stream's name.
        config: the fields that are set here are its own.
        update: whether to change its own fields in a durable that exists. The others are an operator's, and stay.

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


async def find_stored_at(nc: Client, stream: str, sequence: int) -> int | None:
    """Return when the message with a stream sequence was stored, in nanoseconds; None if there is none.

    Any replica answers a direct get, without a leader. The leader is asked where nobody does, since the stream has no
    `allow_direct` (nats-server 2.10 then says nothing), or where the message itself has a header `Status: 503`, which
    nats-py takes for "no responders".

    Raises:
        nats.errors.Error: the server doesn't answer.
    """
    request = {"seq": sequence}
    try:
        answer = await nc.request(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), API_TIMEOUT)
        time = (answer.headers or {}).get("Nats-Time-Stamp")
    except (NoRespondersError, TimeoutError):
        try:
            time = (await api_request(nc, f"STREAM.MSG.GET.{stream}", request))["message"]["time"]
        except NotFoundError as error:
            if error.err_code != NO_MESSAGE_FOUND:
                raise
            time = None
    if not time:
        return None
    seconds, _, fraction = time.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{seconds}+00:00").timestamp()) * 10**9 + int(fraction.ljust(9, "0"))


def ack_subject(stream: str, durable: str, deliveries: int, sequence: int) -> str:
    """Return the ack subject of a delivery (version 1, which every server takes), but for the numbers nobody reads."""
    return f"$JS.ACK.{stream}.{durable}.{deliveries}.{sequence}.0.0.0"


def parse_ack_subject(subject: str) -> tuple[int, int]:
    """Return a delivery's stream sequence, and when its message was stored, in nanoseconds.

    Source: https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-15.md (both versions).
    """
    tokens = subject.split(".")
    at = 5 if len(tokens) == VERSION_1_TOKENS else 7
    return int(tokens[at]), int(tokens[at + 2])


async def probe_ack(nc: Client, subject: str) -> None:
    """Let the server refuse an ack subject that this user may not publish to: it does before its next answer."""
    await nc.publish(subject, Msg.Ack.Progress)
