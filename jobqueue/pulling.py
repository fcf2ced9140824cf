"""Asking a durable for messages: how many, and what becomes of each pull request."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.errors import printable

PULL_EXPIRES = 2.0  # seconds; a graceful shutdown waits for it, since a dropped delivery costs the message an attempt
MAX_PULL_LATENESS = 2.0  # seconds after that until its answer counts as lost
MAX_QUEUE_TIME = 0.4  # seconds of work that may wait in this process

OnDelivery = Callable[[Msg], Awaitable[None]]
OnEnd = Callable[[str], Awaitable[None]]


class Prefetch:
    """How many messages to have beyond those that are being processed, so that processing never waits for the server.

    By Little's law, throughput times round trip would just do. It is twice that, since more is requested when half of
    it is gone.
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
        self.size = max(1, int(self._throughput * min(2 * self._round_trip, MAX_QUEUE_TIME)))


class PullRequests:
    """The pull requests that the server has, and how many messages may still come for them (`requested`).

    A delivery doesn't say which request it is for, but counting all of them together will do: each delivery is one
    less, and the status that ends a request says how many it still lacked.

    `on_delivery` is called with each message, `on_end` when the server ends a request: with a description of the
    failure, or "" when it has expired.
    """

    def __init__(self, nc: Client, stream: str, durable: str, on_delivery: OnDelivery, on_end: OnEnd) -> None:
        self.requested = 0
        self._nc = nc
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._on_delivery = on_delivery
        self._on_end = on_end
        self._inbox = nc.new_inbox()
        self._generation = 0  # the last token of the inbox, so that statuses of forgotten requests can be told apart
        self._now = asyncio.get_running_loop().time
        self._sent_at = self._heard_at = self._expires_at = self._forgotten_until = 0.0
        self.set_limits({})

    async def start(self) -> None:
        """Subscribe to deliveries and statuses."""
        await self._nc.subscribe(f"{self._inbox}.*", cb=self._receive, pending_bytes_limit=0)

    async def send(self, batch: int) -> None:
        """Ask for messages."""
        batch = min(batch, self._max_batch)
        self.requested += batch
        self._sent_at = self._now()
        self._expires_at = self._sent_at + PULL_EXPIRES
        request = {"batch": batch, "expires": self._expires}
        await self._nc.publish(self._subject, json.dumps(request).encode(), f"{self._inbox}.{self._generation}")

    def set_limits(self, config: dict[str, Any]) -> None:
        """Keep to what an operator has set for pull requests in the durable's configuration."""
        self._max_batch = config.get("max_batch") or sys.maxsize
        self._expires = min(int(PULL_EXPIRES * 1e9), config.get("max_expires") or sys.maxsize)  # nanoseconds

    def end_expired(self) -> bool:
        """Forget the requests that must have ended by now; return whether the last one was not answered at all."""
        if not self.requested or self._now() < self._expires_at + MAX_PULL_LATENESS:
            return False
        self.requested = 0
        return self._heard_at < self._sent_at

    def forget_all(self) -> None:
        """Forget all open requests. Late deliveries are still processed."""
        self._generation += 1
        if self.requested:
            self._forgotten_until = self._expires_at
        self.requested = 0

    def may_deliver(self) -> bool:
        """Return whether messages may still come, for forgotten requests too."""
        return self.requested > 0 or self._now() < self._forgotten_until

    async def _receive(self, message: Msg) -> None:
        if message.reply:
            self._heard_at = self._now()
            self.requested = max(0, self.requested - 1)
            await self._on_delivery(message)
        elif message.subject.endswith(f".{self._generation}"):
            self._heard_at = self._now()
            headers = message.headers or {}
            self.requested = max(0, self.requested - int(headers.get("Nats-Pending-Messages", 0)))
            await self._on_end(describe_status(headers))


def describe_status(headers: dict[str, str]) -> str:
    """Return what the status that ends a pull request says, or "" if it ends as planned."""
    status, description = headers.get("Status", ""), headers.get("Description", "")
    if status in ("404", "408"):  # no messages now; none before the request expired
        return ""
    if status == "503":  # nats-py takes a header that nats-server 2.15 adds for its description
        return "503 no responders"
    return printable(f"{status} {description}".strip().split("\r\n")[0])
