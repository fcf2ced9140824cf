"""Recovery after a reconnect, a new leader, a deleted durable or a request that timed out."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

from nats.aio.client import Client
from nats.errors import Error
from nats.js.api import ConsumerConfig

from jobqueue.durables import ensure_durable
from jobqueue.errors import describe_error
from jobqueue.in_flight import CHECK_VALID_FOR, Entry, Registry
from jobqueue.pulling import PullRequests
from jobqueue.retrying import MIN_RETRY_DELAY
from jobqueue.stored import find_stored_at
from jobqueue.streams import api_request

log = logging.getLogger(__name__)

MAX_RECOVERY_DELAY = 2.0  # seconds between two attempts
# Seconds without a pull request, so that all processes have sent their acks again before the server is asked for
# messages, and redelivers those whose ack wait is over.
FAILOVER_GRACE = 3.0
VERIFIED_AT_A_TIME = 32


class Recovery:
    """Ensures after any doubt that the durable exists, verifies what is in flight, and has open acks sent."""

    def __init__(
        self, nc: Client, stream: str, config: ConsumerConfig, registry: Registry, pulls: PullRequests
    ) -> None:
        self._nc = nc
        self._stream = stream
        self._config = config
        self._registry = registry
        self._pulls = pulls
        self._now = asyncio.get_running_loop().time
        self._needed = asyncio.Event()
        self._is_stable = True
        self._grace_ends = 0.0
        self._reconnects = nc.stats["reconnects"]
        self._leader: str | None = None  # the durable's; None on a single server
        self._created: str | None = None  # when the stream was
        self._reported_reason = ""

    def may_pull(self) -> bool:
        """Return whether the server may be asked for messages."""
        self.note_reconnect()
        return self._is_stable and self._nc.is_connected

    def note_reconnect(self) -> None:
        """Recover if there was a reconnect."""
        if self._reconnects != self._nc.stats["reconnects"]:
            self._reconnects = self._nc.stats["reconnects"]
            self.recover()

    def recover(self, reason: str = "") -> None:
        """Begin the recovery from something that ends all pull requests; log the reason, if there is one."""
        if reason and reason != self._reported_reason:
            self._reported_reason = reason
            log.warning("%s: %s; trying again", self._stream, reason)
        self._is_stable = False
        self._grace_ends = self._now() + FAILOVER_GRACE
        self._registry.begin_epoch()
        self._pulls.forget_all()
        self._needed.set()

    def check(self) -> None:
        """Have stream and durable checked and open acks sent, before the next pull request if the leader was silent."""
        if self._now() - self._registry.heard_at > CHECK_VALID_FOR:
            self._is_stable = False
        self._needed.set()

    def note_served(self) -> None:
        """Log once that the server serves pull requests again."""
        if self._reported_reason and self._is_stable:
            self._reported_reason = ""
            log.info("%s is back", self._stream)

    async def run(self) -> None:
        """Check and recover whenever that is needed, for ever."""
        while True:
            await self._needed.wait()
            await self._until_stable()
            self._is_stable = True

    async def _until_stable(self) -> None:
        """Check, and once more when the grace period is over: another leader may have been lost meanwhile."""
        delay = MIN_RETRY_DELAY
        while True:
            self._needed.clear()
            grace_over = self._now() >= self._grace_ends
            try:
                await self._check_once(grace_over)
            except (Error, TimeoutError) as error:
                self.recover(describe_error(error))
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RECOVERY_DELAY)
                continue
            if self._needed.is_set():
                continue  # something has changed meanwhile, and open acks are not sent yet
            if grace_over:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(self._grace_ends - self._now()):
                    await self._needed.wait()

    async def _check_once(self, grace_over: bool) -> None:
        while not self._nc.is_connected:
            await asyncio.sleep(MIN_RETRY_DELAY)
        self.note_reconnect()
        # What is in flight comes first: it needs heartbeats even while there is no leader.
        if unverified := self._registry.unverified():
            for first in range(0, len(unverified), VERIFIED_AT_A_TIME):
                batch = unverified[first : first + VERIFIED_AT_A_TIME]
                await asyncio.gather(*(self._verify(entry, grace_over) for entry in batch))
            await self._registry.send_heartbeats()
        checked_at = self._now()
        durable, stream = await asyncio.gather(
            ensure_durable(self._nc, self._stream, self._config), api_request(self._nc, f"STREAM.INFO.{self._stream}")
        )
        self._pulls.set_limits(durable["config"])
        self._note_changes(durable, stream)
        self._registry.checked_at = checked_at
        await self._registry.resend_acks()

    def _note_changes(self, durable: dict[str, Any], stream: dict[str, Any]) -> None:
        """Recover if the durable has another leader, or the stream may be another one.

        When a stream was created is only a hint: that changes too when it is restored, and doesn't when its store is
        rolled back.
        """
        leader, created = (durable.get("cluster") or {}).get("leader"), stream["created"]
        if self._leader not in (leader, None) or self._created not in (created, None):
            self.recover()
        self._leader, self._created = leader, created

    async def _verify(self, entry: Entry, grace_over: bool) -> None:
        """Read a message in flight back, and drop it if its sequence has another message now, or none."""
        epoch = self._registry.epoch
        found = await find_stored_at(self._nc, self._stream, entry.sequence)
        if entry not in self._registry:
            return
        if found == entry.stored_at:
            entry.epoch, entry.sent_at = max(epoch, entry.epoch), 0.0
        elif found:
            self._registry.drop(entry, "is another message now")
        elif grace_over and entry.ack:
            self._registry.remove(entry)  # the server has its ack
        elif grace_over:  # before that, a replica may not have the message yet
            self._registry.drop(entry, "is gone")
