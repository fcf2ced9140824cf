"""Asking a durable for messages: how many, and what becomes of each pull request."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nats.aio.msg import Msg

from jobqueue.connection.client import Client
from jobqueue.errors import printable
from jobqueue.jetstream.link import OVERHEAD, LinkWindow

PULL_EXPIRES = 2.0  # seconds; a graceful shutdown waits for it, since a dropped delivery costs the message an attempt
MAX_PULL_LATENESS = 2.0  # seconds after that until its answer counts as lost
MIN_QUEUE_TIME = 0.01  # seconds of work; below this, a request is sent for every other message
MAX_QUEUE_TIME = 0.4  # seconds of work that may wait in this process, and of messages that may be on their way
MAX_REQUESTS = 2  # at a time
MAX_BYTES = 16 * 2**20  # of messages that are requested or received, and not done
MAX_WINDOW_BYTES = 8 * 2**20
MIN_LIMIT = 2 * 2**20  # bytes of a request; a batch that can't exceed its limit is sent without `max_bytes`
TOO_LARGE = "409 Message Size Exceeds MaxBytes"  # the next message, for what is left of a request's bytes

OnDelivery = Callable[[Msg], Awaitable[None]]
OnEnd = Callable[[str], Awaitable[None]]


class Prefetch:
    """How many messages to have beyond those that are being processed, so that processing never waits for the server.

    By Little's law, throughput times round trip would just do. It is twice that, since more is requested when half of
    it is gone, and no less than a few messages' time, since each request costs CPU.
    """

    def __init__(self) -> None:
        self.size = 1
        self._completed = 0
        self._throughput = 0.0  # messages a second
        self._round_trip = 0.0  # seconds
        self._updated_at = asyncio.get_running_loop().time()

    def count_completed(self) -> None:
        """Count a message that was processed."""
        self._completed += 1

    def note_round_trip(self, seconds: float) -> None:
        """Take in how long the server has just taken to confirm an ack."""
        self._round_trip += (seconds - self._round_trip) / 8 if self._round_trip else seconds

    def update(self, now: float) -> None:
        """Recompute the size from what was counted since the last time."""
        self._throughput += (self._completed / (now - self._updated_at) - self._throughput) / 2
        self._completed, self._updated_at = 0, now
        queue_time = min(max(2 * self._round_trip, MIN_QUEUE_TIME), MAX_QUEUE_TIME)
        self.size = max(1, int(self._throughput * queue_time))


@dataclass
class _Request:
    """A pull request that the server has. Its inbox is its own, so that each delivery tells which one it is for."""

    inbox: str
    number: int = 0  # the last token of its inbox; a status of an earlier request has another one
    messages: int = 0  # that may still come
    bytes: int = 0  # that may still come
    batch: int = 0  # messages that were asked for
    sent_at: float = 0.0
    heard_at: float = 0.0


class PullRequests:
    """The pull requests that the server has, and how many messages may still come for them (`messages`).

    A request is bounded by bytes, too: by what this process may have, and by what the link carries in a moment.
    The server ends a connection for which more than 64 MiB wait, and whatever is on its way for longer than the ack
    wait loses an attempt. There are several requests at a time, so that the link doesn't stand still between them.

    `on_delivery` is called with each message, `on_end` when the server ends a request: with a description of the
    failure, or "" when it has ended as planned.
    """

    def __init__(self, nc: Client, stream: str, durable: str, on_delivery: OnDelivery, on_end: OnEnd) -> None:
        self.messages = 0
        self._nc = nc
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._on_delivery = on_delivery
        self._on_end = on_end
        self._requests = [_Request(nc.new_inbox()) for _ in range(MAX_REQUESTS)]
        self.window = LinkWindow(MAX_QUEUE_TIME, MAX_WINDOW_BYTES)
        self._size = 1  # bytes of the last message
        self._next_exceeds_limit = False  # the next message, that of the last request
        self._now = asyncio.get_running_loop().time
        self._forgotten_until = 0.0
        self.set_limits({})

    async def start(self) -> None:
        """Subscribe to deliveries and statuses."""
        for request in self._requests:
            receive = partial(self._receive, request)
            await self._nc.subscribe(f"{request.inbox}.*", cb=receive, pending_bytes_limit=0)

    async def send(self, batch: int, received: int) -> None:
        """Ask for messages, unless there is no room for their bytes beside those that are received and not done."""
        for request in self._requests:
            if not request.messages:
                break
        else:
            return
        requested, largest = sum([one.bytes for one in self._requests]), self._nc.max_payload
        spare = MAX_BYTES - received - requested
        limit = min(max(self.window.size, MIN_LIMIT), max(spare // 2, min(spare, self._size)), self._max_bytes)
        wanted: dict[str, int] = {"expires": self._expires}
        if self._next_exceeds_limit or limit < self._size:
            if requested or received >= MAX_BYTES:
                return
            batch, request.bytes = 1, largest  # one message of any size comes through
        else:
            batch = min(batch, self._max_batch, max(1, self.window.size // 2 // self._size))
            request.bytes = min(batch * largest, limit)
            if batch * largest > limit:  # at the end of such a request the server sends one more status
                wanted["max_bytes"] = limit
        request.batch = request.messages = batch
        request.number += 1
        request.sent_at = self._now()
        self.messages += batch
        payload = json.dumps({"batch": batch, **wanted}).encode()
        await self._nc.publish(self._subject, payload, f"{request.inbox}.{request.number}")

    def set_limits(self, config: dict[str, Any]) -> None:
        """Keep to what an operator has set for pull requests in the durable's configuration."""
        self._max_batch = config.get("max_batch") or sys.maxsize
        self._max_bytes = config.get("max_bytes") or sys.maxsize
        self._expires = min(int(PULL_EXPIRES * 1e9), config.get("max_expires") or sys.maxsize)  # nanoseconds

    def end_expired(self) -> bool:
        """Forget the requests that must have ended by now; return whether one of them was not answered at all."""
        late = self._now() - PULL_EXPIRES - MAX_PULL_LATENESS
        expired = [request for request in self._requests if request.messages and request.sent_at < late]
        for request in expired:
            self._lower(request, request.messages)
        return any(request.heard_at < request.sent_at for request in expired)

    def forget_all(self) -> None:
        """Forget all open requests. Late deliveries are still processed."""
        for request in self._requests:
            if request.messages:
                self._forgotten_until = max(self._forgotten_until, request.sent_at + PULL_EXPIRES)
            request.number += 1
            self._lower(request, request.messages)

    def may_deliver(self) -> bool:
        """Return whether messages may still come, for forgotten requests too."""
        return self.messages > 0 or self._now() < self._forgotten_until

    def _lower(self, request: _Request, messages: int) -> None:
        request.messages -= messages
        self.messages -= messages
        if not request.messages:
            request.bytes = 0

    async def _receive(self, request: _Request, message: Msg) -> None:
        if message.reply:
            request.heard_at = self._now()
            self._size = size = OVERHEAD + len(message.data)
            self.window.carried += size
            self._next_exceeds_limit = False
            if request.messages:  # else it was forgotten
                request.messages -= 1
                request.bytes = request.bytes - size if request.messages else 0
                self.messages -= 1
            await self._on_delivery(message)
        elif message.subject.endswith(f".{request.number}"):
            request.heard_at = self._now()
            headers = message.headers or {}
            missing = int(headers.get("Nats-Pending-Messages", request.messages))
            status = describe_status(headers)
            if status == TOO_LARGE:
                self._next_exceeds_limit |= missing == request.batch
                status = ""
            self._lower(request, min(missing, request.messages))  # on replicas the rest may come after the status
            await self._on_end(status)


def describe_status(headers: dict[str, str]) -> str:
    """Return what the status that ends a pull request says, or "" if it ends as planned."""
    status, description = headers.get("Status", ""), headers.get("Description", "")
    if status in ("404", "408"):  # no messages now; none before the request expired
        return ""
    if (status, description) == ("409", "Batch Completed"):  # with bytes left
        return ""
    if status == "503":  # nats-py takes a header that nats-server 2.15 adds for its description
        return "503 no responders"
    return printable(f"{status} {description}".strip().split("\r\n")[0])
