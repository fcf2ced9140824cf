"""Which messages of a durable are dead: delivered, not done, and never to be redelivered. No request lists them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from nats.aio.client import Client

from jobqueue.durables import subject_filters
from jobqueue.listening import AckListener
from jobqueue.reading import StoredMessage, gather_some, get_message, read_messages

CONFIRM_DELAY = 2.5  # seconds from the last ack until its message has left the stream, on replicas too
MAX_TIMER_LATENESS = 1.0  # seconds, of the server


class Watch:
    """Watches the messages that a durable has delivered and its stream still has.

    A message that isn't dead is one of these:
    - in flight: then its heartbeats are heard, three times within the ack wait;
    - waiting for a retry: then, where there are pull requests, it is delivered after its back-off, and is in flight,
      done or dead when it has had all of its deliveries.

    So a message of which neither an ack nor a heartbeat was heard until then is dead; and so is all that is left when
    the server says that nothing is pending. Any doubt (a new leader, a new durable, a reconnect) restarts the watch.

    Args:
        nc: the connection.
        stream: the stream's name.
        durable: the durable's name.
        read_known: returns the stream sequences of the messages that don't matter.
        matters: returns False for a message that is to be ignored.
    """

    def __init__(
        self,
        nc: Client,
        stream: str,
        durable: str,
        read_known: Callable[[], Awaitable[set[int]]],
        matters: Callable[[StoredMessage], bool] = lambda _: True,
    ) -> None:
        self.suspects: list[int] = []
        self._nc = nc
        self._stream = stream
        self._read_known = read_known
        self._matters = matters
        self._listener = AckListener(nc, stream, durable)
        self._now = asyncio.get_running_loop().time
        self._fingerprint: Any = None  # changes with any doubt
        self._delivered = 0  # the highest stream sequence that had been delivered at the last look
        self._looked_at = 0.0
        self._waits: list[float] = []  # seconds that a suspect may still have to wait, for one delivery after the other
        self._wait_began = 0.0
        self._idle_since: float | None = None

    async def look(self, info: dict[str, Any]) -> list[int]:
        """Return the stream sequences of the dead messages, once that is certain; call it again and again until then.

        Args:
            info: what the server has just said of the durable.

        Raises:
            nats.errors.Error: the request timed out.
        """
        fingerprint, delivered = self._take_fingerprint(info), info["delivered"]["stream_seq"]
        if self._fingerprint != fingerprint or delivered < self._delivered:
            await self.stop()
            self._fingerprint, self._delivered = fingerprint, 0
        now, is_idle = self._now(), not info["num_ack_pending"]
        since, self._looked_at = self._looked_at, now
        before, self._delivered = self._delivered, delivered
        if info["config"]["max_deliver"] < 1 and not is_idle:  # all that is pending will be redelivered
            await self.stop()
        elif not self.suspects:
            # Under traffic, what was delivered just now need not be looked at.
            await self._find_suspects(subject_filters(info["config"]), delivered if is_idle else before)
            self._waits, self._wait_began = _all_waits(info["config"]), self._now()
            self._idle_since = now if is_idle else None
        elif self._idle_since is not None:
            if now >= self._idle_since + CONFIRM_DELAY:
                return await self._confirm_dead()
        elif is_idle:
            self._idle_since = now
        elif self._are_waits_over(info, since, now, delivered > before):
            return await self._confirm_dead()
        return []

    def _are_waits_over(self, info: dict[str, Any], since: float, now: float, has_delivered: bool) -> bool:
        """Return whether what was waiting for a retry has had all of its deliveries.

        The server delivers what it has to redeliver first. So when a new message was delivered, or a pull request is
        left over, each wait that was over by then has ended in a delivery.
        """
        if info.get("paused") or not (info["num_waiting"] or has_delivered):
            return False
        if (now if info["num_waiting"] else since) > self._wait_began + self._waits[0] + MAX_TIMER_LATENESS:
            self._waits, self._wait_began = self._waits[1:], now
        return not self._waits

    @property
    def patience(self) -> float:
        """How many seconds it may take until it is certain which messages are dead, if there are pull requests."""
        return sum(self._waits) + len(self._waits) * (MAX_TIMER_LATENESS + 1)

    async def stop(self) -> None:
        """Forget all suspects."""
        self.suspects = []
        await self._listener.stop()

    def _take_fingerprint(self, info: dict[str, Any]) -> Any:
        config, leader = info["config"], (info.get("cluster") or {}).get("leader")
        deliveries = config["max_deliver"], _all_waits(config), subject_filters(config)
        return info["created"], leader, self._nc.stats["reconnects"], deliveries

    async def _find_suspects(self, subjects: list[str], last: int) -> None:
        def keep(message: StoredMessage) -> int:
            return message.sequence if self._matters(message) else 0

        known = await self._read_known() if last else set()
        suspects: set[int] = set()
        for subject in subjects:
            suspects.update(await read_messages(self._nc, self._stream, subject, _gaps(known, last), keep))
        self.suspects = sorted(suspects - {0})
        if self.suspects:
            await self._listener.start(self.suspects)

    async def _confirm_dead(self) -> list[int]:
        get = partial(get_message, self._nc, self._stream)
        found = await gather_some([partial(get, sequence) for sequence in self.suspects])
        # Those that have died with an advisory meanwhile are known after that, not before.
        known = await self._read_known()
        if self._idle_since is None:
            known |= self._listener.heard.keys()
        await self.stop()
        return [message.sequence for message in found if message and message.sequence not in known]


def _all_waits(config: dict[str, Any]) -> list[float]:
    """Return the seconds that a message waits after each of its deliveries."""
    waits, deliveries = config.get("backoff") or [config["ack_wait"]], max(config["max_deliver"], 1)
    return [wait / 1e9 for wait in (waits + waits[-1:] * deliveries)[:deliveries]]


def _gaps(known: set[int], last: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of sequences up to the last one that have none that is known."""
    first = 1
    for sequence in sorted(known):
        if first < sequence <= last:
            yield first, sequence - 1
        first = max(first, sequence + 1)
    if first <= last:
        yield first, last
