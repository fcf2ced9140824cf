"""Consuming a work queue: what a process does with each message of a stream."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import ConsumerConfig

from jobqueue.connection.client import Client
from jobqueue.connection.connecting import connect, run_until_refused
from jobqueue.errors import Dead, Retry, describe_attempt, printable
from jobqueue.jetstream.acks import ACK, LEAVE, NAK, delayed_nak, parse_ack_subject
from jobqueue.jetstream.durables import Durables, note_delay
from jobqueue.jetstream.reasons import Reasons
from jobqueue.jetstream.streams import is_filter, queue_command, require_stream, warn_if_lost
from jobqueue.worker.options import MAX_ACK_PENDING, check_work, make_config
from jobqueue.worker.shutdown import shutdown_by
from jobqueue.worker.time_limit import TimeLimit
from jobqueue.worker.worker import Worker

log = logging.getLogger(__name__)

MAX_DEAD = 10_000  # dead messages with attempts left that are remembered


async def consume(
    stream: str,
    subject_filter: str,
    process: Callable[[Msg], Awaitable[None]],
    *,
    durable: str = "processor",
    description: str = "",
    backoff: Sequence[float] = (5.0,),
    max_deliver: int = 2,
    max_ack_pending: int = MAX_ACK_PENDING,
    concurrency: int = 1,
    time_limit: float = 600.0,
    shutdown: asyncio.Event | None = None,
) -> None:
    """Process the messages of a work queue until SIGINT or SIGTERM; any number of processes share the work.

    At the signal it takes no more messages, finishes those in flight, and waits until their acks are confirmed. It
    creates the durable consumer, or changes these fields of it.

    Args:
        stream: the stream's name.
        subject_filter: the subjects to process, such as "orders.*".
        process: your own work on one message. It returns when that is done, and raises an exception when it failed:
            `Retry` or `Dead` if that may happen, any other with its traceback. The message may be redelivered, after a
            failure or a crash.
        durable: the durable's name.
        description: the durable's description.
        backoff: seconds (0.1 or more) until a message that was not acked is redelivered, after each attempt; the last
            one is for all further ones. The first one is also the ack wait: after a process is killed it takes so long
            until others get its messages.
        max_deliver: after so many attempts the message is a dead letter. There can't be more back-offs than that.
        max_ack_pending: messages in flight or waiting for a retry, in all processes. While there are more, no new ones
            are delivered.
        concurrency: messages that are processed at a time.
        time_limit: seconds for `process`; then it is cancelled, and has failed.
        shutdown: an event of your own that begins the graceful shutdown. Signals are yours then, too: see
            `shutdown_on_signal`.

    Raises:
        Failure: there is no connection or no such stream, the durable can't be used, the server refuses a subject, or
            acks are not confirmed at the end.
        TypeError, ValueError: an argument is malformed.

    Example:
        async def process(order):
            print(order.data)

        run(consume("orders_stream", "orders.*", process, backoff=[2, 10], max_deliver=3, concurrency=16))
    """
    check_work(process, concurrency, time_limit, stream, durable)
    if not is_filter(subject_filter):
        raise ValueError(f"{subject_filter!r} is no subject filter, such as orders.*")
    config = make_config(durable, description, backoff, max_deliver, max_ack_pending)
    config.filter_subject = subject_filter

    async def work(nc: Client) -> None:
        await require_stream(nc, stream, subject_filter, queue_command(stream, subject_filter))
        await warn_if_lost(nc, stream, durable)
        limit, reasons = TimeLimit(time_limit), await Reasons.find(nc, stream)
        handler = _Handler(nc, stream, config, process, limit, reasons)
        worker = Worker(nc, stream, config, handler.handle, concurrency, limit)
        with shutdown_by(shutdown, lambda: f"{len(worker.in_flight)} orders in flight") as event:
            tally = await worker.run(event)
        log.info("stopped: %d orders processed, %d deliveries failed", tally[ACK], tally.total() - tally[ACK])
        worker.require_confirmed()

    async with connect(f"consumer_{stream}", no_echo=True) as nc:
        await run_until_refused(nc, work(nc))


@dataclass
class _Handler:
    """Processes a message, and decides how to ack it: a failed one not at all, so that it is redelivered."""

    nc: Client
    stream: str
    config: ConsumerConfig
    process: Callable[[Msg], Awaitable[None]]
    time_limit: TimeLimit
    reasons: Reasons
    _dead: dict[tuple[int, int], Dead] = field(default_factory=dict)  # messages that have attempts left

    def __post_init__(self) -> None:
        self._durables = Durables(self.nc, self.stream)
        self._max_deliver = self.config.max_deliver or 0
        self._durable = self.config.durable_name or ""

    async def handle(self, message: Msg) -> bytes:
        """Process a message and return its ack."""
        known = self._dead.pop(_identify(message), None) if self._dead else None
        if known and message.metadata.num_delivered == 1:  # the durable was created again, for fresh attempts
            known = None
        error = known or await self.time_limit.run(self.process, message)
        if not error:
            return ACK
        sequence, attempt = message.metadata.sequence.stream, message.metadata.num_delivered
        if not known:
            why = describe_attempt(error, attempt, self._max_deliver, sequence)
            log.warning("error processing %s%s", printable(message.data), why)
            if message.is_acked:  # by `order.nak()` in `process`, say: then that counts
                return LEAVE
        may_die = self._max_deliver > 0 and (attempt >= self._max_deliver or isinstance(error, Dead))
        has_limit = may_die and await self._durables.has_max_deliver(self._durable, self._max_deliver)
        if has_limit and attempt >= self._max_deliver:
            log.error("%s will be processed via DLQ", printable(message.data))
            await self.reasons.report(message, error, attempt)
            return NAK  # so that the server publishes the advisory at once, and not after the back-off
        if has_limit and isinstance(error, Dead):
            if len(self._dead) >= MAX_DEAD:
                del self._dead[next(iter(self._dead))]
            self._dead[_identify(message)] = error
            return NAK  # until it has no attempt left
        if isinstance(error, Retry) and error.delay is not None:
            with suppress(Error, TimeoutError):
                await note_delay(self.nc, self.stream, self.config, error.delay)
            return delayed_nak(error.delay)
        return LEAVE


def _identify(message: Msg) -> tuple[int, int]:
    """Return what tells a message from another one: its stream sequence, and when it was stored."""
    return parse_ack_subject(message.reply)[:2]
