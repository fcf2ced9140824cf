"""Pull, work, acknowledge, stop: the loop of both consumers.

One message in, one message out. A slot asks with a pull request for one message, works on it, and
acknowledges it with `+NXT`, which is an ack and the next pull request in one; the answer, the next message
or a status, comes to the slot's own inbox and is what confirms the ack. There is one slot more than
hands to work, so that the next message is on its way while this one is worked on. With a server near by that is all
the prefetch there is; with a far one there are as many slots more as it takes to keep the hands busy with short work.
Whatever is held is kept alive with `+WPI`, so that work may take longer than the ack wait.

On several replicas that answer comes before a majority of them has the ack, and a new leader would send the message
again. There an ack and the next pull request are two requests: the server answers a plain ack when a majority has it.

Source: https://docs.nats.io/reference/reference-protocols/nats_api_reference (MSG.NEXT, +NXT, +WPI).
"""

import asyncio
import json
import logging
import math
import shlex
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionReconnectingError, Error, NoRespondersError, OutboundBufferLimitError
from nats.js.api import ConsumerConfig, ConsumerInfo
from nats.js.errors import NoStreamResponseError, NotFoundError, ServerError, ServiceUnavailableError

from jobqueue.script import Failure, reason, text

log = logging.getLogger(__name__)

ACK = Msg.Ack.Ack
TERM = Msg.Ack.Term
LEAVE = b""  # no answer at all: the ack wait brings the message back

EXPIRES = 2.0  # seconds that a pull request waits at the server; a stop waits for that, so it isn't more
LATE = 2.0  # seconds after that until its answer counts as lost: no pull request outlives the wait for it
AT_START = 30.0  # seconds of asking for what a script needs before it can work
CONFIRM = 30.0  # seconds of asking for the confirmation of one ack
CONFIRM_AT_STOP = 10.0
UNANSWERED = 6  # requests for it without an answer: the server knows of no such delivery, and sends the message again
NEWS = 0.5  # seconds that a message may be held without a look at whose stream it is, and at who leads
TICK = 0.1  # seconds between two looks at what is due
LONGEST_PAUSE = 2.0  # seconds between two pull requests while something is wrong
LONGEST_RETRY_PAUSE = 0.5  # seconds between two attempts at any other request
ANSWER = 1.0  # seconds for the answer to any other request
# Seconds without a pull request after a server or a leader was away, and from the start if another is away meanwhile:
# longer than it takes every process to repeat its acks, so that they are there before a message whose ack wait is over
# is sent again.
HOLD_BACK = 3.0

FAR = 0.005  # seconds of the shortest round trip from which on one message ahead may be too few
WAIT = 0.4  # seconds that a message may wait for a hand, as far as the last work tells
FADE = 0.98  # what is left of the longest work, from one message that is done to the next
MOST_SLOTS = 128  # where the concurrency doesn't ask for more: all processes together have 512 pull requests

# What passes by itself: no answer, no leader, no connection.
PASSING = (
    TimeoutError,
    NoRespondersError,
    NoStreamResponseError,
    ConnectionReconnectingError,
    OutboundBufferLimitError,
    ServiceUnavailableError,
    ServerError,
)

Handle = Callable[[Msg], Awaitable[bytes]]
Answers = asyncio.Queue[Msg | None]
Identity = tuple[int, datetime]
T = TypeVar("T")


async def check_stream(nc: Client, stream: str, subject: str, *command: str) -> None:
    """Check that a stream is there, and that it may have messages of a subject.

    Args:
        nc: the connection.
        stream: the stream's name.
        subject: one that may have wildcards.
        command: what creates such a stream, for the line that says that it isn't there.

    Raises:
        Failure: there is no such stream, or it has other subjects.

    """
    try:
        info = await retry(lambda: nc.jetstream().stream_info(stream), stream, _at_start())
    except NotFoundError:
        raise Failure(f"there is no stream {stream}: create it with {shlex.join(command)}") from None
    subjects = info.config.subjects or [">"]  # without any it has those of other streams
    if not any(overlap(subject, its) for its in subjects):
        raise Failure(f"{stream} has no subject that {subject} matches: its subjects are {text(', '.join(subjects))}")


def overlap(one: str, other: str) -> bool:
    """Return whether a subject can match both of two subjects with wildcards."""
    tokens, others = one.split("."), other.split(".")
    for token, its in zip(tokens, others, strict=False):
        if ">" in (token, its):
            return True
        if token != its and "*" not in (token, its):
            return False
    return len(tokens) == len(others)


