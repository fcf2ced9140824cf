"""Is a message dead? By the server's own word, whatever an advisory says."""

import asyncio
from typing import NamedTuple

from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.dead_letters.advisories import Hint
from jobqueue.dead_letters.pending import Pending, delayed_nak
from jobqueue.dead_letters.reading import StoredMessage, get_message
from jobqueue.durables import Durable, Durables
from jobqueue.streams import ack_subject

CONFIRM_DELAY = 2.5  # seconds; on replicas, it may take so long until what was acked has left the stream
MAX_TIMER_LATENESS = 1.0  # seconds, of the server
NO_DELIVERY_TIME = 30.0  # seconds without a sign that the server redelivers what is due
GONE = "is gone"
UNKNOWN = "was in flight or waiting for a retry just now"


class DeadLetter(NamedTuple):
    """A message that is dead, as it was seen just now."""

    stream: str
    durable: Durable  # which has delivered it
    deliveries: int
    died_at: int  # nanoseconds; 0 if that isn't known
    message: StoredMessage

    @property
    def sequence(self) -> int:
        """Its stream sequence."""
        return self.message.sequence

    async def as_delivered(self, nc: Client) -> Msg:
        """Return the message as its consumer got it in its last delivery."""
        message, headers = self.message, await nc._process_headers(self.message.header_block)
        reply = ack_subject(self.stream, self.durable.name, self.deliveries, message.sequence, 0, message.stored_at)
        return Msg(nc, message.subject, reply, message.data, headers or None)


class Verifier:
    """Tells which messages are dead: stored, taken by a durable that has delivered them, and not pending.

    On replicas a message is certainly dead only if a second look, CONFIRM_DELAY after the first one, says so as well.
    """

    def __init__(self, nc: Client, stream: str) -> None:
        self.stream = stream
        self.durables = Durables(nc, stream)
        self._nc = nc
        self._pending = Pending(nc, stream, self._forget)
        self._asked_at: dict[str, dict[int, float]] = {}  # by durable: the messages that were found pending
        self._now = asyncio.get_running_loop().time

    async def start(self) -> None:
        """Subscribe to the server's answers."""
        await self._pending.start()

    async def look(self, hint: Hint) -> tuple[DeadLetter | None, str]:
        """Return the message that a hint is about, if it is dead; else why it is not."""
        durable, why = await self.why_alive(hint.sequence, hint.consumer)
        if why and durable:
            return None, why
        # After the question: what was acked before that is gone; and it may have been about a durable that is gone.
        message, after = await asyncio.gather(
            get_message(self._nc, self.stream, hint.sequence), self.durables.find(hint.consumer, since=self._now())
        )
        if not message:
            return None, GONE
        if not durable or not durable.takes(message.subject):
            other = next((one for one in await self.durables.find_all() if one.takes(message.subject)), None)
            if other:
                return await self.look(hint._replace(consumer=other.name))
            return None, why or f"is not for the durable {hint.consumer}, and no other one takes it"
        if not after or after.created != durable.created:
            return await self.look(hint)
        deliveries = hint.deliveries or max(durable.config["max_deliver"], 1)
        return DeadLetter(self.stream, after, deliveries, hint.died_at, message), ""

    async def why_alive(self, sequence: int, name: str) -> tuple[Durable | None, str]:
        """Return a durable, and why a message of it that is stored is alive; "" if it has no delivery to come."""
        durable = await self.durables.find(name)
        if durable and sequence > durable.delivered:
            durable = await self.durables.find(name, since=self._now())
        if not durable:
            return None, f"will be redelivered: the durable {name} is gone"
        if sequence > durable.delivered:
            return durable, f"will be delivered: {name} has not delivered it yet"
        if not durable.pending:
            return durable, ""
        if not self.may_ask(durable, sequence):
            return durable, UNKNOWN
        nak = delayed_nak(durable.longest_wait)
        if not await self._pending.ask(name, durable.consumer_seq, sequence, nak, durable.reconnects):
            return durable, ""
        self._asked_at.setdefault(name, {})[sequence] = self._now()
        return durable, "is in flight or waits for a retry"

    def may_ask(self, durable: Durable, sequence: int) -> bool:
        """Return whether the question would not postpone a retry for a second time.

        A message that was found pending was postponed by that. When that is over, and a pull request is left waiting,
        it has been redelivered. Without pull requests that can't be told, and it is asked about in the end.
        """
        asked_at = self._asked_at.get(durable.name, {}).get(sequence)
        if asked_at is None:
            return True
        # The server adds the delay to the difference between the present back-off and the first one.
        due_at = asked_at + 2 * durable.longest_wait + MAX_TIMER_LATENESS
        is_served = durable.pull_requests > 0 and not durable.is_paused
        return self._now() > (due_at if is_served else due_at + NO_DELIVERY_TIME)

    def forget_served(self, durable: Durable) -> None:
        """Forget the messages that were found pending and may be asked about again."""
        asked = self._asked_at.get(durable.name, {})
        for sequence in [sequence for sequence in asked if not durable.pending or self.may_ask(durable, sequence)]:
            del asked[sequence]

    def _forget(self, name: str, sequence: int) -> None:
        self._asked_at.get(name, {}).pop(sequence, None)
