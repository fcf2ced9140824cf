"""A DLQ processor's work on one advisory: is its message dead? Then reprocess it, remove it, and ack the advisory."""

import asyncio
import json
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from jobqueue.connection.client import Client
from jobqueue.connection.retrying import retry
from jobqueue.dead_letters.advisories import Hint, parse_advisory
from jobqueue.dead_letters.letter import DeadLetter
from jobqueue.dead_letters.removing import remove
from jobqueue.dead_letters.verifying import ASKED_RECENTLY, CONFIRM_DELAY, UNCONFIRMED, Verifier
from jobqueue.errors import TRANSIENT_ERRORS, Dead, Retry, describe_attempt, printable
from jobqueue.jetstream.acks import ACK, LEAVE, TERM, ack_subject, delayed_nak, probe_ack
from jobqueue.jetstream.reasons import Reasons
from jobqueue.worker.pulling import MAX_BYTES
from jobqueue.worker.time_limit import TimeLimit
from jobqueue.worker.worker import SHUTDOWN_CONFIRM_TIME

log = logging.getLogger(__name__)

MIN_DELAY = 5.0  # seconds until the next attempt; doubled after each
MAX_DELAY = 120.0  # seconds


@dataclass
class Processing:
    """Handles the advisories of the dead letters of `verifier.stream`; `reprocess` is the user's work on one of these.

    After the shutdown nothing is tried again.
    """

    nc: Client
    verifier: Verifier
    reprocess: Callable[[Msg], Awaitable[None]]
    time_limit: TimeLimit
    shutdown: asyncio.Event
    reasons: Reasons
    tally: Counter[str] = field(default_factory=Counter)
    _proven_on: int = -1  # the connection's reconnects when an answer of the server was heard
    _in_progress: set[int] = field(default_factory=set)  # the messages that are being reprocessed here
    _bytes: int = 0  # of the messages that are being reprocessed
    _last_size: int = 2**20
    _has_finished: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, advisory: Msg) -> bytes:
        """Process the message that an advisory is about, and return how to ack the advisory."""
        stream = self.verifier.stream
        try:
            hint = parse_advisory(advisory.data, stream)._replace(advisories=(advisory.metadata.sequence.stream,))
        except ValueError:
            self.tally["deleted"] += 1
            log.warning("deleted, for it is no advisory of %s: %s", stream, printable(advisory.data))
            return TERM
        if hint.sequence in self._in_progress:  # by another advisory of the same message
            return delayed_nak(MIN_DELAY)
        self._in_progress.add(hint.sequence)
        size, what = 0, f"dead letter # {hint.sequence} in {stream}"
        try:
            while self._bytes >= MAX_BYTES:
                self._has_finished.clear()
                await self._has_finished.wait()
            size = self._last_size  # as the size of this one isn't known yet
            self._bytes += size
            # A transient error must not cost an attempt, so it is waited out here.
            letter, why = await retry(lambda: self._verify(hint, advisory), what, lambda _: self.shutdown.is_set())
            if letter:
                self._bytes += len(letter.message.data) - size
                size = self._last_size = len(letter.message.data)
                return await self._process(hint, letter, advisory.metadata.num_delivered)
        except (*TRANSIENT_ERRORS, NotFoundError):  # a shutdown doesn't wait for the server
            return LEAVE
        finally:
            self._in_progress.remove(hint.sequence)
            self._bytes -= size
            self._has_finished.set()
        if why in (ASKED_RECENTLY, UNCONFIRMED):
            return delayed_nak(MIN_DELAY if why == ASKED_RECENTLY else CONFIRM_DELAY)
        log.info("nothing to reprocess: stream sequence # %d in %s %s", hint.sequence, stream, why)
        return ACK

    async def _verify(self, hint: Hint, advisory: Msg) -> tuple[DeadLetter | None, str]:
        await probe_ack(self.nc, advisory.reply)  # a heartbeat, so that an operator hears that we begin
        # If we may not ack the message, the server says so now, and not after the work. Sequence 0 postpones nothing.
        await probe_ack(self.nc, ack_subject(self.verifier.stream, hint.consumer, 1, 0))
        if not await self._are_answers_heard(advisory):
            return None, ASKED_RECENTLY
        return await self.verifier.verify(hint)

    async def _are_answers_heard(self, advisory: Msg) -> bool:
        """Return whether the server's answers get here, once for each connection: else every message would look dead.

        An advisory that is in flight is pending, unless an operator has removed it.
        """
        metadata, reconnects = advisory.metadata, self.nc.reconnects
        if self._proven_on != reconnects:
            sequence, names = metadata.sequence, (metadata.stream, metadata.consumer)
            if not await self.verifier.pending.ask(*names, sequence.consumer, sequence.stream, MIN_DELAY, reconnects):
                log.warning("advisory # %d in %s is gone, or not pending", sequence.stream, metadata.stream)
                return False
            self._proven_on = reconnects
        return True

    async def _process(self, hint: Hint, letter: DeadLetter, attempt: int) -> bytes:
        order = printable(letter.message.data)
        log.info("reprocessing order %s", order)
        message = await letter.as_delivered(self.nc)
        error = await self.time_limit.run(self.reprocess, message)
        if error:
            self.tally["failed"] += 1
            log.error("error reprocessing order %s%s", order, describe_attempt(error, attempt, 0, hint.sequence))
        if isinstance(error, Dead):
            log.error("discarded: %s", json.dumps(letter.as_json()))
        elif error:
            await self.reasons.report(message, error, attempt)
            delay = min(MIN_DELAY * 2.0 ** min(attempt - 1, 10), MAX_DELAY)
            if isinstance(error, Retry) and error.delay is not None:
                delay = error.delay
            log.error("%s stays in %s; next attempt in %g s", order, letter.stream, delay)
            return delayed_nak(delay)
        await self._remove(letter)
        self.tally["discarded" if error else "done"] += 1
        return ACK

    async def _remove(self, letter: DeadLetter) -> None:
        """Remove a dead letter that is done; a shutdown waits for the server as long as for the last acks."""
        now, give_up_at = asyncio.get_running_loop().time, math.inf

        def is_over(_: Exception) -> bool:
            nonlocal give_up_at
            if self.shutdown.is_set():
                give_up_at = min(give_up_at, now() + SHUTDOWN_CONFIRM_TIME)
            return now() >= give_up_at

        what = f"dead letter # {letter.message.sequence} in {letter.stream}"
        try:
            await retry(lambda: remove(self.nc, letter), what, is_over)
        except (*TRANSIENT_ERRORS, NotFoundError):
            self.tally["unconfirmed"] += 1
            raise
