"""The messages in flight: queued, being processed, or acked while the server hasn't confirmed that yet."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from nats.aio.msg import Msg
from nats.errors import Error

from jobqueue.connection.client import Client
from jobqueue.jetstream.acks import LEAVE, NAK, parse_ack_subject

log = logging.getLogger(__name__)

CONFIRM_TIMEOUT = 1.0  # seconds until an unconfirmed ack is sent again
MAX_CONFIRM_TIME = 30.0  # seconds until an unconfirmed ack is no longer sent again
CHECK_VALID_FOR = 0.5  # seconds for which a delivery, or a check of the stream, proves that it wasn't replaced
# Seconds after a delivery; empty messages are done by then.
FIRST_HEARTBEAT_DELAY = 0.001


@dataclass(slots=True, eq=False)
class InFlightMessage:
    """A message in flight."""

    message: Msg
    ack_subject: str  # of the last delivery
    sequence: int
    stored_at: int  # nanoseconds; with the sequence it tells one message from another
    epoch: int  # of the last delivery or verification
    delivered_at: float
    is_begun: bool = False
    redelivery: Msg | None = None  # to be processed if the present attempt fails
    ack: bytes = LEAVE
    finished_at: float = 0.0  # or when it was verified after that
    sent_at: float = 0.0  # when the ack was sent, 0.0 if it has to be
    tries: int = 0  # of sending it

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return len(self.message.data)


class InFlight:
    """All messages in flight of this process, by stream sequence; sends their acks and heartbeats.

    Nothing is sent on the ack subject of a message that may be another one by now: the server would ack that one.
    A reconnect, or any other doubt, begins a new epoch, and an entry of an earlier epoch must be verified first.

    `needs_check` is set when an ack has to wait for `resend_acks`. `on_confirmed` is called with the seconds that the
    server took to confirm one.
    """

    def __init__(self, nc: Client, stream: str, on_confirmed: Callable[[float], None]) -> None:
        self.needs_check = asyncio.Event()
        self.checked_at = 0.0  # when the stream was last seen to be the same one
        self.heard_at = 0.0  # when the durable's leader last delivered a message or confirmed an ack
        self.has_replicas = False  # whether the durable may get another leader
        self.bytes = 0  # of all payloads
        self._nc = nc
        self._stream = stream
        self._on_confirmed = on_confirmed
        self._entries: dict[int, InFlightMessage] = {}
        self._inbox = nc.new_inbox()
        self._doubt_count = 0
        self._last_consumer_seq = 0
        self._without_heartbeat: list[InFlightMessage] = []
        self._first_heartbeat: asyncio.Task[None] | None = None
        self._now = asyncio.get_running_loop().time

    async def start(self) -> None:
        """Subscribe to the confirmations of acks."""
        await self._nc.subscribe(f"{self._inbox}.*", cb=self._confirm)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: InFlightMessage) -> bool:
        return self._entries.get(entry.sequence) is entry

    def has(self, sequence: int) -> bool:
        """Return whether the message with a stream sequence is in flight."""
        return sequence in self._entries

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._doubt_count + int(self._nc.stats["reconnects"])  # faster than the property

    def begin_epoch(self) -> None:
        """Require that every message in flight is verified."""
        self._doubt_count += 1
        self._last_consumer_seq = 0

    def unverified(self) -> list[InFlightMessage]:
        """Return the entries of earlier epochs."""
        return [entry for entry in self._entries.values() if entry.epoch != self.epoch]

    def verify_up_to(self, proof: InFlightMessage, epoch: int) -> None:
        """Take all messages up to one that was found to be the same for verified, as of an epoch."""
        for entry in self.unverified():
            if entry.sequence <= proof.sequence:
                entry.epoch, entry.sent_at, entry.finished_at = max(epoch, entry.epoch), 0.0, self._now()

    def not_begun(self) -> list[InFlightMessage]:
        """Return the entries of messages that wait to be processed."""
        return [entry for entry in self._entries.values() if not (entry.is_begun or entry.ack)]

    def has_unfinished(self) -> bool:
        """Return whether a message is still queued or being processed."""
        return any(not entry.ack for entry in self._entries.values())

    async def add(self, message: Msg) -> InFlightMessage | None:
        """Register a delivery, and return its entry unless the message is in flight already."""
        sequence, stored_at, consumer_seq = parse_ack_subject(message.reply)
        now, known = self._now(), self._entries.get(sequence)
        self.heard_at = now
        if consumer_seq > self._last_consumer_seq:
            # A new durable of that name would start at 1, and can't have come this far within CHECK_VALID_FOR.
            if now - self.checked_at < CHECK_VALID_FOR:
                self.checked_at = now
            self._last_consumer_seq = consumer_seq
        if known and known.stored_at == stored_at:
            known.ack_subject, known.epoch, known.delivered_at = message.reply, self.epoch, now
            if not known.ack:
                known.redelivery = message
                if self.has_replicas:
                    self._send_heartbeat_soon(known)
            elif self._may_send(known):
                await self._send_ack(known, now)
            return None
        if known:
            self.drop(known, "is another message now")
        entry = InFlightMessage(message, message.reply, sequence, stored_at, self.epoch, now)
        self._entries[sequence] = entry
        self.bytes += entry.size
        if self.has_replicas:
            self._send_heartbeat_soon(entry)
        return entry

    async def finish(self, entry: InFlightMessage, ack: bytes) -> bool:
        """Ack a message, or leave it; return whether it has been redelivered and is to be processed again."""
        if entry not in self:
            return False
        if ack == LEAVE:
            if entry.redelivery:
                entry.message, entry.redelivery, entry.is_begun = entry.redelivery, None, False
                return True
            self.remove(entry)
            return False
        now = self._now()
        entry.ack, entry.finished_at = ack, now
        if now - max(entry.delivered_at, self.checked_at) < CHECK_VALID_FOR and self._may_send(entry):
            await self._send_ack(entry, now)
        else:
            self.needs_check.set()
        return False

    def remove(self, entry: InFlightMessage) -> None:
        """Send nothing more for a message."""
        if entry in self:
            del self._entries[entry.sequence]
            self.bytes -= entry.size

    def drop(self, entry: InFlightMessage, why: str) -> None:
        """Send nothing more for a message, and log why it isn't acked."""
        self.remove(entry)
        log.warning("stream sequence # %d in %s %s: not acked", entry.sequence, self._stream, why)

    def has_late_acks(self) -> bool:
        """Return whether an ack is unsent, or unconfirmed for too long; those of earlier epochs are verified first."""
        late, epoch = self._now() - CONFIRM_TIMEOUT, self.epoch
        return any(entry.ack and entry.sent_at < late and entry.epoch == epoch for entry in self._entries.values())

    async def resend_acks(self) -> None:
        """Send the acks that are unsent or late. Their stream has just been checked."""
        now = self._now()
        for entry in list(self._entries.values()):
            if entry not in self:
                continue
            if entry.ack and now > entry.finished_at + MAX_CONFIRM_TIME:
                self.drop(entry, "may be redelivered, since the server has not confirmed its ack")
            elif entry.ack and entry.sent_at < now - CONFIRM_TIMEOUT and self._may_send(entry):
                await self._send_ack(entry, now)

    async def send_heartbeats(self, entries: Iterable[InFlightMessage] | None = None) -> None:
        """Let the ack wait of some messages, or all, begin again, unless the user's own work has acked or nak'd it."""
        for entry in list(self._entries.values() if entries is None else entries):
            # After a nak it would end the delay.
            is_nakd = entry.message.is_acked or entry.ack.startswith(NAK)
            if entry in self and self._may_send(entry) and not is_nakd:
                await self._nc.publish(entry.ack_subject, Msg.Ack.Progress)

    def _send_heartbeat_soon(self, entry: InFlightMessage) -> None:
        """Send a heartbeat unless the message is acked at once.

        A new leader takes the time when a message was stored for the time of its last delivery, until a heartbeat has
        told it otherwise (nats-server 2.10.25 to 2.15.1), and redelivers at once what waited longer than the ack wait.
        """
        self._without_heartbeat.append(entry)
        if not self._first_heartbeat or self._first_heartbeat.done():
            self._first_heartbeat = asyncio.create_task(self._send_first_heartbeats())

    async def _send_first_heartbeats(self) -> None:
        while entries := self._without_heartbeat:
            await asyncio.sleep(FIRST_HEARTBEAT_DELAY)
            self._without_heartbeat = []
            with suppress(Error):
                await self.send_heartbeats([entry for entry in entries if not entry.ack])

    def _may_send(self, entry: InFlightMessage) -> bool:
        # What is published without a connection nats-py sends after the reconnect.
        return self._nc.is_connected and entry.epoch == self.epoch

    async def _send_ack(self, entry: InFlightMessage, now: float) -> None:
        entry.sent_at = now
        entry.tries += 1
        await self._nc.publish(entry.ack_subject, entry.ack, f"{self._inbox}.{entry.sequence}-{entry.stored_at}")

    async def _confirm(self, answer: Msg) -> None:
        sequence, _, stored_at = answer.subject.rpartition(".")[2].partition("-")
        entry = self._entries.get(int(sequence))
        if not entry or not entry.ack or entry.stored_at != int(stored_at):
            return
        if answer.headers:  # 503: nobody listens, since the durable is gone or has no leader
            self.needs_check.set()
            return
        self.remove(entry)
        self.heard_at = self._now()
        if entry.tries == 1 and entry.sent_at:  # of several nobody knows which one was confirmed
            self._on_confirmed(self.heard_at - entry.sent_at)
