"""A process's share of the work on a durable: request, queue, process, ack."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import ConsumerConfig

from jobqueue.connection.client import Client
from jobqueue.connection.retrying import retry_at_start
from jobqueue.errors import Failure, describe_error
from jobqueue.jetstream.acks import LEAVE, ack_subject, probe_ack
from jobqueue.jetstream.durables import Durable, ensure_durable
from jobqueue.jetstream.streams import api_request
from jobqueue.worker.in_flight import InFlight, InFlightMessage
from jobqueue.worker.pulling import Prefetch, PullRequests
from jobqueue.worker.recovery import Recovery
from jobqueue.worker.time_limit import IGNORED_AFTER, TimeLimit

log = logging.getLogger(__name__)

TICK = 0.1  # seconds between two rounds of housekeeping
MAX_STALL = 1.0  # seconds of a blocked event loop, after which answers that have arrived may be unread
SHUTDOWN_CONFIRM_TIME = 10.0  # seconds for the last acks to be confirmed

Handle = Callable[[Msg], Awaitable[bytes]]


class Worker:
    """Keeps enough messages of a durable in flight that processing never waits for the server, and acks each when done.

    `handle` processes one message, its user's work within `time_limit`, and returns ACK, TERM, NAK or LEAVE; an
    exception is logged and means LEAVE.
    """

    def __init__(
        self, nc: Client, stream: str, config: ConsumerConfig, handle: Handle, concurrency: int, time_limit: TimeLimit
    ) -> None:
        self._nc = nc
        self._stream = stream
        self._config = config
        self._durable = config.durable_name or ""
        self._handle = handle
        self._concurrency = concurrency
        self._time_limit = time_limit
        self._shutdown = asyncio.Event()
        self._queue: asyncio.Queue[InFlightMessage] = asyncio.Queue()
        self._tasks: dict[asyncio.Task[None], InFlightMessage | None] = {}  # what each is processing
        self._unprocessed = 0  # messages that were delivered and are not done
        self._probed_forms: set[int] = set()  # of ack subjects, by how many dots they have
        self._tally: Counter[bytes] = Counter()
        self._prefetch = Prefetch()
        self.in_flight = InFlight(nc, stream, self._prefetch.note_round_trip)
        self._pulls = PullRequests(nc, stream, self._durable, self.receive, self._end_pull)
        self._recovery = Recovery(nc, stream, config, self.in_flight, self._pulls)

    async def run(self, shutdown: asyncio.Event) -> Counter[bytes]:
        """Process messages until the shutdown, and finish; return how many deliveries had each ack."""
        self._shutdown = shutdown
        ack_wait = await self._set_up()
        await self.in_flight.start()
        await self._pulls.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                loops = (self._housekeeping(ack_wait / 3), self._recovery.run())
                background = [tasks.create_task(loop) for loop in loops]
                for _ in range(self._concurrency):
                    self._start_processing()
                self.in_flight.needs_check.set()  # what there is now, so that a change is noticed
                await shutdown.wait()
                await self._finish()
                while remaining := [task for task in background if not task.done()]:
                    for task in remaining:  # more than once, since wait_for of Python 3.11 may swallow a cancellation
                        task.cancel()
                    await asyncio.sleep(0)
        finally:
            self._time_limit.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=IGNORED_AFTER)  # nothing can end one that ignores it
        return self._tally

    async def _set_up(self) -> float:
        """Create or update the durable, and return its ack wait in seconds."""
        durable = f"the durable {self._durable} on {self._stream}"

        async def set_up() -> Durable:
            await probe_ack(self._nc, ack_subject(self._stream, self._durable, 1, 0))
            return await ensure_durable(self._nc, self._stream, self._config, update=True)

        try:
            made = await retry_at_start(set_up, durable, lambda _: self._shutdown.is_set())
        except (Error, TimeoutError) as error:
            raise Failure(f"cannot create {durable}: {describe_error(error)}") from None
        self.in_flight.has_replicas = made.has_replicas
        return made.ack_wait

    async def _finish(self) -> None:
        """Wait until no delivery can come, all messages are processed, and the acks are confirmed."""
        while (self._pulls.may_deliver() and self._nc.is_connected) or self.in_flight.has_unfinished():
            await asyncio.sleep(TICK)
        deadline = asyncio.get_running_loop().time() + SHUTDOWN_CONFIRM_TIME
        while self.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(TICK / 10)

    def require_confirmed(self) -> None:
        """Raise Failure if the server has not confirmed all acks until the end."""
        if self.in_flight:
            raise Failure(f"{len(self.in_flight)} messages may be redelivered: their acks are not confirmed")

    async def _pull(self) -> None:
        """Send a pull request for the rest once half of what may be requested has come."""
        if self._shutdown.is_set() or not self._recovery.may_pull():
            return
        room = self._concurrency + self._prefetch.size - self._unprocessed
        if not self._probed_forms:
            room = 1 - self._unprocessed  # one message, until it shows that this user may ack
        missing = room - self._pulls.messages
        if missing >= max(1, room // 2):
            await self._pulls.send(missing, self.in_flight.bytes)

    async def receive(self, message: Msg) -> None:
        """Queue a delivery."""
        self._recovery.note_served()
        entry = await self.in_flight.add(message)
        if entry:
            self._unprocessed += 1
        form = message.reply.count(".")
        is_probed = form in self._probed_forms
        if not is_probed:
            await self._probe(message, form)
        if entry:
            self._queue.put_nowait(entry)
        if not is_probed:
            await self._pull()

    async def _probe(self, message: Msg, form: int) -> None:
        """Make sure that a message may be acked. Only a delivery tells which form the ack subjects have."""
        with suppress(Error, TimeoutError):  # the next delivery tells, then
            await probe_ack(self._nc, message.reply)
            await api_request(self._nc, f"CONSUMER.INFO.{self._stream}.{self._durable}")
            self._probed_forms.add(form)

    async def _end_pull(self, failure: str) -> None:
        if failure:
            self._recovery.recover(failure)
        else:
            self._recovery.note_served()
        await self._pull()

    def _start_processing(self) -> None:
        self._tasks[asyncio.create_task(self._process_messages())] = None

    async def _process_messages(self) -> None:
        task = asyncio.current_task()
        assert task
        while True:
            entry = await self._queue.get()
            if entry not in self.in_flight:
                self._unprocessed -= 1
                continue
            self._tasks[task] = entry
            entry.is_begun = True
            ack = await self._process(entry)
            if task not in self._tasks:
                return
            self._tasks[task] = None
            await self._complete(entry, ack)

    async def _process(self, entry: InFlightMessage) -> bytes:
        try:
            return await self._handle(entry.message)
        except Exception as error:
            log.error("stream sequence # %d in %s: %s", entry.sequence, self._stream, describe_error(error))
            return LEAVE

    async def _complete(self, entry: InFlightMessage, ack: bytes) -> None:
        self._tally[ack] += 1
        self._prefetch.count_completed()
        self._unprocessed -= 1
        if await self.in_flight.finish(entry, ack):
            self._unprocessed += 1
            self._queue.put_nowait(entry)
        await self._pull()

    async def _housekeeping(self, heartbeat_interval: float) -> None:
        now = asyncio.get_running_loop().time()
        next_heartbeat = now + heartbeat_interval
        while True:
            before = now
            await asyncio.sleep(min(TICK, heartbeat_interval))
            now = asyncio.get_running_loop().time()
            self._recovery.note_reconnect()
            self._prefetch.update(now)
            self._pulls.window.update(now)
            for task in (*self._time_limit.enforce(), *(task for task in self._tasks if task.done())):
                await self._replace(task)
            if not self._nc.is_receiving:
                if self.in_flight.has_late_acks():
                    self.in_flight.needs_check.set()
                if self._nc.is_connected and now - before < MAX_STALL and self._pulls.end_expired():
                    self._recovery.recover("a pull request timed out")
            if now >= next_heartbeat:
                next_heartbeat = now + heartbeat_interval
                await self.in_flight.send_heartbeats()
            await self._pull()

    async def _replace(self, task: asyncio.Task[None]) -> None:
        """Go on with another task where one ignores its cancellation at the time limit, or was ended by its work."""
        entry = self._tasks.pop(task)
        self._start_processing()
        if entry:
            log.error("stream sequence # %d in %s: its processing cannot be stopped", entry.sequence, self._stream)
            await self._complete(entry, LEAVE)
