"""Which messages of a durable are dead: delivered, not done, and never to be redelivered. No request lists them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from nats.aio.client import Client

from jobqueue.listening import AckListener
from jobqueue.reading import StoredMessage, gather_some, get_message, read_messages
from jobqueue.streams import subject_filters

CONFIRM_DELAY = 2.5  # seconds from the last ack until its message has left the stream, on replicas too
MAX_STEP = 5.0  # seconds that count between two looks: after a pause of this process, heartbeats may be unread
MAX_TIMER_LATENESS = 1.0  # seconds, of the server


class Watch:
    """Watches the messages that a durable has delivered and its stream still has.

    A message that isn't dead is one of these:
    - in flight: then its heartbeats are heard, three times within the ack wait;
    - waiting for a retry: then, as long as there are pull requests, it is delivered after its back-off, and is in
      flight, done or dead when all of its back-offs are over.

    So a message of which neither an ack nor a heartbeat was heard for all back-offs, while there were pull requests, is
    dead; and so is all that is left when the server says that nothing is pending. Any doubt (a new leader, a new
    durable, a reconnect) begins this anew.

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
        self._silent_for = 0.0  # seconds in which there were pull requests
        self._idle_since: float | None = None

    async def look(self, info: dict[str, Any]) -> list[int]:
        """Return the stream sequences of the dead messages, once that is certain; call it again and again until then.

        Args:
            info: what the server has just said of the durable.

        Raises:
            nats.errors.Error: the server doesn't answer.
        """
        if self._fingerprint != (fingerprint := self._take_fingerprint(info)):
            await self.stop()
            self._fingerprint = fingerprint
        now, is_idle = self._now(), not info["num_ack_pending"]
        since, self._looked_at = self._looked_at, now
        before, self._delivered = self._delivered, info["delivered"]["stream_seq"]
        if info["config"]["max_deliver"] < 1 and not is_idle:  # all that is pending will be redelivered
            await self.stop()
            return []
        if not self.suspects:
            # Under traffic, what was delivered just now need not be looked at.
            await self._find_suspects(subject_filters(info["config"]), self._delivered if is_idle else before)
            self._silent_for, self._idle_since, self._looked_at = 0.0, now if is_idle else None, self._now()
            return []
        if is_idle or info["num_waiting"] or self._delivered > before:
            self._silent_for += min(now - since, MAX_STEP)
        if self._idle_since is not None:
            is_certain = now >= self._idle_since + CONFIRM_DELAY
        else:
            is_certain = self._silent_for > _all_backoffs(info["config"]) + MAX_TIMER_LATENESS
            self._idle_since = now if is_idle else None
        return await self._conclude() if is_certain else []

    async def stop(self) -> None:
        """Forget all suspects."""
        self.suspects = []
        await self._listener.stop()

    def _take_fingerprint(self, info: dict[str, Any]) -> Any:
        config, leader = info["config"], (info.get("cluster") or {}).get("leader")
        return info["created"], leader, self._nc.stats["reconnects"], _all_backoffs(config), subject_filters(config)

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

    async def _conclude(self) -> list[int]:
        get = partial(get_message, self._nc, self._stream)
        found = await gather_some([partial(get, sequence) for sequence in self.suspects])
        # Those that have died with an advisory meanwhile are known after that, not before.
        known = await self._read_known()
        if self._idle_since is None:
            known |= self._listener.heard.keys()
        await self.stop()
        return [message.sequence for message in found if message and message.sequence not in known]


def _all_backoffs(config: dict[str, Any]) -> float:
    """Return the seconds for which a message may wait in all, from its first delivery to the last."""
    deliveries = config["max_deliver"]
    waits = config.get("backoff") or [config["ack_wait"]]
    return float(sum(waits[:deliveries]) + waits[-1] * max(0, deliveries - len(waits))) / 1e9


def _gaps(known: set[int], last: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of sequences up to the last one that have none that is known."""
    first = 1
    for sequence in sorted(known):
        if first < sequence <= last:
            yield first, sequence - 1
        first = max(first, sequence + 1)
    if first <= last:
        yield first, last
