"""Asking a durable for messages: how many, and what becomes of each pull request."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable

from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.errors import printable

PULL_EXPIRES = 2.0  # seconds; a graceful shutdown waits for it, since what a dropped delivery loses is an attempt
MAX_PULL_LATENESS = 2.0  # seconds after that until the answer counts as lost
MAX_QUEUE_TIME = 0.4  # seconds of work that may wait in this process
NO_MESSAGES = ("404", "408")  # none now; none before the request expired


class Prefetch:
    """How many messages to have beyond those that are being processed, so that processing never waits for the server.

    By Little's law that is throughput x round trip; twice that, since what is missing is asked for when half of it is
    gone.
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
        """Take in how long the server has just taken to answer."""
        self._round_trip += (seconds - self._round_trip) / 8 if self._round_trip else seconds

    def update(self, now: float) -> None:
        """Work out the size from what was counted since the last update."""
        self._throughput += (self._completed / (now - self._updated_at) - self._throughput) / 2
        self._completed, self._updated_at = 0, now
        self.size = max(1, int(self._throughput * min(2 * self._round_trip, MAX_QUEUE_TIME)))


class PullRequests:
    """The pull requests that the server has, and how many messages may still come for them.

    A delivery has its own subject, so it counts for the oldest request, as the server serves them in that order. A
    status ends the request that the last token of its subject names. So each miscount ends with its request.

    Args:
        nc: the connection.
        stream: the stream's name.
        durable: the durable's name.
        on_delivery: called with each message.
        on_failure: called with a description when the server refuses a request.

    """

    def __init__(
        self,
        nc: Client,
        stream: str,
        durable: str,
        on_delivery: Callable[[Msg], Awaitable[None]],
        on_failure: Callable[[str], None],
    ) -> None:
        self.requested = 0
        self._nc = nc
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}"
        self._on_delivery = on_delivery
        self._on_failure = on_failure
        self._inbox = nc.new_inbox()
        self._tokens = map(str, itertools.count())
        self._open: dict[str, int] = {}  # how many messages are missing, the oldest request first
        self._answer_by: dict[str, float] = {}

    async def start(self) -> None:
        """Subscribe to deliveries and statuses."""
        await self._nc.subscribe(f"{self._inbox}.*", cb=self._receive, pending_bytes_limit=0)

    async def send(self, batch: int) -> None:
        """Ask for messages."""
        token = next(self._tokens)
        self._open[token] = batch
        self._answer_by[token] = asyncio.get_running_loop().time() + PULL_EXPIRES + MAX_PULL_LATENESS
        self.requested += batch
        request = {"batch": batch, "expires": int(PULL_EXPIRES * 1e9)}
        await self._nc.publish(self._subject, json.dumps(request).encode(), f"{self._inbox}.{token}")

    def is_overdue(self, now: float) -> bool:
        """Return whether a request has neither been served nor expired: its answer is lost."""
        return any(now > answer_by for answer_by in self._answer_by.values())

    def abandon(self) -> None:
        """Expect nothing more of all requests. What comes nevertheless is welcome."""
        self._open.clear()
        self._answer_by.clear()
        self.requested = 0

    async def _receive(self, message: Msg) -> None:
        if message.reply:
            self._count_delivery()
            await self._on_delivery(message)
            return
        token = message.subject.rpartition(".")[2]
        if token in self._open:
            self._end(token)
            headers = message.headers or {}
            status, description = headers.get("Status", ""), headers.get("Description", "")
            if status == "503":  # nats-py takes a header that nats-server 2.15 adds for its description
                self._on_failure("503 no responders")
            elif status not in NO_MESSAGES:
                self._on_failure(printable(f"{status} {description.strip().partition(chr(10))[0]}".strip()))

    def _count_delivery(self) -> None:
        for token, missing in self._open.items():
            self.requested -= 1
            self._open[token] = missing - 1
            if missing == 1:
                self._end(token)
            break

    def _end(self, token: str) -> None:
        self.requested -= self._open.pop(token)
        del self._answer_by[token]