async def attempt(work: Coroutine[Any, Any, None], time_limit: float) -> BaseException | None:
    """Await a user's own work and return what it raised, whatever that is, or None.

    Even a SystemExit or a CancelledError is no more than failed work. So it has a task of its own, which it may
    cancel.

    Args:
        work: the user's coroutine.
        time_limit: seconds after which it is cancelled and has failed. Heartbeats would keep it for ever.

    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[BaseException | None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not outcome.done():
            outcome.set_result(error)

    async def to_its_end() -> None:
        try:
            await work
        except BaseException as error:
            settle(error)
        else:
            settle(None)

    def expire() -> None:
        settle(TimeoutError(f"not done within the time limit of {time_limit:g} s"))
        task.cancel()  # not awaited: work that ignores it would be kept for ever, too

    task = asyncio.create_task(to_its_end())
    timer = loop.call_later(time_limit, expire)
    try:
        return await outcome
    finally:
        timer.cancel()


async def retry(call: Callable[[], Awaitable[T]], what: str, give_up: Callable[[Exception], bool]) -> T:
    """Return what `call()` returns, called again after each fault that passes by itself.

    Args:
        call: makes the request.
        what: what it is for, for the log line when it doesn't work at once; without it there is none.
        give_up: says of a fault whether to raise it.

    """
    pause = TICK
    while True:
        try:
            return await call()
        except (*PASSING, NotFoundError) as fault:  # a stream that is gone may come back
            if give_up(fault):
                raise
            if what and pause == TICK:
                log.warning("%s: %s; trying again", what, reason(fault))
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_RETRY_PAUSE)


def _at_start() -> Callable[[Exception], bool]:
    deadline = asyncio.get_running_loop().time() + AT_START
    return lambda fault: isinstance(fault, NotFoundError) or asyncio.get_running_loop().time() > deadline


class Worker:
    """A process's share of the work on one durable consumer.

    Args:
        nc: the connection.
        stream: the stream's name.
        config: the durable, which is created or updated.
        handle: works on one message and returns ACK, TERM or LEAVE; an exception is logged and means LEAVE.
        concurrency: how many messages are worked on at a time.
        stop: the event that ends the work.

    """

    def __init__(
        self,
        nc: Client,
        stream: str,
        config: ConsumerConfig,
        handle: Handle,
        concurrency: int,
        stop: asyncio.Event,
    ) -> None:
        self._nc = nc
        self._stream = stream
        self._config = config
        self._handle = handle
        self._concurrency = concurrency
        self._hands = asyncio.Semaphore(concurrency)
        self._slots = 0
        self._round_trip = math.inf  # the shortest one of this connection
        self._longest = math.inf  # seconds of work, of late
        self._stop = stop
        self._durable = config.durable_name or ""
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{self._durable}"
        self._pull = json.dumps({"batch": 1, "expires": int(EXPIRES * 1e9)}).encode()
        self._ack_and_pull = b"+NXT " + self._pull
        self._held: dict[str, Msg] = {}  # by ack subject: what is worked on, or waits for a hand or a confirmation
        self._verdicts: dict[Identity, asyncio.Future[bytes]] = {}  # of what is worked on, or waits for a confirmation
        self._waiting: dict[Answers, float] = {}  # the slots that wait for an answer, and until when
        self._troubled: set[Answers] = set()  # the slots whose last answer was no good
        self._replicated = False
        self._leader: str | None = None  # the durable's, when it last had one; None on a single server
        self._changed = -math.inf  # when it was another one, or none was there, or no connection
        self._reconnects = nc.stats["reconnects"]  # that are known of
        self._mending = asyncio.Lock()
        self._mended = 0.0  # when a slot last did that, and what it failed with
        self._fault: Error | None = None
        self._complaint = ""

    async def run(self) -> Counter[bytes]:
        """Work until told to stop, then finish what is held.

        Returns:
            How many messages were acknowledged (ACK), terminated (TERM) and left (LEAVE).

        Raises:
            Failure: the durable cannot be created.

        """
        durable = f"the durable {self._durable} on {self._stream}"
        at_start = _at_start()
        try:
            info = await retry(self._create_durable, durable, lambda fault: self._stop.is_set() or at_start(fault))
        except (Error, TimeoutError) as error:
            raise Failure(f"cannot create {durable}: {reason(error)}") from None
        self._note_leader(info)
        ack_wait = min(info.config.backoff or [info.config.ack_wait or 30.0])
        tally: Counter[bytes] = Counter()
        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(self._tick(ack_wait / 3))
            async with asyncio.TaskGroup() as slots:
                for _ in range(self._concurrency + 1):
                    self._add_slot(slots, tally)
            ticking.cancel()
        return tally

    def _add_slot(self, slots: asyncio.TaskGroup, tally: Counter[bytes]) -> None:
        self._slots += 1
        slots.create_task(self._slot(slots, tally))

    def _leave(self, most: int) -> bool:
        """Return whether a slot is to end, since there are more than that."""
        leaves = self._slots > most
        self._slots -= leaves
        return leaves

    def _note_work(self, seconds: float, verdict: bytes) -> None:
        """Remember how long work takes; what failed at once tells nothing of that."""
        if verdict == ACK:
            self._longest = 0 if self._longest == math.inf else FADE * self._longest
        self._longest = max(self._longest, seconds)

    def _most_slots(self) -> int:
        """Return how many slots there may be, so that no message waits for long if work takes as long as of late."""
        fewest = self._concurrency + 1
        if self._round_trip < FAR:
            return fewest
        ahead = int(WAIT * self._concurrency / max(self._longest, 1e-6))
        return max(fewest, min(self._concurrency + ahead, MOST_SLOTS))

    async def _slot(self, slots: asyncio.TaskGroup, tally: Counter[bytes]) -> None:
        """Ask, work, acknowledge and ask again, until the stop, or until there are more slots than it takes."""
        loop = asyncio.get_running_loop()
        answers: Answers = asyncio.Queue()

        arrived_at = 0.0

        async def arrived(answer: Msg) -> None:
            nonlocal arrived_at
            arrived_at = loop.time()
            if answer.reply:
                self._held[answer.reply] = answer
            answers.put_nowait(answer)

        inbox = self._nc.new_inbox()
        subscription = await self._nc.subscribe(inbox, cb=arrived)
        surplus = False
        acked: Msg | None = None  # what is done, as long as no answer has confirmed its ack
        pause = TICK
        while not ((surplus or self._stop.is_set()) and answers.empty()):
            if acked and (acked.reply not in self._held or not answers.empty()):
                await self._confirm(acked, ACK)  # a late answer to an earlier request confirms nothing
                acked = None
            asked_at = loop.time() if answers.empty() else -math.inf  # and tells nothing of the way
            if acked and self._replicated:
                _, answer = await asyncio.gather(self._confirm(acked, ACK), self._ask(inbox, None, answers))
                acked = None
            else:
                answer = await self._ask(inbox, acked, answers)
            trouble = _trouble(answer)
            if answer and not answer.reply and not surplus:  # nothing is waiting, or something is wrong
                surplus = self._leave(self._concurrency + 1)
            if surplus and trouble:
                self._troubled.discard(answers)  # the other slots take care of it
            elif trouble:
                self._unwell(answers, trouble)
            elif answer or surplus:
                self._well(answers)
            if acked:
                if trouble or not answer:
                    await self._confirm(acked, ACK, doubtful=True)
                self._settle(acked)
                acked = None
            if surplus or (answer and not trouble):
                pause = TICK
            else:
                await self._recover(answers, pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            if answer and answer.reply:
                self._round_trip = min(self._round_trip, arrived_at - asked_at)
                if not self._hands.locked() and self._slots < self._most_slots() and answer.metadata.num_pending:
                    self._add_slot(slots, tally)
                acked = await self._serve(answer, arrived_at, tally)
                surplus = surplus or self._leave(self._most_slots())
            elif answer and not surplus:
                await asyncio.sleep(TICK)  # for the case that statuses come at once, one after the other
        if acked:
            await self._confirm(acked, ACK)
        with suppress(Error):
            await subscription.unsubscribe()

    async def _serve(self, message: Msg, arrived_at: float, tally: Counter[bytes]) -> Msg | None:
        """Work on a message, and return it if its ack is to go with the next pull request."""
        loop = asyncio.get_running_loop()
        verdict = await self._verdict(message, tally)
        if loop.time() > arrived_at + NEWS:
            with suppress(Error):
                await self._mend()
        if verdict == ACK and message.reply in self._held:
            return message
        if verdict == TERM:
            await self._confirm(message, TERM)
        else:
            self._held.pop(message.reply, None)
        return None

    async def _verdict(self, message: Msg, tally: Counter[bytes]) -> bytes:
        """Work on a message, or wait for what becomes of it, if the server sends it again while it is held.

        The server loses sight of a message when it hears nothing of it for the ack wait, or has a new leader.
        """
        loop = asyncio.get_running_loop()
        identity = _identity(message)
        while earlier := self._verdicts.get(identity):
            if (verdict := await earlier) != LEAVE:
                return verdict
        done = self._verdicts[identity] = loop.create_future()
        async with self._hands:
            began_at = loop.time()
            verdict = await self._work(message)
        tally[verdict] += 1
        self._note_work(loop.time() - began_at, verdict)
        if verdict == LEAVE:
            self._verdicts.pop(identity, None)
        done.set_result(verdict)
        return verdict

    async def _work(self, message: Msg) -> bytes:
        try:
            return await self._handle(message)
        except Exception as error:
            log.error(
                "stream sequence # %d in %s: %s",
                message.metadata.sequence.stream,
                self._stream,
                reason(error),
            )
            return LEAVE

    async def _ask(self, inbox: str, acked: Msg | None, answers: Answers) -> Msg | None:
        """Acknowledge what is done, ask for the next message, and return the answer.

        None means that there is none, or that this is no time to ask: the ack is then not sent.
        """
        # What is sent without a connection is kept by nats-py and sent later: more requests than wanted.
        while answers.empty() and not self._nc.is_connected and not self._stop.is_set():
            await asyncio.sleep(TICK)
        if answers.empty():
            if self._stop.is_set() or self._holds_back():
                return None
            with suppress(OutboundBufferLimitError):
                if acked:
                    await self._nc.publish(acked.reply, self._ack_and_pull, reply=inbox)
                else:
                    await self._nc.publish(self._next, self._pull, reply=inbox)
        self._waiting[answers] = asyncio.get_running_loop().time() + EXPIRES + LATE
        try:
            return await answers.get()
        finally:
            self._waiting.pop(answers, None)

    async def _tick(self, heartbeat: float) -> None:
        """Keep alive what is held; wake the slots whose answer is lost, as each of before a reconnect may be."""
        loop = asyncio.get_running_loop()
        reconnects = self._reconnects
        due = loop.time() + heartbeat
        while True:
            await asyncio.sleep(TICK)
            now = loop.time()
            self._note_reconnect()
            reconnected = reconnects != self._reconnects
            reconnects = self._reconnects
            if reconnected:
                self._round_trip = math.inf
            for answers, deadline in list(self._waiting.items()):
                if reconnected or now > deadline:
                    del self._waiting[answers]
                    answers.put_nowait(None)
            if self._nc.is_connected and now >= due:
                due = now + heartbeat
                with suppress(OutboundBufferLimitError):
                    for ack_subject in list(self._held):
                        await self._nc.publish(ack_subject, Msg.Ack.Progress)

    async def _confirm(self, message: Msg, ack: bytes, doubtful: bool = False) -> None:
        """Send an ack until the server answers it; an ack may be repeated.

        Where something is wrong, the stream may be another one by now, and the ack would lose one of its messages.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        doubtful = doubtful or self._holds_back()
        unanswered = 0

        async def send() -> None:
            nonlocal began, doubtful, unanswered
            while not (self._nc.is_connected or self._stop.is_set()):
                await asyncio.sleep(TICK)
                began = loop.time()
            if doubtful:
                await self._mend()
            doubtful = True
            if message.reply in self._held:
                try:
                    await self._nc.request(message.reply, ack, timeout=ANSWER)
                except TimeoutError:
                    unanswered += self._nc.is_connected
                    raise

        def give_up(_: Exception) -> bool:
            waited = loop.time() - began
            return unanswered >= UNANSWERED or waited > (CONFIRM_AT_STOP if self._stop.is_set() else CONFIRM)

        try:
            await retry(send, "", give_up)
        except Error:
            sequence = message.metadata.sequence.stream
            log.warning("ack of # %d in %s is not confirmed: it may come again", sequence, self._stream)
        self._settle(message)

    def _settle(self, message: Msg) -> None:
        self._held.pop(message.reply, None)
        self._verdicts.pop(_identity(message), None)

    def _holds_back(self) -> bool:
        """Return whether other processes may not have repeated their acks yet."""
        self._note_reconnect()
        return asyncio.get_running_loop().time() < self._changed + HOLD_BACK

    def _note_reconnect(self) -> None:
        """Count a reconnect as a change; a slot that waited for it may see it before `_tick` does."""
        reconnects = self._nc.stats["reconnects"]
        if self._reconnects != reconnects:
            self._reconnects = reconnects
            self._changed = asyncio.get_running_loop().time()

    async def _recover(self, answers: Answers, pause: float) -> None:
        """Back off until the stream and its durable were there for so long that every process has repeated its acks.

        Or until a late answer comes: a message's ack is to be there by then, too.
        """
        loop = asyncio.get_running_loop()
        held_back = False
        while answers.empty() and not self._stop.is_set():
            pause_ends = loop.time() + pause
            while loop.time() < pause_ends and answers.empty() and not self._stop.is_set():
                await asyncio.sleep(TICK)
            try:
                await self._mend()
                if held_back and not self._holds_back():
                    break
                held_back = True
                pause = HOLD_BACK
            except Error as error:
                self._troubled.add(answers)
                self._complain(reason(error))
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _mend(self) -> None:
        """See to it that the durable is there, and let go of what came from a stream that was deleted.

        One slot does that for all that ask before it begins.
        """
        asked = asyncio.get_running_loop().time()
        async with self._mending:
            if self._mended < asked:
                self._mended = asyncio.get_running_loop().time()
                self._fault = None
                try:
                    self._note_leader(await self._find_durable())
                    await self._let_go()
                except Error as error:
                    self._fault = error
                    self._changed = asyncio.get_running_loop().time()
            if self._fault:
                raise self._fault

    def _note_leader(self, info: ConsumerInfo) -> None:
        leader = info.cluster.leader if info.cluster else None
        if self._leader not in (leader, None):
            self._changed = asyncio.get_running_loop().time()
        self._leader = leader
        self._replicated = bool(info.cluster and info.cluster.replicas)

    async def _let_go(self) -> None:
        """Let go of what came from a stream that was deleted: an ack would go to what has its sequence now."""
        created = (await self._nc.jetstream(timeout=ANSWER).stream_info(self._stream)).created
        for message in list(self._held.values()):
            if created and message.metadata.timestamp < created:
                self._settle(message)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            log.warning("%s: %s; trying again", self._stream, complaint)
        self._complaint = complaint

    def _unwell(self, answers: Answers, trouble: str) -> None:
        if not self._troubled:
            self._complain(trouble)
        self._troubled.add(answers)

    def _well(self, answers: Answers) -> None:
        if answers in self._troubled:
            self._troubled.discard(answers)
            if not self._troubled:
                self._complaint = ""
                log.info("%s is back", self._stream)

    async def _find_durable(self) -> ConsumerInfo:
        """See to it that the durable is there and has a leader, which is who answers."""
        try:
            info: ConsumerInfo = await self._nc.jetstream(timeout=ANSWER).consumer_info(self._stream, self._durable)
        except NotFoundError:
            info = await self._create_durable()
        return info

    async def _create_durable(self) -> ConsumerInfo:
        """Create or update the durable.

        What may not be acknowledged must not be worked on. So here is an acknowledgement of nothing, which the server
        refuses before it answers the request after it.
        """
        await self._nc.publish(f"$JS.ACK.{self._stream}.{self._durable}.1.0.0.0.0", Msg.Ack.Progress)
        return await self._nc.jetstream().add_consumer(self._stream, self._config)


def _identity(message: Msg) -> Identity:
    """Return what all deliveries of a message have in common; a stream that is created again has its sequences anew."""
    return message.metadata.sequence.stream, message.metadata.timestamp


def _trouble(answer: Msg | None) -> str:
    """Return what is wrong with an answer: nothing with a message, or with a 404 or 408 (none now)."""
    if answer is None or answer.reply:
        return ""
    headers = answer.headers or {}
    status = headers.get("Status", "")
    if status in ("404", "408"):
        return ""
    if status == "503":  # nats-py takes the header that nats-server 2.15 adds for its description
        return "503 no responders"
    description = headers.get("Description", "").strip().splitlines()
    return text(f"{status} {description[0] if description else ''}".strip())
