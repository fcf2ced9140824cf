"""What an operator does with dead letters: redrive or discard some of them, or all.

An operator is one more DLQ processor. An advisory that was delivered before, and waits for a retry, is leased: a nak
with a delay keeps it from everybody. If a DLQ processor has it in flight, a heartbeat follows within the ack wait.
"""

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue.connection.client import Client
from jobqueue.dead_letters.advisories import Hint, publish_advisory, read_hints
from jobqueue.dead_letters.inventory import find_candidates
from jobqueue.dead_letters.letter import DeadLetter
from jobqueue.dead_letters.removing import redrive, remove
from jobqueue.dead_letters.verifying import GONE, Verifier
from jobqueue.errors import describe_error, printable
from jobqueue.jetstream.acks import ACK, ack_subject, delayed_nak, parse_ack_subject
from jobqueue.jetstream.durables import Durable, Durables, ensure_durable
from jobqueue.jetstream.reading import get_message
from jobqueue.jetstream.reasons import Reasons
from jobqueue.jetstream.streams import REQUEST_TIMEOUT, require_connection
from jobqueue.jetstream.tasks import run_for_each
from jobqueue.worker.options import MAX_ACK_PENDING
from jobqueue.worker.time_limit import TimeLimit
from jobqueue.worker.worker import Worker

log = logging.getLogger(__name__)

CONCURRENCY = 8  # dead letters at a time: what is published again and not removed is done twice if we are killed
LEASE = 30.0  # seconds
RELEASE_DELAY = 0.001  # seconds
RETRY_DELAY = 3.0  # seconds; then our last pull request has ended, and a DLQ processor gets what was skipped
ACK_WAIT = 5.0  # seconds, of a durable that no DLQ processor has configured yet
HEARTBEAT_LATENESS = 0.5  # seconds until a heartbeat has arrived
WATCH_INTERVAL = 0.2  # seconds
IN_FLIGHT = "a DLQ processor or another operator has it in flight"


