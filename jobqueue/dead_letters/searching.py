"""Finding the dead letters that have no advisory: it was lost, or their DLQ stream was missing or full."""

import asyncio
import logging
from collections.abc import Iterator, Mapping

from jobqueue.connection.client import Client
from jobqueue.dead_letters.advisories import Hint, publish_advisory, read_hints
from jobqueue.dead_letters.counting import count_dead
from jobqueue.dead_letters.verifying import CONFIRM_DELAY, UNCONFIRMED, Verifier
from jobqueue.errors import describe_error
from jobqueue.jetstream.durables import Durable
from jobqueue.jetstream.reading import read_messages
from jobqueue.jetstream.tasks import run_for_each

log = logging.getLogger(__name__)

COUNT_INTERVAL = 2.5  # seconds between two counts of the dead letters
SEARCH_INTERVAL = 10.0  # seconds between two searches for those without an advisory, while there are any dead letters
MAX_SEARCH_SHARE = 0.25  # of the time, with however many dead letters
QUESTION_DELAY = 5.0  # seconds until the search asks: most of the messages that were in flight are done then


async def search(nc: Client, dlq_stream: str, verifier: Verifier) -> None:
    """Publish an advisory for each dead letter that has none, again and again, until cancelled.

    Any number of processes may do so at the same time: within the duplicate window they publish one advisory.
    """
    now, reported_reason = asyncio.get_running_loop().time, ""
    next_search_at = now() + SEARCH_INTERVAL
    while True:
        try:
            durables = await verifier.durables.find_all()
            counts = await count_dead(nc, verifier.stream, durables)
            for durable in durables:
                verifier.forget_old_questions(durable)
            if max(counts, default=0) > 0 and now() > next_search_at:
                await _publish_missing(nc, dlq_stream, verifier, durables)
                next_search_at = now() + SEARCH_INTERVAL
            reported_reason = ""
        except Exception as error:  # whatever it is, the next search comes
            if reported_reason != (reason := describe_error(error)):
                reported_reason = reason
                log.warning("cannot search for dead letters without an advisory: %s; trying again", reason)
        await asyncio.sleep(COUNT_INTERVAL)


async def _publish_missing(nc: Client, dlq_stream: str, verifier: Verifier, durables: list[Durable]) -> None:
    now, stream, dead = asyncio.get_running_loop().time, verifier.stream, list[Hint]()
    hints = await read_hints(nc, dlq_stream, stream, share=MAX_SEARCH_SHARE)
    read_up_to = max((number for hint in hints.values() for number in hint.advisories), default=0)
    candidates = [
        Hint(sequence, durable.name)
        for durable in durables
        for sequence in await find_unnamed(nc, stream, durable, hints, MAX_SEARCH_SHARE)
        if verifier.may_ask(durable, sequence)
    ]
    del hints
    if not candidates:
        return

    async def ask(hint: Hint) -> None:
        _, why = await verifier.explain_alive(hint.sequence, hint.consumer)
        if why in ("", UNCONFIRMED):
            dead.append(hint)

    await asyncio.sleep(max(QUESTION_DELAY, *(durable.longest_delay for durable in durables)))
    begun = now()
    await run_for_each(candidates, ask)
    await asyncio.sleep(max(CONFIRM_DELAY, (now() - begun) * (1 / MAX_SEARCH_SHARE - 1)))
    named = await read_hints(nc, dlq_stream, stream, after=read_up_to)

    async def publish(hint: Hint) -> None:
        letter, _ = await verifier.verify(hint)
        if letter and hint.sequence not in named:
            stored = await publish_advisory(nc, stream, letter.durable, hint.sequence)
            if not stored.duplicate:
                log.info("dead letter # %d in %s had no advisory: published one", hint.sequence, stream)

    await run_for_each(dead, publish)


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
    for sequence in [*(number for number in named if number <= last), last + 1]:
        if first < sequence:
            yield first, sequence - 1
        first = sequence + 1
