"""Dead letters without an advisory: the server sent none, it was lost, or its own deliveries are exhausted."""

import asyncio
import logging
from collections.abc import Iterable
from functools import partial
from itertools import count
from typing import Any

from nats.aio.client import Client
from nats.errors import Error

from jobqueue.dead_letters import ADVISORY, parse_stored, publish_advisory
from jobqueue.errors import describe_error
from jobqueue.listening import AckListener
from jobqueue.reading import StoredMessage, gather_some, read_messages
from jobqueue.redelivery import is_due, publish_again
from jobqueue.streams import Durables, api_request
from jobqueue.watch import Watch

log = logging.getLogger(__name__)

LOOK_INTERVAL = 2.5  # seconds between two looks
SHORT_INTERVAL = 0.5  # seconds, where somebody waits for the result
MIN_LOOKS = 3
RARELY = 10  # looks, one of which looks for malformed advisories where nothing is dead
MAX_SHARE = 0.25  # of the time for looks; with many dead letters a look takes long

Found = tuple[dict[str, Any], list[int]]  # a durable, and the stream sequences of its dead letters


async def keep_publishing(nc: Client, dlq_stream: str, dlq_durable: str, stream: str) -> None:
    """Find the dead letters that have no advisory, and publish one for each, again and again.

    Any number of processes may do so at the same time: within the duplicate window they publish one advisory.

    Args:
        nc: the connection.
        dlq_stream: the stream of the advisories.
        dlq_durable: its durable.
        stream: the stream of the messages.
    """
    for name in (stream, dlq_stream):  # if that is not permitted, it is better said at once
        listener = AckListener(nc, name, "*")
        await listener.start([0])
        await listener.stop()
    search, now = Search(nc, dlq_stream, dlq_durable, stream), asyncio.get_running_loop().time
    complaint = ""
    while True:
        begun = now()
        try:
            durables, advisories = await search.look()
            for durable, sequences in durables:
                publish = partial(publish_advisory, nc, stream, durable)
                stored = await gather_some([partial(publish, sequence) for sequence in sequences])
                for sequence, ack in zip(sequences, stored, strict=True):
                    if not ack.duplicate:
                        log.info("dead letter # %d in %s had no advisory: published one", sequence, stream)
            await gather_some([partial(publish_again, nc, dlq_stream, dlq_durable, number) for number in advisories])
            complaint = ""
        except Exception as error:  # whatever it is, the next look comes
            await search.stop()
            if complaint != describe_error(error):
                complaint = describe_error(error)
                log.warning("cannot look for dead letters without an advisory: %s; trying again", complaint)
        await asyncio.sleep(max(LOOK_INTERVAL, (now() - begun) / MAX_SHARE))


class Search:
    """Counts the dead letters, and looks for those without an advisory when there are more than advisories."""

    def __init__(self, nc: Client, dlq_stream: str, dlq_durable: str, stream: str) -> None:
        self._nc = nc
        self._dlq_stream = dlq_stream
        self._dlq_durable = dlq_durable
        self._stream = stream
        self._watches: dict[str, Watch] = {}  # by durable
        self._looks = 0
        self._count = 0  # of dead letters without an advisory, a few more or less
        self._handlers = Durables(nc, dlq_stream)
        self._advisories = Watch(nc, dlq_stream, dlq_durable, self._read_none, is_due)

    async def run(self) -> list[Found]:
        """Look until no dead letter is unknown, or all are found; that takes as long as all back-offs.

        Raises:
            nats.errors.Error: the server doesn't answer, or the stream is no work queue.
        """
        found: dict[str, Found] = {}
        for looks in count(1):
            for info, sequences in (await self.look())[0]:
                _, before = found.get(info["name"], (info, []))
                found[info["name"]] = info, before + sequences
            if self._count <= sum(len(sequences) for _, sequences in found.values()) or (
                looks >= MIN_LOOKS and not self.is_watching
            ):
                await self.stop()
                break
            if looks == MIN_LOOKS:
                log.info("looking for dead letters without an advisory")
            await asyncio.sleep(SHORT_INTERVAL)
        return list(found.values())

    @property
    def is_watching(self) -> bool:
        """Return whether there are messages of which the next looks will tell whether they are dead."""
        return any(watch.suspects for watch in self._watches.values())

    async def look(self) -> tuple[list[Found], list[int]]:
        """Return the dead letters of each durable that have no advisory, and the advisories that are exhausted.

        Raises:
            nats.errors.Error: the server doesn't answer, or the stream is no work queue.
        """
        durables = await list_durables(self._nc, self._stream)
        info = await api_request(self._nc, f"STREAM.INFO.{self._stream}")
        if info["config"]["retention"] != "workqueue":
            raise Error(f"{self._stream} is no work queue, and keeps what is done")
        self._count = dead = count_dead(info, durables)
        self._looks += 1
        if dead <= 0 and not self.is_watching and not self._advisories.suspects and self._looks % RARELY:
            return [], []
        dlq, handler = await asyncio.gather(
            api_request(self._nc, f"STREAM.INFO.{self._dlq_stream}"), self._handlers.find(self._dlq_durable)
        )
        exhausted = []
        if handler and (count_dead(dlq, [handler]) > 0 or self._advisories.suspects):
            exhausted = await self._advisories.look(handler)
        self._count -= dlq["state"]["messages"]
        if self._count > 0 or self.is_watching:
            return await self._without_advisory(durables), exhausted
        return [], exhausted

    async def stop(self) -> None:
        """Forget what is being watched."""
        for watch in (self._advisories, *self._watches.values()):
            await watch.stop()

    async def _without_advisory(self, durables: list[dict[str, Any]]) -> list[Found]:
        names = {info["name"]: info for info in durables}
        for name in self._watches.keys() - names:
            await self._watches.pop(name).stop()
        for name in names.keys() - self._watches:
            self._watches[name] = Watch(self._nc, self._stream, name, self._read_known)
        return [(info, await self._watches[name].look(info)) for name, info in names.items()]

    async def _read_known(self) -> set[int]:
        """Return the stream sequences that the advisories name."""

        def keep(message: StoredMessage) -> int:
            dead_letter = parse_stored(message, self._stream)
            return dead_letter.sequence if dead_letter else 0

        last = (await api_request(self._nc, f"STREAM.INFO.{self._dlq_stream}"))["state"]["last_seq"]
        subject = f"{ADVISORY}.{self._stream}.*"
        return set(await read_messages(self._nc, self._dlq_stream, subject, [(1, last)], keep))

    async def _read_none(self) -> set[int]:
        return set()


async def list_durables(nc: Client, stream: str) -> list[dict[str, Any]]:
    """Return what the server says of each durable of a stream."""
    found: list[dict[str, Any]] = []
    while True:
        page = await api_request(nc, f"CONSUMER.LIST.{stream}", {"offset": len(found)})
        found += page["consumers"] or []
        if not page["consumers"] or len(found) >= page["total"]:
            return found


def count_dead(stream: dict[str, Any], durables: Iterable[dict[str, Any]]) -> int:
    """Return how many messages of a work queue are neither to be delivered nor pending, by what the server says.

    While messages come and go it is a few more or less. Messages that no durable takes are counted too.
    """
    alive = sum(int(durable["num_pending"]) + int(durable["num_ack_pending"]) for durable in durables)
    return int(stream["state"]["messages"]) - alive