class Operation:
    """Redrives dead letters; with `print_first`, which is called with each, they are discarded.

    After the shutdown no further one is begun; `run` sets it at its end. The connection must not echo what it sends.
    """

    def __init__(
        self,
        nc: Client,
        dlq_stream: str,
        dlq_durable: str,
        stream: str,
        reasons: Reasons,
        shutdown: asyncio.Event,
        print_first: Callable[[DeadLetter], Awaitable[None]] | None,
    ) -> None:
        self.tally: Counter[str] = Counter()
        self._nc = nc
        self._dlq_stream = dlq_stream
        self._durable = dlq_durable
        self._reasons = reasons
        self._print_first = print_first
        self._shutdown = shutdown
        self._is_for_all = False
        self._wanted: dict[int, Hint] = {}  # by the stream sequence of an advisory
        self._named: set[int] = set()  # dead letters that have got an advisory
        self._unwanted: dict[int, str] = {}  # other advisories that were delivered to us, with their ack subjects
        self._heard: set[int] = set()  # advisories that somebody else sent something about
        self._verifier = Verifier(nc, stream)
        self._durables = Durables(nc, dlq_stream)

    async def run(self, sequences: set[int]) -> None:
        """Handle the dead letters with these sequences, or all if there are none; name those that are skipped."""
        self._is_for_all = not sequences
        await self._verifier.pending.start(self._verifier.stream, self._dlq_stream)
        for prefix in ("$JS.ACK", "$JS.ACK.*.*"):  # both forms of ack subjects
            await self._nc.subscribe(f"{prefix}.{self._dlq_stream}.{self._durable}.>", cb=self._hear)
        config = ConsumerConfig(name=self._durable, durable_name=self._durable, ack_policy=AckPolicy.EXPLICIT)
        new = config.evolve(ack_wait=ACK_WAIT, max_ack_pending=MAX_ACK_PENDING)  # one that exists stays as it is
        await ensure_durable(self._nc, self._dlq_stream, new)
        candidates, read_up_to = await find_candidates(self._nc, self._dlq_stream, self._verifier, sequences)
        await run_for_each([hint for hint in candidates if not hint.advisories], self._name)
        # Read after that: a message that has died meanwhile has an advisory of the server's own, too.
        newer = await read_hints(self._nc, self._dlq_stream, self._verifier.stream, after=read_up_to)
        for hint in candidates:
            if advisories := hint.advisories + newer.get(hint.sequence, Hint(0, "")).advisories:
                self._wanted |= dict.fromkeys(advisories, hint._replace(advisories=advisories))
            elif hint.sequence in self._named:
                await self._report_missing(hint.sequence)
        unused = TimeLimit(REQUEST_TIMEOUT)
        self._worker = Worker(self._nc, self._dlq_stream, config, self._handle, CONCURRENCY, unused)
        reconnects = self._nc.reconnects
        working = asyncio.create_task(self._worker.run(self._shutdown))
        try:
            while self._wanted and not self._shutdown.is_set() and not working.done():
                await self._watch()
                await asyncio.sleep(WATCH_INTERVAL)
        finally:
            self._shutdown.set()
            await working
            with suppress(Error):  # else they are redelivered when the delay is over
                for reply in self._unwanted.values():
                    require_connection(self._nc, reconnects)
                    await self._nc.publish(reply, delayed_nak(RELEASE_DELAY))
        self.tally["skipped"] += len({hint.sequence for hint in self._wanted.values()})

    async def _name(self, hint: Hint) -> None:
        """Publish an advisory of a dead letter that has none, as a DLQ processor would."""
        try:
            letter, why = await self._verifier.verify(hint)
            if letter:
                await publish_advisory(self._nc, letter.stream, letter.durable, hint.sequence)
                self._named.add(hint.sequence)
            else:
                self._skip_alive(hint.sequence, why)
        except (Error, TimeoutError) as error:
            self._skip(hint.sequence, describe_error(error))

    async def _watch(self) -> None:
        """Lease the advisories that were delivered to somebody else. Raise an error if others can't be delivered."""
        durable = await self._durables.find(self._durable, since=asyncio.get_running_loop().time())
        if not durable:
            return
        # Without anything to be delivered, the rest is gone, or is not for this durable.
        last = durable.delivered if durable.waiting else sys.maxsize
        in_flight = self._worker.in_flight
        others = [advisory for advisory in self._wanted if advisory <= last and not in_flight.has(advisory)]
        if others:
            await self._lease(durable, others)
        elif not in_flight:
            self._check_deliveries(durable)

    def _check_deliveries(self, durable: Durable) -> None:
        name, limit = durable.name, durable.config.get("max_ack_pending") or -1
        if durable.is_paused:
            raise Error(f"{name} is paused: run `nats consumer resume -f {self._dlq_stream} {name}` first")
        if 0 < limit <= durable.pending:
            edit = f"nats consumer edit -f {self._dlq_stream} {name} --max-pending {MAX_ACK_PENDING}"
            raise Error(f"{name} has {limit} pending advisories, and may not have more: run `{edit}` first")

    async def _lease(self, durable: Durable, advisories: list[int]) -> None:
        """Take advisories that wait for a retry, and skip those that somebody else has in flight."""
        self._heard -= set(advisories)
        pending: list[int] = []
        listening_time = durable.ack_wait + HEARTBEAT_LATENESS

        async def ask(advisory: int) -> None:
            if await self._ask(advisory, durable.consumer_seq, durable.reconnects, LEASE + listening_time):
                pending.append(advisory)

        await run_for_each(advisories, ask)
        if pending:
            await asyncio.sleep(listening_time)
        await run_for_each(advisories, lambda advisory: self._take(durable, advisory))

    async def _take(self, durable: Durable, advisory: int) -> None:
        """Process an advisory as if it had just been delivered, unless somebody else has it."""
        found = await get_message(self._nc, self._dlq_stream, advisory)
        hint = self._wanted.get(advisory)
        if not hint or self._worker.in_flight.has(advisory):
            return
        if found and advisory not in self._heard:
            reply = ack_subject(self._dlq_stream, durable.name, 1, advisory, durable.consumer_seq, found.stored_at)
            await self._worker.receive(Msg(self._nc, found.subject, reply, found.data))
            return
        for other in hint.advisories:
            self._wanted.pop(other, None)
        if not found:
            await self._report_missing(hint.sequence)
            return
        self._skip(hint.sequence, IN_FLIGHT)

    async def _report_missing(self, sequence: int) -> None:
        """Name a dead letter whose advisory is gone, unless somebody else has handled it."""
        durables = await self._verifier.durables.find_all()
        letter, why = await self._verifier.verify(Hint(sequence, durables[0].name if durables else self._durable))
        if letter:
            self._skip(sequence, "its advisory is gone; run the command again")
        else:
            self._skip_alive(sequence, why)

    async def _handle(self, advisory: Msg) -> bytes:
        sequence, reconnects = advisory.metadata.sequence.stream, self._nc.reconnects
        if not (hint := self._wanted.get(sequence)) or self._shutdown.is_set():
            self._unwanted[sequence] = advisory.reply  # which `run` releases
            return delayed_nak(LEASE)
        if sequence in self._heard:  # then `_watch` leases it
            return delayed_nak(LEASE)
        del self._wanted[sequence]
        if any(other in self._wanted for other in hint.advisories):  # a DLQ processor may still have that one
            return delayed_nak(LEASE)
        try:
            letter, why = await self._verifier.verify(hint)
            if letter:
                await self._finish(letter, advisory)
            else:
                self._skip_alive(hint.sequence, why)
                if why != GONE:  # whether it is dead may not be certain yet
                    return delayed_nak(RETRY_DELAY)
        except Exception as error:  # such as a full disk to print to
            self._skip(hint.sequence, describe_error(error))
            return delayed_nak(RETRY_DELAY)
        with suppress(Error, TimeoutError):  # then a DLQ processor finds that the message is gone
            for other in set(hint.advisories) - {sequence}:
                require_connection(self._nc, reconnects)
                await self._nc.request(ack_subject(self._dlq_stream, self._durable, 1, other), ACK, REQUEST_TIMEOUT)
        return ACK

    async def _finish(self, letter: DeadLetter, advisory: Msg) -> None:
        """Redrive or discard a dead letter; after an error it may still be there."""
        sequence, order = letter.message.sequence, printable(letter.message.data)
        if self._print_first:
            await self._print_first(letter)
            await self._check_in_flight(advisory, letter)  # whoever reads the output may have made us wait
            if not await remove(self._nc, letter):
                raise Error(f"it {GONE}")
            log.info("discarded %s: # %d in %s", order, sequence, letter.stream)
        else:
            await self._check_in_flight(advisory, letter)
            stored = await redrive(self._nc, letter)
            log.info("redriven %s: # %d in %s is # %d now", order, sequence, letter.stream, stored)
        self.tally["done"] += 1
        await self._reasons.forget(sequence)

    async def _check_in_flight(self, advisory: Msg, letter: DeadLetter) -> None:
        """Raise an error if somebody else has the advisory, since we were suspended, say.

        A DLQ processor begins with a heartbeat. We hear that before the answer to our question; and without the answer
        nothing is certain of the message either.
        """
        sequence = advisory.metadata.sequence
        is_pending = await self._ask(sequence.stream, sequence.consumer, letter.message.reconnects)
        if not is_pending or sequence.stream in self._heard:
            raise Error(IN_FLIGHT)

    async def _ask(self, advisory: int, consumer_seq: int, reconnects: int, delay: float = LEASE) -> bool:
        names = self._dlq_stream, self._durable
        return await self._verifier.pending.ask(*names, consumer_seq, advisory, delay, reconnects)

    async def _hear(self, message: Msg) -> None:
        self._heard.add(parse_ack_subject(message.subject)[0])

    def _skip_alive(self, sequence: int, why: str) -> None:
        if not self._is_for_all:
            self._skip(sequence, f"it {why}")

    def _skip(self, sequence: int, why: str) -> None:
        self.tally["skipped"] += 1
        log.error("# %d in %s is skipped: %s", sequence, self._verifier.stream, why)
