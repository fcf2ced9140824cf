"""Finding the dead letters that have no advisory: it was lost, or their DLQ stream was missing or full."""

import asyncio
import logging
from collections.abc import Iterator, Mapping

from nats.aio.client import Client

from jobqueue.dead_letters.advisories import Hint, publish_advisory, read_hints
from jobqueue.dead_letters.counting import count_advisories, count_dead
from jobqueue.dead_letters.reading import read_messages
from jobqueue.dead_letters.verifying import CONFIRM_DELAY, Verifier
from jobqueue.durables import Durable
from jobqueue.errors import describe_error
from jobqueue.tasks import run_for_each

log = logging.getLogger(__name__)

LOOK_INTERVAL = 2.5  # seconds between two looks
MAX_LOOK_SHARE = 0.25  # of the time, with however many dead letters
COUNT_VALID_FOR = 10.0  # seconds for which advisories are just counted: some may be out of date, and hide a loss
SETTLING_TIME = 5.0  # seconds in which most of the messages that were in flight are done


class Search:
    """Publishes an advisory for each dead letter that has none, again and again.

    Any number of processes may do so at the same time: within the duplicate window they publish one advisory.
    """

    def __init__(self, nc: Client, dlq_stream: str, verifier: Verifier) -> None:
        self._nc = nc
        self._dlq_stream = dlq_stream
        self._verifier = verifier
        self._counts_valid_until: dict[str, float] = {}  # by durable
        self._now = asyncio.get_running_loop().time

    async def run(self) -> None:
        """Look for dead letters without an advisory, until cancelled."""
        complaint = ""
        while True:
            try:
                await self._look()
                complaint = ""
            except Exception as error:  # whatever it is, the next look comes
                if complaint != (reason := describe_error(error)):
                    complaint = reason
                    log.warning("cannot look for dead letters without an advisory: %s; trying again", reason)
            await asyncio.sleep(LOOK_INTERVAL)

    async def _look(self) -> None:
        durables = await self._verifier.durables.find_all()
        counts = await count_dead(self._nc, self._verifier.stream, durables)
        for durable, dead in zip(durables, counts, strict=True):
            self._verifier.forget_served(durable)
            if dead > 0 and await self._may_be_unnamed(durable, dead):
                await self._publish_missing(durable)
                self._counts_valid_until[durable.name] = self._now() + COUNT_VALID_FOR

    async def _may_be_unnamed(self, durable: Durable, dead: int) -> bool:
        advisories = await count_advisories(self._nc, self._dlq_stream, self._verifier.stream, durable.name)
        valid_until = self._counts_valid_until.setdefault(durable.name, self._now() + COUNT_VALID_FOR)
        return dead > advisories or self._now() > valid_until

    async def _publish_missing(self, durable: Durable) -> None:
        hints = await read_hints(self._nc, self._dlq_stream, self._verifier.stream, share=MAX_LOOK_SHARE)
        read_up_to = max((hint.advisories[-1] for hint in hints.values()), default=0)
        unnamed = await find_unnamed(self._nc, self._verifier.stream, durable, hints, MAX_LOOK_SHARE)
        candidates = [sequence for sequence in unnamed if self._verifier.may_ask(durable, sequence)]
        suspects: list[int] = []
        if not candidates:
            return

        async def ask(sequence: int) -> None:
            if not (await self._verifier.why_alive(sequence, durable.name))[1]:
                suspects.append(sequence)

        async def publish(sequence: int) -> None:
            letter, _ = await self._verifier.look(Hint(sequence, durable.name))
            if letter and sequence not in named:
                stored = await publish_advisory(self._nc, letter.stream, letter.durable, sequence)
                if not stored.duplicate:
                    log.info("dead letter # %d in %s had no advisory: published one", sequence, letter.stream)

        await asyncio.sleep(SETTLING_TIME)
        begun = self._now()
        await run_for_each(candidates, ask)
        await asyncio.sleep(max(CONFIRM_DELAY, (self._now() - begun) * (1 / MAX_LOOK_SHARE - 1)))
        named = await read_hints(self._nc, self._dlq_stream, self._verifier.stream, after=read_up_to)
        await run_for_each(suspects, publish)


async def find_unnamed(
    nc: Client, stream: str, durable: Durable, hints: Mapping[int, Hint], share: float = 1.0
) -> list[int]:
    """Return the stream sequences of what a durable has delivered, is still stored, and no advisory names."""
    found: set[int] = set()
    for subject in durable.filters:
        gaps = _gaps(sorted(hints), durable.delivered)
        await read_messages(nc, stream, subject, gaps, lambda message: found.add(message.sequence), share)
    return sorted(found)


def _gaps(named: list[int], last: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of sequences up to the last one that have none that is named."""
    first = 1
    for sequence in [*named, last + 1]:
        if first < min(sequence, last + 1):
            yield first, min(sequence - 1, last)
        first = max(first, sequence + 1)
