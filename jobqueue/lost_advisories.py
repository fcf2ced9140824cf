"""Dead letters without an advisory, and exhausted advisories, whose processor crashed at each delivery."""

import asyncio
import logging
import math
from collections.abc import Iterable
from functools import partial
from itertools import count
from typing import Any

from nats.aio.client import Client
from nats.errors import Error

from jobqueue.advisories import publish_advisory, read_advisories
from jobqueue.durables import Durables, list_durables
from jobqueue.errors import describe_error
from jobqueue.listening import check_permission
from jobqueue.reading import gather_some
from jobqueue.redelivery import is_due, restore_exhausted
from jobqueue.streams import api_request
from jobqueue.watch import Watch

log = logging.getLogger(__name__)

LOOK_INTERVAL = 2.5  # seconds between two looks
SHORT_INTERVAL = 0.5  # seconds, while there is something to be found
MIN_LOOKS = 3
RUN_TIMEOUT = 10.0  # seconds, and all back-offs
FULL_LOOK_EVERY = 10  # looks; the others leave the advisories alone while nothing seems to be dead
MAX_LOOK_SHARE = 0.25  # of the time for looks; with many dead letters a look takes long

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
    search, now = Search(nc, dlq_stream, dlq_durable, stream), asyncio.get_running_loop().time
    complaint, may_listen = "", False
    while True:
        begun = now()
        try:
            if not may_listen:  # if that is not permitted, the script ends at its start, and not some day
                for name in (stream, dlq_stream):
                    await check_permission(nc, name)
                may_listen = True
            lost, exhausted = await search.look()
            for durable, sequences in lost:
                await _publish_advisories(nc, stream, durable, sequences)
            await gather_some([partial(restore_exhausted, nc, dlq_stream, dlq_durable, number) for number in exhausted])
        except Exception as error:  # whatever it is, the next look comes
            if complaint != (reason := describe_error(error)):
                complaint = reason
                log.warning("cannot look for dead letters without an advisory: %s; trying again", reason)
        interval = SHORT_INTERVAL if search.is_watching else LOOK_INTERVAL
        await asyncio.sleep(max(interval, (now() - begun) / MAX_LOOK_SHARE))


async def _publish_advisories(nc: Client, stream: str, durable: dict[str, Any], sequences: list[int]) -> None:
    async def publish(sequence: int) -> None:
        # The same id whoever finds it; not after an operator has changed the durable, so that it may be found again.
        message_id = f"{stream}.{durable['name']}.{sequence}.{durable['created']}.{durable['config']['max_deliver']}"
        stored = await publish_advisory(nc, stream, durable, sequence, 0, {"Nats-Msg-Id": message_id})
        if not stored.duplicate:
            log.info("dead letter # %d in %s had no advisory: published one", sequence, stream)

    await gather_some([partial(publish, sequence) for sequence in sequences])


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
        self._dlq_durables = Durables(nc, dlq_stream)
        self._advisory_watch = Watch(nc, dlq_stream, dlq_durable, self._read_none, is_due)

    async def run(self) -> list[Found]:
        """Look until it is certain which dead letters have no advisory; if there may be any, that takes all back-offs.

        Raises:
            nats.errors.Error: the request timed out, or the stream is no work queue.
        """
        found: list[Found] = []
        may_be_some, now = False, asyncio.get_running_loop().time
        deadline = math.inf
        for looks in count(1):
            found += (await self.look(always=may_be_some))[0]
            may_be_some = may_be_some or self._count > 0
            if looks >= MIN_LOOKS and not self.is_watching:
                break
            if looks == MIN_LOOKS:
                log.info("looking for dead letters without an advisory")
                deadline = now() + RUN_TIMEOUT + max(watch.patience for watch in self._watches.values())
            if now() > deadline:
                log.warning("cannot tell whether there are more dead letters: no consumer sends pull requests")
                break
            await asyncio.sleep(SHORT_INTERVAL)
        return found

    @property
    def is_watching(self) -> bool:
        """Return whether there are messages of which the next looks will tell whether they are dead."""
        return any(watch.suspects for watch in self._watches.values())

    async def look(self, *, always: bool = False) -> tuple[list[Found], list[int]]:
        """Return the dead letters of each durable that have no advisory, and the advisories that are exhausted.

        Args:
            always: look even if the count says that there are none; under traffic it may be wrong.

        Raises:
            nats.errors.Error: the request timed out, or the stream is no work queue.
        """
        durables = await list_durables(self._nc, self._stream)
        info = await api_request(self._nc, f"STREAM.INFO.{self._stream}")
        if info["config"]["retention"] != "workqueue":
            raise Error(f"{self._stream} is no work queue, and keeps what is done")
        self._count = dead = count_dead(info, durables)
        self._looks += 1
        is_watching = self.is_watching or self._advisory_watch.suspects or always
        if dead <= 0 and not is_watching and self._looks % FULL_LOOK_EVERY:
            return [], []
        dlq, dlq_durable = await asyncio.gather(
            api_request(self._nc, f"STREAM.INFO.{self._dlq_stream}"), self._dlq_durables.find(self._dlq_durable)
        )
        exhausted = []
        if dlq_durable and (count_dead(dlq, [dlq_durable]) > 0 or self._advisory_watch.suspects):
            exhausted = await self._advisory_watch.look(dlq_durable)
        self._count -= dlq["state"]["messages"]
        if self._count > 0 or self.is_watching or always:
            return await self._without_advisory(durables), exhausted
        return [], exhausted

    async def _without_advisory(self, durables: list[dict[str, Any]]) -> list[Found]:
        names = {info["name"]: info for info in durables}
        for name in self._watches.keys() - names:
            await self._watches.pop(name).stop()
        for name in names.keys() - self._watches:
            self._watches[name] = Watch(self._nc, self._stream, name, self._read_known)
        return [(info, await self._watches[name].look(info)) for name, info in names.items()]

    async def _read_known(self) -> set[int]:
        return set(await read_advisories(self._nc, self._dlq_stream, self._stream))

    async def _read_none(self) -> set[int]:
        return set()


def count_dead(stream: dict[str, Any], durables: Iterable[dict[str, Any]]) -> int:
    """Return how many messages of a work queue are neither to be delivered nor pending, by what the server says.

    While messages come and go it is a few more or less. Messages that no durable takes are counted too.
    """
    alive = sum(int(durable["num_pending"]) + int(durable["num_ack_pending"]) for durable in durables)
    return int(stream["state"]["messages"]) - alive
