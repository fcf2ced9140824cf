"""When a message was stored: with its sequence that tells one message from another."""

import json
import re
from datetime import UTC, datetime

from nats.errors import NoRespondersError
from nats.js.errors import NotFoundError

from jobqueue.connection.client import Client
from jobqueue.jetstream.link import transfer_time
from jobqueue.jetstream.streams import API_TIMEOUT, api_request

NO_MESSAGE_FOUND = 10037  # JetStream's error code
TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")


async def find_stored_at(nc: Client, stream: str, sequence: int, size: int) -> int | None:
    """Return when the message with a stream sequence was stored, in nanoseconds; None if there is none.

    The answer is the whole message; `size` is how large it is expected to be, in bytes.

    Any replica answers a direct get, without a leader. The leader is asked where nobody does, since the stream has no
    `allow_direct` (nats-server 2.10 then says nothing), or where the message itself has a header `Status: 503`, which
    nats-py takes for "no responders".
    """
    request, timeout = json.dumps({"seq": sequence}).encode(), API_TIMEOUT + transfer_time(size)
    try:
        answer = await nc.request(f"$JS.API.DIRECT.GET.{stream}", request, timeout)
    except (NoRespondersError, TimeoutError):
        try:
            found = await api_request(nc, f"STREAM.MSG.GET.{stream}", {"seq": sequence}, timeout)
            return parse_time(found["message"]["time"])
        except NotFoundError as error:
            if error.err_code == NO_MESSAGE_FOUND:
                return None
            raise
    stored_at = (answer.headers or {}).get("Nats-Time-Stamp")
    return parse_time(stored_at) if stored_at else None


def parse_time(text: str) -> int:
    """Return the nanoseconds since 1970 of a time as the server writes it; raise ValueError if it is none."""
    parts = TIME.fullmatch(text)
    if not parts:
        raise ValueError
    seconds, fraction, zone = parts.groups()
    return int(datetime.fromisoformat(seconds + zone).timestamp()) * 10**9 + int((fraction or "").ljust(9, "0"))


def format_time(nanoseconds: int) -> str:
    """Return a time as the server writes it."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"
