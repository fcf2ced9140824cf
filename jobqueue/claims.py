"""Dead letters in an operator's hands: no DLQ processor has them in flight, and none will begin."""

import asyncio
import json
from collections.abc import Iterable
from functools import partial
from uuid import uuid4

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue.dead_letters import publish_advisory
from jobqueue.inventory import Item
from jobqueue.listening import CLAIM, AckListener
from jobqueue.reading import gather_some, get_message
from jobqueue.redelivery import DELAY
from jobqueue.streams import Durables, ack_subject, api_request, ensure_durable

TIMEOUT = 5.0  # seconds
ACK_WAIT = 600.0  # seconds, of a durable that no DLQ processor has configured yet
POLL_INTERVAL = 0.05  # seconds
MAX_BATCH = 256  # advisories that are asked for at a time
MARGIN = 0.5  # seconds for a heartbeat to arrive
CLAIMED_FOR = "30"  # seconds; then a DLQ processor takes care of what we have not finished


class Claims:
    """Takes dead letters away from the DLQ processors.

    A processor sends a heartbeat, then reads the advisory, and begins only if that is still there. A claim replaces the
    advisory by one that isn't due yet, then listens, and fails if there was a heartbeat. So never both go on. What is
    left of us when we are killed is the new advisory.

    Args:
        nc: the connection.
        dlq_stream: the stream of the advisories.
        dlq_durable: its durable.
        durables: those of the stream of the messages.
    """

    def __init__(self, nc: Client, dlq_stream: str, dlq_durable: str, durables: Durables) -> None:
        self._nc = nc
        self._dlq_stream = dlq_stream
        self._dlq_durable = dlq_durable
        self._durables = durables
        self._listener = AckListener(nc, dlq_stream, dlq_durable)

    async def start(self) -> None:
        """Begin to listen, and return when all that is in flight has been heard."""
        # Without the durable nothing could be removed. A DLQ processor gives it the rest of its configuration.
        durable = ConsumerConfig(
            name=self._dlq_durable, durable_name=self._dlq_durable, ack_policy=AckPolicy.EXPLICIT, ack_wait=ACK_WAIT
        )
        await ensure_durable(self._nc, self._dlq_stream, durable)
        await self._listener.start()
        info = await ensure_durable(self._nc, self._dlq_stream, durable)
        if info["num_ack_pending"] and (backoff := info["config"].get("backoff")):  # which a DLQ processor sets
            await asyncio.sleep(min(backoff) / 1e9 / 3 + MARGIN)

    async def claim(self, items: Iterable[Item], **headers: str) -> list[Item | None]:
        """Claim dead letters, and return each with its new advisory, or None if a DLQ processor has it in flight.

        Args:
            items: the dead letters.
            headers: for the new advisories.

        Raises:
            nats.errors.Error: the server doesn't answer.
        """
        found = list(items)
        free = [item for item in found if not self._is_in_flight(item)]
        replace = partial(self._publish_advisory, headers={DELAY: CLAIMED_FOR} | headers)
        new = await gather_some([partial(replace, item) for item in free])
        await self.remove(advisory for item in free for advisory in item.advisories)
        await asyncio.sleep(MARGIN)
        claimed = {
            item.dead_letter.sequence: Item(item.dead_letter, (advisory,))
            for item, advisory in zip(free, new, strict=True)
            if not self._is_in_flight(item)
        }
        return [claimed.get(item.dead_letter.sequence) for item in found]

    async def release(self, item: Item) -> None:
        """Leave a dead letter that was claimed to the DLQ processors.

        Raises:
            nats.errors.Error: the server doesn't answer.
        """
        await self._publish_advisory(item, {})
        await self.remove(item.advisories)

    async def remove(self, advisories: Iterable[int]) -> None:
        """Remove advisories, by their stream sequences.

        Raises:
            nats.errors.Error: the server doesn't answer.
        """
        unwanted = list(advisories)
        await self._have_delivered(max(unwanted, default=0))
        await gather_some([partial(self._remove, advisory) for advisory in unwanted])

    async def _publish_advisory(self, item: Item, headers: dict[str, str]) -> int:
        letter = item.dead_letter
        if not (durable := await self._durables.find(letter.consumer)):
            raise Error(f"the durable {letter.consumer} is gone")
        headers = headers | {"Nats-Msg-Id": uuid4().hex}  # there may have been another one just now
        stored = await publish_advisory(self._nc, letter.stream, durable, letter.sequence, letter.died_at, **headers)
        return int(stored.seq)

    def _is_in_flight(self, item: Item) -> bool:
        return any(self._listener.heard.get(advisory) == Msg.Ack.Progress for advisory in item.advisories)

    async def _have_delivered(self, advisory: int) -> None:
        """Have all advisories up to one delivered to us, for the server takes no ack of others before.

        Those that are not to be removed are redelivered to the DLQ processors after their back-off.
        """
        inbox, durable = self._nc.new_inbox(), f"{self._dlq_stream}.{self._dlq_durable}"
        subscription = await self._nc.subscribe(inbox, cb=_ignore)
        while True:
            info = await api_request(self._nc, f"CONSUMER.INFO.{durable}")
            missing = advisory - info["delivered"]["stream_seq"]
            if missing <= 0 or not info["num_pending"]:
                break
            request = json.dumps({"batch": min(missing, MAX_BATCH), "no_wait": True}).encode()
            await self._nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{durable}", request, inbox)
            await self._nc.flush()
        await subscription.unsubscribe()

    async def _remove(self, advisory: int) -> None:
        await self._nc.request(ack_subject(self._dlq_stream, self._dlq_durable, 1, advisory), CLAIM, TIMEOUT)
        while await get_message(self._nc, self._dlq_stream, advisory):  # it leaves the stream after the answer
            await asyncio.sleep(POLL_INTERVAL)


async def _ignore(_: Msg) -> None:
    pass
