"""Recovery after a reconnect, a new leader, a deleted durable or a request that timed out."""

import asyncio
import logging
from contextlib import suppress
from itertools import compress
from typing import Any

from nats.errors import Error
from nats.js.api import ConsumerConfig

from jobqueue.connection.client import Client
from jobqueue.connection.retrying import MIN_RETRY_DELAY
from jobqueue.errors import describe_error
from jobqueue.jetstream.durables import Durable, ensure_durable
from jobqueue.jetstream.reading import find_stored_at
from jobqueue.jetstream.streams import api_request
from jobqueue.jetstream.tasks import run_all, run_for_each
from jobqueue.worker.in_flight import CHECK_VALID_FOR, InFlight, InFlightMessage
from jobqueue.worker.pulling import PullRequests

log = logging.getLogger(__name__)

MAX_RECOVERY_DELAY = 2.0  # seconds between two attempts
# Seconds without a pull request, so that all processes have sent their acks again before the server is asked for
# messages, and redelivers those whose ack wait is over.
FAILOVER_GRACE = 3.0
VERIFIED_AT_A_TIME = 32


class Recovery:
    """Ensures after any doubt that the durable exists, verifies what is in flight, and has open acks sent."""

    def __init__(
        self, nc: Client, stream: str, config: ConsumerConfig, in_flight: InFlight, pulls: PullRequests
    ) -> None:
        self._nc = nc
        self._stream = stream
        self._config = config
        self._in_flight = in_flight
        self._pulls = pulls
        self._now = asyncio.get_running_loop().time
        self._is_stable = True
        self._grace_ends = 0.0
        self._is_in_doubt = False  # whether somebody else may have got what waits to be processed
        self._reconnects = nc.reconnects
        self._leader: str | None = None  # the durable's; None on a single server
        self._created: str | None = None  # when the stream was
        self._reported_reason = ""

    def may_pull(self) -> bool:
        """Return whether the server may be asked for messages."""
        self.note_reconnect()
        if self._in_flight.needs_check.is_set() and self._is_leader_silent():
            return False
        return self._is_stable and self._nc.is_connected

    def _is_leader_silent(self) -> bool:
        return self._now() - self._in_flight.heard_at > CHECK_VALID_FOR

    def note_reconnect(self) -> None:
        """Recover if there was a reconnect."""
        if self._reconnects != self._nc.stats["reconnects"]:  # faster than the property
            self._reconnects = self._nc.reconnects
            self.recover()

    def recover(self, reason: str = "") -> None:
        """Begin the recovery from something that ends all pull requests; log the reason, if there is one."""
        if reason and reason != self._reported_reason:
            self._reported_reason = reason
            log.warning("%s: %s; trying again", self._stream, reason)
        self._is_stable, self._is_in_doubt = False, True
        self._grace_ends = self._now() + FAILOVER_GRACE
        self._in_flight.begin_epoch()
        self._pulls.forget_all()
        self._in_flight.needs_check.set()

    def note_served(self) -> None:
        """Log once that the server serves pull requests again."""
        if self._reported_reason and self._is_stable:
            self._reported_reason = ""
            log.info("%s is back", self._stream)

    async def run(self) -> None:
        """Check and recover whenever that is needed, for ever."""
        while True:
            await self._in_flight.needs_check.wait()
            if self._is_leader_silent():
                self._is_stable = False  # no pull request until the leader answers
            await self._until_stable()
            self._is_stable = True

    async def _until_stable(self) -> None:
        """Check, and once more when the grace period is over: another leader may have been lost meanwhile."""
        delay, reconnects = MIN_RETRY_DELAY, self._reconnects
        while True:
            self._in_flight.needs_check.clear()
            was_grace_over = self._is_grace_over()
            try:
                await self._check_once()
            except (Error, TimeoutError) as error:
                if isinstance(error, TimeoutError) and self._nc.is_receiving:
                    continue  # the answer is behind a large message
                self.recover(describe_error(error))
                if reconnects != self._reconnects:  # the server may be there in a moment, and needs heartbeats then
                    delay, reconnects = MIN_RETRY_DELAY, self._reconnects
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_RECOVERY_DELAY)
                continue
            if self._in_flight.needs_check.is_set():
                continue  # something has changed meanwhile, and open acks are not sent yet
            if was_grace_over:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(self._grace_ends - self._now()):
                    await self._in_flight.needs_check.wait()

    def _is_grace_over(self) -> bool:
        return self._now() >= self._grace_ends

    async def _check_once(self) -> None:
        while not self._nc.is_connected:
            await asyncio.sleep(MIN_RETRY_DELAY)
        self.note_reconnect()
        # What is in flight comes first: it needs heartbeats even while there is no leader.
        if unverified := self._in_flight.unverified():
            await self._verify_highest(unverified)
            await self._in_flight.send_heartbeats()
        checked_at = self._now()
        durable, stream = await asyncio.gather(
            ensure_durable(self._nc, self._stream, self._config), api_request(self._nc, f"STREAM.INFO.{self._stream}")
        )
        self._pulls.set_limits(durable.config)
        self._in_flight.has_replicas = durable.has_replicas
        self._note_changes(durable, stream)
        self._in_flight.checked_at = checked_at
        await self._in_flight.resend_acks()
        if self._is_in_doubt and self._is_grace_over():
            epoch = self._in_flight.epoch
            await run_for_each(self._in_flight.not_begun(), self._drop_if_gone)
            self._is_in_doubt = epoch != self._in_flight.epoch

    def _note_changes(self, durable: Durable, stream: dict[str, Any]) -> None:
        """Recover if the durable has another leader, or the stream may be another one.

        When a stream was created is only a hint: that changes too when it is restored, and doesn't when its store is
        rolled back.
        """
        created = stream["created"]
        if self._leader not in (durable.leader, None) or self._created not in (created, None):
            self.recover()
        self._leader, self._created = durable.leader, created

    async def _verify_highest(self, unverified: list[InFlightMessage]) -> None:
        """Verify all messages up to the highest one that is the same.

        A stream's history only loses its end (a roll-back, a snapshot) or all of it (another stream, another server).
        So a message that is the same proves all below it. Messages above it that are gone, or are other ones, are
        dropped.
        """
        unverified.sort(key=lambda entry: entry.sequence)
        at_a_time = 1  # mostly the highest one will do, and messages may be large
        while unverified:
            highest = unverified[-at_a_time:]
            del unverified[-at_a_time:]
            epoch = self._in_flight.epoch
            same = await run_all(self._is_same(entry) for entry in highest)
            if any(same):
                self._in_flight.verify_up_to(max(compress(highest, same), key=lambda entry: entry.sequence), epoch)
                return
            at_a_time = min(2 * at_a_time, VERIFIED_AT_A_TIME)

    async def _drop_if_gone(self, entry: InFlightMessage) -> None:
        """Don't begin to process what somebody else has done while this process was cut off."""
        if not entry.is_begun:
            await self._is_same(entry)

    async def _is_same(self, entry: InFlightMessage) -> bool:
        """Read a message in flight back, and drop it if its sequence has another message now, or none."""
        found = await find_stored_at(self._nc, self._stream, entry.sequence, entry.size)
        if found == entry.stored_at or entry not in self._in_flight:
            return found == entry.stored_at
        if found:
            self._in_flight.drop(entry, "is another message now")
        elif self._is_grace_over() and entry.ack:
            self._in_flight.remove(entry)  # the server has its ack
        elif self._is_grace_over():  # before that, a replica may not have the message yet
            self._in_flight.drop(entry, "is gone")
        return False
