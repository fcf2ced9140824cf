"""Why messages died: an optional stream keeps the last reason of each, on a subject of its own."""

import base64
import json
from contextlib import suppress
from typing import NamedTuple

from nats.aio.msg import Msg
from nats.errors import Error

from jobqueue.connection.client import Client
from jobqueue.errors import TRANSIENT_ERRORS, describe_error
from jobqueue.jetstream.acks import parse_ack_subject
from jobqueue.jetstream.reading import parse_time
from jobqueue.jetstream.streams import api_request, find_stream

SUBJECT = "failures"  # .<stream>.<stream sequence>


class Reason(NamedTuple):
    """Why the last attempt at a message failed."""

    text: str
    attempt: int
    failed_at: int  # nanoseconds


class Reasons:
    """The reasons of a stream's messages. Without a stream that keeps them (`kept_in` is "") it does nothing."""

    def __init__(self, nc: Client, stream: str, kept_in: str) -> None:
        self._nc = nc
        self._stream = stream
        self._kept_in = kept_in

    @property
    def are_kept(self) -> bool:
        """Whether there is a stream that keeps them."""
        return bool(self._kept_in)

    @classmethod
    async def find(cls, nc: Client, stream: str) -> "Reasons":
        """Look for the stream that keeps the reasons. For a user who may not do that, there is none."""
        kept_in = ""
        with suppress(Error, TimeoutError):
            kept_in = await find_stream(nc, f"{SUBJECT}.{stream}.*")
        if kept_in:
            used = (f"$js.api.stream.{what}.{kept_in}".lower() for what in ("msg.get", "purge"))
            nc.may_be_refused |= {f"{SUBJECT}.", *used}
        return cls(nc, stream, kept_in)

    async def report(self, message: Msg, error: BaseException, attempt: int) -> None:
        """Keep the reason of a failed attempt. Nobody waits until it is stored: the log has the reason, too."""
        if self._kept_in:
            sequence, stored_at, _ = parse_ack_subject(message.reply)
            reason = {"reason": describe_error(error), "attempt": attempt, "stored_at": stored_at}
            with suppress(Error):
                await self._nc.publish(self._subject(sequence), json.dumps(reason).encode())

    async def read(self, sequence: int, stored_at: int) -> Reason | None:
        """Return the reason of the message that was stored then, in nanoseconds; None if there is none."""
        if not self._kept_in:
            return None
        try:
            request = {"last_by_subj": self._subject(sequence)}
            found = (await api_request(self._nc, f"STREAM.MSG.GET.{self._kept_in}", request))["message"]
        except TRANSIENT_ERRORS:
            raise
        except Error:  # there is none, or this user may not read it
            return None
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):  # anybody may have written it
            reason = json.loads(base64.b64decode(found["data"]))
            if reason["stored_at"] == stored_at:  # else it is of a stream that was deleted
                return Reason(str(reason["reason"]), int(reason["attempt"]), parse_time(found["time"]))
        return None

    async def forget(self, sequence: int) -> None:
        """Remove the reason of a message. If that fails, it goes when the stream's maximum age is over."""
        if self._kept_in:
            with suppress(Error, TimeoutError):
                await api_request(self._nc, f"STREAM.PURGE.{self._kept_in}", {"filter": self._subject(sequence)})

    def _subject(self, sequence: int) -> str:
        return f"{SUBJECT}.{self._stream}.{sequence}"
