"""All dead letters of a stream, with and without an advisory, each of them once."""

import asyncio
from collections.abc import AsyncIterator

from nats.errors import Error

from jobqueue.connection.client import Client
from jobqueue.dead_letters.advisories import Hint, read_hints
from jobqueue.dead_letters.counting import count_dead
from jobqueue.dead_letters.letter import DeadLetter
from jobqueue.dead_letters.searching import find_unnamed
from jobqueue.dead_letters.verifying import CONFIRM_DELAY, Verifier
from jobqueue.jetstream.durables import Durable
from jobqueue.jetstream.reading import window_size
from jobqueue.jetstream.tasks import run_all

COUNTS = 3  # of the dead letters; under traffic one alone may be wrong
COUNT_INTERVAL = 0.1  # seconds


async def find_candidates(
    nc: Client, dlq_stream: str, verifier: Verifier, sequences: set[int]
) -> tuple[list[Hint], int]:
    """Return hints of these messages, or of all that may be dead if there are no sequences; then verify each.

    Also return the stream sequence of the last advisory that was read.
    """
    hints, durables = await read_hints(nc, dlq_stream, verifier.stream), await verifier.durables.find_all()
    read_up_to = max((number for hint in hints.values() for number in hint.advisories), default=0)
    if not durables:
        raise Error(f"{verifier.stream} has no durable, so none of its messages can be dead")
    if sequences:  # `verify` finds the right durable
        hints = {number: hints.get(number, Hint(number, durables[0].name)) for number in sequences}
    await _verify_first(nc, verifier, durables, hints)
    if not sequences:
        unnamed = {
            number: Hint(number, durable.name)
            for durable in durables
            for number in await find_unnamed(nc, verifier.stream, durable, hints)
        }
        if unnamed and await _are_more_dead(nc, verifier, hints):
            await _verify_first(nc, verifier, durables, unnamed)
            hints |= unnamed
    return [hints[number] for number in sorted(hints)], read_up_to


async def _verify_first(nc: Client, verifier: Verifier, durables: list[Durable], hints: dict[int, Hint]) -> None:
    """On replicas, verify messages for the first time, so that the next time is certain."""
    if any(durable.has_replicas for durable in durables):
        async for _ in read_dead_letters(nc, verifier, list(hints.values())):
            pass
        await asyncio.sleep(CONFIRM_DELAY)


async def _are_more_dead(nc: Client, verifier: Verifier, hints: dict[int, Hint]) -> bool:
    """Return whether, by the server's counts, more are dead than are named.

    If not, nothing else is asked about: that would postpone what waits for a retry.
    """
    named = 0
    async for _ in read_dead_letters(nc, verifier, list(hints.values())):
        named += 1
    for _ in range(COUNTS):
        if sum(await count_dead(nc, verifier.stream, await verifier.durables.find_all())) > named:
            return True
        await asyncio.sleep(COUNT_INTERVAL)
    return False


async def read_dead_letters(nc: Client, verifier: Verifier, candidates: list[Hint]) -> AsyncIterator[DeadLetter]:
    """Yield the candidates that are dead; only a few are in memory at a time."""
    window, begin = window_size(nc), 0
    while some := candidates[begin : begin + window]:
        begin += window
        found = [letter for letter, _ in await run_all(verifier.verify(hint) for hint in some) if letter]
        window = window_size(nc, [letter.message for letter in found])
        for letter in found:
            yield letter
