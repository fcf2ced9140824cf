"""Further attempts for a dead letter: after MaxDeliver failures its advisory is published again, with a delay."""

import time

from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.in_flight import ACK
from jobqueue.reading import StoredMessage, get_message
from jobqueue.streams import REQUEST_TIMEOUT, ack_subject

MIN_DELAY = 10.0  # seconds; doubled after each attempt
MAX_DELAY = 120.0  # seconds
# Headers of an advisory that was published again: how many times, and the seconds that its next attempt has to wait.
RETRIES_HEADER = "Dlq-Retries"
DELAY_HEADER = "Dlq-Delay"


def attempt_of(advisory: Msg, max_deliver: int) -> int:
    """Return the number of the attempt that this delivery of an advisory is, from 1."""
    retries = int(_number(advisory.headers, RETRIES_HEADER))
    return max_deliver + retries if retries else advisory.metadata.num_delivered


def nak_until_due(advisory: Msg) -> bytes | None:
    """Return the nak that has an advisory redelivered when its delay is over; None if it is to be tried now."""
    delay = _number(advisory.headers, DELAY_HEADER)
    return b'-NAK {"delay": %d}' % (delay * 1e9) if delay and advisory.metadata.num_delivered == 1 else None


def is_due(advisory: StoredMessage) -> bool:
    """Return whether the delay of an advisory is over."""
    return time.time() > advisory.stored_at / 1e9 + _number(advisory.headers, DELAY_HEADER)


async def schedule_next_attempt(nc: Client, dlq_stream: str, advisory: Msg) -> float:
    """Publish an advisory again after its last attempt has failed, and return the seconds until the next one.

    Raises:
        nats.errors.Error: it may not be stored.
    """
    retries = int(_number(advisory.headers, RETRIES_HEADER)) + 1
    delay = min(MIN_DELAY * 2.0 ** min(retries - 1, 10), MAX_DELAY)
    headers = (advisory.headers or {}) | {RETRIES_HEADER: str(retries), DELAY_HEADER: f"{delay:g}"}
    await _publish(nc, dlq_stream, advisory.metadata.sequence.stream, advisory.subject, advisory.data, headers)
    return delay


async def restore_exhausted(nc: Client, dlq_stream: str, dlq_durable: str, sequence: int) -> None:
    """Publish an exhausted advisory again, since its processors have died, and remove the old one.

    Raises:
        nats.errors.Error: the request timed out or was refused.
    """
    advisory = await get_message(nc, dlq_stream, sequence)
    if advisory:
        await _publish(nc, dlq_stream, sequence, advisory.subject, advisory.data, advisory.headers)
        await nc.request(ack_subject(dlq_stream, dlq_durable, 1, sequence), ACK, REQUEST_TIMEOUT)


async def _publish(
    nc: Client, dlq_stream: str, sequence: int, subject: str, data: bytes, headers: dict[str, str]
) -> None:
    # A processor may die before it has acked the old one; what is then published again has the same id.
    headers = without_instructions(headers) | {"Nats-Msg-Id": f"{dlq_stream}.{sequence}.again"}
    await nc.jetstream().publish(subject, data, REQUEST_TIMEOUT, dlq_stream, headers)


def without_instructions(headers: dict[str, str]) -> dict[str, str]:
    """Return the headers but for those that told the server what to do at the first publish."""
    return {name: value for name, value in headers.items() if not name.lower().startswith("nats-")}


def _number(headers: dict[str, str] | None, name: str) -> float:
    """Return a number from a header; 0 where there is none, or none that makes sense: anybody may have written it."""
    try:
        number = float((headers or {}).get(name, 0))
    except ValueError:
        return 0.0
    return number if 0 <= number < 1e6 else 0.0
