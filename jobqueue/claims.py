"""Dead letters in an operator's hands: no DLQ processor has them in flight, and none will begin."""

import asyncio
import json
from collections.abc import Iterable
from functools import partial
from uuid import uuid4

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue.dead_letters import publish_advisory
from jobqueue.inventory import Item
from jobqueue.listening import CLAIM, AckListener
from jobqueue.reading import gather_some, get_message
from jobqueue.redelivery import DELAY
from jobqueue.streams import Durables, ack_subject, api_request, ensure_durable

TIMEOUT = 5.0  # seconds
ACK_WAIT = 5.0  # seconds
POLL_INTERVAL = 0.05  # seconds
MAX_BATCH = 256  # advisories that are asked for at a time
MARGIN = 0.5  # seconds for a heartbeat to arrive


class Claims:
    """Takes dead letters away from the DLQ processors, by the removal of their advisories.

    A processor sends a heartbeat, then reads the advisory, and begins only if that is still there. A claim removes the
    advisory, then listens, and fails if there was a heartbeat. So never both go on. If neither does, or we are killed,
    the dead letter has no advisory any more, and is found like all of these.

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
        if info["num_ack_pending"]:
            config = info["config"]
            ack_wait = min(config.get("backoff") or [config["ack_wait"]]) / 1e9
            await asyncio.sleep(ack_wait / 3 + MARGIN)

    async def claim(self, items: Iterable[Item]) -> list[bool]:
        """Claim dead letters, and return for each whether it is ours now; if it isn't, it is in flight.

        Raises:
            nats.errors.Error: the server doesn't answer.
        """
        # A dead letter without an advisory gets one, which is not due before we have removed it.
        adopted = [item if item.advisories else await self.release(item, **{DELAY: "60"}) for item in items]
        free = [item for item in adopted if not self._is_in_flight(item)]
        await self._have_delivered(max((max(item.advisories, default=0) for item in free), default=0))
        await gather_some([partial(self._remove, advisory) for item in free for advisory in item.advisories])
        if free:
            await asyncio.sleep(MARGIN)
        return [not self._is_in_flight(item) for item in adopted]

    async def release(self, item: Item, **headers: str) -> Item:
        """Publish an advisory of a dead letter that has none, and return the item with it."""
        letter = item.dead_letter
        durable = await self._durables.find(letter.consumer)
        if not durable:
            return item  # what is left in the stream is delivered again
        if letter.died_at:
            headers["Nats-Msg-Id"] = uuid4().hex  # the advisory's own is taken
        stored = await publish_advisory(self._nc, letter.stream, durable, letter.sequence, **headers)
        return Item(letter, (stored.seq,))

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
