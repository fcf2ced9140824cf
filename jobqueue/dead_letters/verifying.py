"""Is a message dead? By the server's own word, whatever an advisory says."""

import asyncio
from typing import Any

from jobqueue.connection.client import Client
from jobqueue.dead_letters.advisories import Hint
from jobqueue.dead_letters.letter import DeadLetter
from jobqueue.dead_letters.pending import Pending
from jobqueue.jetstream.durables import Durable, Durables
from jobqueue.jetstream.reading import get_message

CONFIRM_DELAY = 2.5  # seconds; on replicas, it may take so long until what was acked has left the stream
MAX_TIMER_LATENESS = 1.0  # seconds, of the server
NO_DELIVERY_TIME = 30.0  # seconds without a sign that the server redelivers what is due
# Questions between two deliveries: the search has one. An advisory may come right after that, and be the server's own.
MAX_QUESTIONS, MAX_QUESTIONS_IF_NAMED = 1, 3
MAX_UNCONFIRMED = 200_000  # that are remembered
UNCONFIRMED_VALID_FOR = 600.0  # seconds
GONE = "is gone"
# What will be certain later:
UNCONFIRMED = "may just have been acked"
ASKED_RECENTLY = "was pending when the server was asked, and is not asked about again yet"


class Verifier:
    """Tells which messages are dead: stored, taken by a durable that has delivered them, and not pending.

    On replicas the first verification finds them UNCONFIRMED, and one after CONFIRM_DELAY says whether they are dead.
    """

    def __init__(self, nc: Client, stream: str) -> None:
        self.stream = stream
        self.durables = Durables(nc, stream)
        self.pending = Pending(nc, self._note_nak)
        self._nc = nc
        # By durable and sequence: how often, and when at last, anybody has found a message pending.
        self._questions: dict[tuple[str, int], tuple[int, float]] = {}
        self._unconfirmed_since: dict[int, float] = {}  # by sequence: when it was first found not to be pending
        self._now = asyncio.get_running_loop().time

    async def verify(self, hint: Hint) -> tuple[DeadLetter | None, str]:
        """Return the message that a hint is about, if it is dead; else why it is not."""
        limit = MAX_QUESTIONS_IF_NAMED if hint.advisories else MAX_QUESTIONS
        durable, why = await self.explain_alive(hint.sequence, hint.consumer, limit)
        # After the question: what was acked before that is gone; and it may have been about a durable that is gone.
        message, after = await asyncio.gather(
            get_message(self._nc, self.stream, hint.sequence), self.durables.find(hint.consumer, since=self._now())
        )
        if not message:
            return None, GONE
        if not durable or not durable.takes(message.subject):
            for other in await self.durables.find_all():
                if other.takes(message.subject):
                    return await self.verify(hint._replace(consumer=other.name))
            return None, why or f"is not for the durable {hint.consumer}, and no other one takes it"
        if why:
            return None, why
        if not after or after.created != durable.created or after.delivered < hint.sequence:
            return await self.verify(hint)
        deliveries = hint.deliveries or max(durable.config["max_deliver"], 1)
        return DeadLetter(self.stream, after, deliveries, hint.died_at, message), ""

    async def explain_alive(self, sequence: int, name: str, limit: int = MAX_QUESTIONS) -> tuple[Durable | None, str]:
        """Return a durable, and why a message of it may be alive, as long as it is stored; "" if it is not."""
        durable = await self.durables.find(name)
        if durable and sequence > durable.delivered:
            durable = await self.durables.find(name, since=self._now())
        if not durable:
            return None, f"will be redelivered: the durable {name} is gone"
        if sequence > durable.delivered:
            return durable, f"will be delivered: {name} has not delivered it yet"
        if durable.pending:
            if not self.may_ask(durable, sequence, limit):
                return durable, ASKED_RECENTLY
            wait, last = durable.longest_wait, durable.consumer_seq
            if await self.pending.ask(self.stream, name, last, sequence, wait, durable.reconnects):
                self._unconfirmed_since.pop(sequence, None)
                return durable, "is in flight or waits for a retry"
        return durable, UNCONFIRMED if durable.has_replicas and not self._is_confirmed(sequence) else ""

    def may_ask(self, durable: Durable, sequence: int, limit: int = MAX_QUESTIONS) -> bool:
        """Return whether so many questions between two deliveries leave one more.

        Each one postpones a retry. When that is over, and a pull request is left waiting, the message has been
        redelivered. Without pull requests that is unknown, and it is asked about in the end.
        """
        count, asked_at = self._questions.get((durable.name, sequence), (0, 0.0))
        if count < limit:
            return True
        # The server adds the delay to the difference between the present back-off and the first one.
        due_at = asked_at + 2 * durable.longest_wait + MAX_TIMER_LATENESS
        is_served = durable.pull_requests > 0 and not durable.is_paused
        return self._now() > (due_at if is_served else due_at + NO_DELIVERY_TIME)

    def forget_old_questions(self, durable: Durable) -> None:
        """Forget the messages of a durable that were found pending and may be asked about again."""
        for key in list(self._questions):
            if key[0] == durable.name and (not durable.pending or self.may_ask(durable, key[1])):
                del self._questions[key]

    def _note_nak(self, advisory: dict[str, Any]) -> None:
        """Count a question, of this process or another one; they all say that it was the first delivery."""
        key = advisory["consumer"], advisory["stream_seq"]
        if advisory["stream"] != self.stream:
            return
        if advisory["deliveries"] > 1:  # so a consumer has got it since
            self._questions.pop(key, None)
        else:
            self._questions[key] = self._questions.get(key, (0, 0.0))[0] + 1, self._now()

    def _is_confirmed(self, sequence: int) -> bool:
        now = self._now()
        if now - self._unconfirmed_since.get(sequence, now) > UNCONFIRMED_VALID_FOR:
            del self._unconfirmed_since[sequence]
        if len(self._unconfirmed_since) > MAX_UNCONFIRMED:
            del self._unconfirmed_since[next(iter(self._unconfirmed_since))]
        return now >= self._unconfirmed_since.setdefault(sequence, now) + CONFIRM_DELAY
