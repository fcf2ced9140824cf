"""A DLQ processor's work on one advisory: is its message dead? Then reprocess it, remove it, and ack the advisory."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from jobqueue.dead_letters.advisories import Hint, parse_advisory
from jobqueue.dead_letters.pending import Pending, delayed_nak
from jobqueue.dead_letters.removing import remove
from jobqueue.dead_letters.verifying import CONFIRM_DELAY, UNKNOWN, DeadLetter, Verifier
from jobqueue.errors import TRANSIENT_ERRORS, describe_failure, printable
from jobqueue.in_flight import ACK, LEAVE, TERM
from jobqueue.retrying import retry
from jobqueue.streams import ack_subject, probe_ack
from jobqueue.time_limit import TimeLimit

log = logging.getLogger(__name__)

MIN_DELAY = 5.0  # seconds until the next attempt; doubled after each
MAX_DELAY = 120.0  # seconds
MAX_FIRST_LOOKS = 10_000  # that are remembered

T = TypeVar("T")
Reprocess = Callable[[Msg], Coroutine[Any, Any, None]]


class Processing:
    """Handles the advisories of the dead letters of `verifier.stream`; `reprocess` is the user's work on one of these.

    After the shutdown nothing is tried again.
    """

    def __init__(
        self,
        nc: Client,
        dlq_stream: str,
        verifier: Verifier,
        reprocess: Reprocess,
        time_limit: TimeLimit,
        shutdown: asyncio.Event,
    ) -> None:
        self.tally: Counter[str] = Counter()
        self._nc = nc
        self._verifier = verifier
        self._stream = verifier.stream
        self._reprocess = reprocess
        self._time_limit = time_limit
        self._shutdown = shutdown
        self._advisories = Pending(nc, dlq_stream)
        self._proven_on = -1  # the connection's reconnects when an answer was heard
        self._first_looks: dict[int, float] = {}  # by stream sequence: when it was first seen to be dead
        self._now = asyncio.get_running_loop().time

    async def start(self) -> None:
        """Subscribe to the server's answers."""
        await self._verifier.start()
        await self._advisories.start()

    async def handle(self, advisory: Msg) -> bytes:
        """Process the message that an advisory is about, and return how to ack the advisory."""
        try:
            hint = parse_advisory(advisory.data, self._stream)
        except ValueError:
            self.tally["deleted"] += 1
            log.warning("deleted, for it is no advisory of %s: %s", self._stream, printable(advisory.data))
            return TERM
        try:
            letter, why = await self._retry(hint, partial(self._look, hint, advisory))
            if letter:
                return await self._process(hint, letter, advisory.metadata.num_delivered)
        except (*TRANSIENT_ERRORS, NotFoundError):  # a shutdown doesn't wait for the server
            return LEAVE
        if why == UNKNOWN:
            return delayed_nak(MIN_DELAY)
        log.info("nothing to reprocess: stream sequence # %d in %s %s", hint.sequence, self._stream, why)
        return ACK

    async def _look(self, hint: Hint, advisory: Msg) -> tuple[DeadLetter | None, str]:
        # So an operator hears that we begin.
        await probe_ack(self._nc, advisory.reply)
        # Refused now, and not after the work.
        await probe_ack(self._nc, ack_subject(self._stream, hint.consumer, hint.deliveries, hint.sequence))
        if not await self._are_answers_heard(advisory):
            return None, UNKNOWN
        return await self._verifier.look(hint)

    async def _are_answers_heard(self, advisory: Msg) -> bool:
        """Return whether the server's answers get here, once for each connection: else every message would look dead.

        An advisory that is in flight is pending, unless an operator has removed it.
        """
        metadata, reconnects = advisory.metadata, int(self._nc.stats["reconnects"])
        if self._proven_on != reconnects:
            sequence, nak = metadata.sequence, delayed_nak(MIN_DELAY)
            if not await self._advisories.ask(metadata.consumer, sequence.consumer, sequence.stream, nak, reconnects):
                log.warning("advisory # %d in %s is gone, or not pending", sequence.stream, metadata.stream)
                return False
            self._proven_on = reconnects
        return True

    async def _process(self, hint: Hint, letter: DeadLetter, attempt: int) -> bytes:
        if letter.durable.has_replicas and not self._is_confirmed(letter.sequence):
            return delayed_nak(CONFIRM_DELAY)
        order = printable(letter.message.data)
        log.info("reprocessing order %s", order)
        error = await self._time_limit.run(self._reprocess(await letter.as_delivered(self._nc)))
        if not error:
            self.tally["done"] += 1
            await self._retry(hint, lambda: remove(self._nc, letter))
            return ACK
        self.tally["failed"] += 1
        log.error("error reprocessing order %s: %s", order, describe_failure(error, attempt, 0, letter.sequence))
        delay = min(MIN_DELAY * 2.0 ** min(attempt - 1, 10), MAX_DELAY)
        log.error("%s stays in %s; next attempt in %g s", order, self._stream, delay)
        return delayed_nak(delay)

    def _is_confirmed(self, sequence: int) -> bool:
        """Return whether a message was seen to be dead some time ago; remember it if not.

        Nothing waits for that in this process: the advisory is redelivered meanwhile.
        """
        first = self._first_looks.setdefault(sequence, self._now())
        if self._now() > first + CONFIRM_DELAY * 0.9:
            del self._first_looks[sequence]
            return True
        if len(self._first_looks) > MAX_FIRST_LOOKS:
            del self._first_looks[next(iter(self._first_looks))]
        return False

    async def _retry(self, hint: Hint, call: Callable[[], Awaitable[T]]) -> T:
        # A transient error must not cost an attempt, so it is waited out here.
        what = f"dead letter # {hint.sequence} in {self._stream}"
        return await retry(call, what, lambda _: self._shutdown.is_set())
