"""The messages in flight: queued, being processed, or acked while the server hasn't confirmed that yet."""

import asyncio
import logging
from collections.abc import Callable

from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.streams import parse_ack_subject

log = logging.getLogger(__name__)

ACK = Msg.Ack.Ack
TERM = Msg.Ack.Term
LEAVE = b""  # no ack at all: the message is redelivered after its back-off

CONFIRM_TIMEOUT = 1.0  # seconds until an unconfirmed ack is sent again
MAX_CONFIRM_TIME = 30.0  # seconds until an unconfirmed ack is given up
FRESH = 0.5  # seconds for which a delivery, or a look at its stream, tells that it is still the same stream


class InFlight:
    """A message in flight."""

    __slots__ = (
        *("ack", "ack_subject", "delivered_at", "epoch", "finished_at"),
        *("message", "redelivery", "sent_at", "sequence", "stored_at"),
    )

    def __init__(self, message: Msg, sequence: int, stored_at: int, epoch: int, now: float) -> None:
        self.message = message
        self.sequence = sequence
        self.stored_at = stored_at  # nanoseconds; with the sequence it tells one message from another
        self.ack_subject = message.reply  # of the last delivery
        self.epoch = epoch  # in which it was delivered or verified
        self.delivered_at = now
        self.redelivery: Msg | None = None  # to be processed if the present attempt fails
        self.ack = LEAVE
        self.finished_at = 0.0
        self.sent_at = 0.0  # when the ack was sent, 0.0 if it has to be


class Registry:
    """What this process has in flight, by stream sequence; sends the acks and heartbeats.

    Nothing is sent on the ack subject of a message that may be another one by now: the server would ack that one.
    A reconnect, or any other doubt, begins a new epoch, and a message of an earlier one must be verified first.

    `on_unsent_ack` is called when an ack has to wait for `resend_acks`, `on_confirmed` with the seconds that the
    server took to confirm one.
    """

    def __init__(
        self, nc: Client, stream: str, on_unsent_ack: Callable[[], None], on_confirmed: Callable[[float], None]
    ) -> None:
        self.looked_at = 0.0  # when the stream was last seen to be the same one
        self._nc = nc
        self._stream = stream
        self._on_unsent_ack = on_unsent_ack
        self._on_confirmed = on_confirmed
        self._messages: dict[int, InFlight] = {}
        self._inbox = nc.new_inbox()
        self._doubts = 0
        self._now = asyncio.get_running_loop().time

    async def start(self) -> None:
        """Subscribe to the confirmations of acks."""
        await self._nc.subscribe(f"{self._inbox}.*", cb=self._confirm)

    def __len__(self) -> int:
        return len(self._messages)

    def __contains__(self, one: InFlight) -> bool:
        return self._messages.get(one.sequence) is one

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._doubts + int(self._nc.stats["reconnects"])

    def begin_epoch(self) -> None:
        """Doubt all messages in flight."""
        self._doubts += 1

    def unverified(self) -> list[InFlight]:
        """Return the messages of earlier epochs."""
        return [one for one in self._messages.values() if one.epoch != self.epoch]

    async def add(self, message: Msg) -> InFlight | None:
        """Register a delivery, and return it unless its message is in flight already."""
        sequence, stored_at = parse_ack_subject(message.reply)
        now, known = self._now(), self._messages.get(sequence)
        if known and known.stored_at == stored_at:
            known.ack_subject, known.epoch, known.delivered_at = message.reply, self.epoch, now
            if known.ack:
                await self._send_ack(known, now)
            else:
                known.redelivery = message
            return None
        if known:
            self.drop(known, "is another message now")
        one = self._messages[sequence] = InFlight(message, sequence, stored_at, self.epoch, now)
        return one

    async def finish(self, one: InFlight, ack: bytes) -> Msg | None:
        """Ack a message; or leave it, and return the redelivery of it that is to be processed now."""
        if one not in self:
            return None
        if ack == LEAVE:
            del self._messages[one.sequence]
            return one.redelivery
        now = self._now()
        one.ack, one.finished_at = ack, now
        if now - max(one.delivered_at, self.looked_at) < FRESH and self._may_send(one):
            await self._send_ack(one, now)
        else:
            self._on_unsent_ack()
        return None

    def drop(self, one: InFlight, why: str = "") -> None:
        """Send nothing more for a message; without a reason the server has its ack."""
        del self._messages[one.sequence]
        if why:
            log.warning("stream sequence # %d in %s %s: not acked", one.sequence, self._stream, why)

    def has_late_acks(self) -> bool:
        """Return whether an ack is unsent, or unconfirmed for too long."""
        late = self._now() - CONFIRM_TIMEOUT
        return any(one.ack and one.sent_at < late for one in self._messages.values())

    async def resend_acks(self) -> None:
        """Send the acks that are unsent or late. Their stream has just been looked at."""
        now = self._now()
        for one in list(self._messages.values()):
            if one.ack and now > one.finished_at + MAX_CONFIRM_TIME:
                self.drop(one, "may be redelivered, since the server has not confirmed its ack")
            elif one.ack and one.sent_at < now - CONFIRM_TIMEOUT and self._may_send(one):
                await self._send_ack(one, now)

    async def send_heartbeats(self) -> None:
        """Let the ack wait of each message begin anew."""
        for one in list(self._messages.values()):
            if self._may_send(one):
                await self._nc.publish(one.ack_subject, Msg.Ack.Progress)

    def _may_send(self, one: InFlight) -> bool:
        # Without a connection nats-py would keep it, and send it later.
        return self._nc.is_connected and one.epoch == self.epoch

    async def _send_ack(self, one: InFlight, now: float) -> None:
        one.sent_at = now
        await self._nc.publish(one.ack_subject, one.ack, f"{self._inbox}.{one.sequence}-{one.stored_at}")

    async def _confirm(self, answer: Msg) -> None:
        sequence, _, stored_at = answer.subject.rpartition(".")[2].partition("-")
        one = self._messages.get(int(sequence))
        if not one or not one.ack or one.stored_at != int(stored_at):
            return
        if answer.headers:  # 503: nobody listens, since the durable is gone or has no leader
            self._on_unsent_ack()
            return
        self.drop(one)
        if one.sent_at == one.finished_at:  # which one of several acks was confirmed nobody can tell
            self._on_confirmed(self._now() - one.sent_at)
