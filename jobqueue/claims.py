"""Claims: dead letters that no DLQ processor has in flight, and that none will begin, until an operator is done."""

import asyncio
import json
from collections.abc import Iterable
from functools import partial
from uuid import uuid4

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue.advisories import Item, publish_advisory, read_advisories
from jobqueue.durables import Durables, ensure_durable, shortest_ack_wait
from jobqueue.listening import CLAIM_ACK, AckListener
from jobqueue.reading import gather_some, get_message
from jobqueue.redelivery import DELAY_HEADER
from jobqueue.streams import REQUEST_TIMEOUT, ack_subject, api_request

ACK_WAIT = 600.0  # seconds, of a durable that no DLQ processor has configured yet
MAX_ACK_PENDING = 100_000
POLL_INTERVAL = 0.05  # seconds
MAX_BATCH = 256  # advisories that are asked for at a time
HEARTBEAT_LATENESS = 0.5  # seconds until a heartbeat has arrived
CLAIM_DURATION = 30.0  # seconds; then a DLQ processor reprocesses what is not finished


class Claims:
    """Claims dead letters, so that they are either reprocessed or handled by an operator, and never both.

    A DLQ processor sends a heartbeat, then reads the advisory, and begins if that is still there. A claim removes the
    advisory, then listens, and fails if there was a heartbeat: at least one of them sees the other. A claimed dead
    letter gets a new advisory, which is due after CLAIM_DURATION, so that nothing is lost when we are killed.

    Args:
        nc: the connection.
        dlq_stream: the stream of the advisories.
        dlq_durable: its durable.
        stream: the stream of the messages.
    """

    def __init__(self, nc: Client, dlq_stream: str, dlq_durable: str, stream: str) -> None:
        self._nc = nc
        self._dlq_stream = dlq_stream
        self._dlq_durable = dlq_durable
        self._stream = stream
        self._durables = Durables(nc, stream)
        self._listener = AckListener(nc, dlq_stream, dlq_durable)
        self._reconnects = nc.stats["reconnects"]
        self._read_up_to = 0  # the highest stream sequence of an advisory that was read
        self._now = asyncio.get_running_loop().time
        self._claimed_at = 0.0

    async def start(self) -> dict[int, Item]:
        """Begin to listen, wait until all that is in flight has been heard, and return what the advisories name.

        Raises:
            nats.errors.Error: the request timed out.
        """
        # Without the durable nothing could be removed. A DLQ processor gives it the rest of its configuration.
        durable = ConsumerConfig(
            name=self._dlq_durable,
            durable_name=self._dlq_durable,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT,
            max_ack_pending=MAX_ACK_PENDING,
        )
        await ensure_durable(self._nc, self._dlq_stream, durable)
        await self._listener.start()
        info = await api_request(self._nc, f"CONSUMER.INFO.{self._dlq_stream}.{self._dlq_durable}")
        ack_wait = shortest_ack_wait(info["config"])
        if info["num_ack_pending"] and ack_wait < ACK_WAIT:
            await asyncio.sleep(ack_wait + HEARTBEAT_LATENESS)
        return await self._read_new()

    def are_valid(self) -> bool:
        """Return whether what was claimed last is still claimed."""
        return self._now() < self._claimed_at + CLAIM_DURATION - REQUEST_TIMEOUT

    async def claim(self, items: Iterable[Item], headers: dict[str, str]) -> list[Item | None]:
        """Claim dead letters, and return each with its new advisory, or None if a DLQ processor has it in flight.

        Args:
            items: the dead letters.
            headers: for the new advisories.

        Raises:
            nats.errors.Error: the request timed out, or the connection was lost, and heartbeats with it.
        """
        new = await self._read_new()  # attempts that were scheduled since
        wanted = [
            item._replace(advisories=item.advisories + new[item.dead_letter.sequence].advisories)
            if item.dead_letter.sequence in new
            else item
            for item in items
        ]
        free = [item for item in wanted if not self._is_in_flight(item)]
        await self.remove(advisory for item in free for advisory in item.advisories)
        await asyncio.sleep(HEARTBEAT_LATENESS)
        free = [item for item in free if not self._is_in_flight(item)]
        self._claimed_at = self._now()
        publish = partial(self._publish_advisory, headers={DELAY_HEADER: f"{CLAIM_DURATION:g}"} | headers)
        advisories = await gather_some([partial(publish, item) for item in free])
        claimed = {
            item.dead_letter.sequence: item._replace(advisories=(advisory,))
            for item, advisory in zip(free, advisories, strict=True)
        }
        # Somebody may have found a dead letter between the removal of its advisory and the new one.
        for sequence, item in (await self._read_new()).items():
            if sequence in claimed and item.advisories != claimed[sequence].advisories:
                await self.remove(claimed.pop(sequence).advisories)
        if self._reconnects != self._nc.stats["reconnects"]:
            raise Error("the connection was lost")
        return [claimed.get(item.dead_letter.sequence) for item in wanted]

    async def release(self, item: Item) -> None:
        """Leave a dead letter that was claimed to the DLQ processors.

        Raises:
            nats.errors.Error: the request timed out.
        """
        await self._publish_advisory(item, {})
        await self.remove(item.advisories)

    async def remove(self, advisories: Iterable[int]) -> None:
        """Remove advisories, by their stream sequences.

        Raises:
            nats.errors.Error: the request timed out.
        """
        if unwanted := list(advisories):
            await self._have_delivered(max(unwanted))
            await gather_some([partial(self._remove, advisory) for advisory in unwanted])

    async def _read_new(self) -> dict[int, Item]:
        items = await read_advisories(self._nc, self._dlq_stream, self._stream, self._read_up_to)
        self._read_up_to = max((item.advisories[-1] for item in items.values()), default=self._read_up_to)
        return items

    async def _publish_advisory(self, item: Item, headers: dict[str, str]) -> int:
        letter = item.dead_letter
        if not (durable := await self._durables.find(letter.consumer)):
            raise Error(f"the durable {letter.consumer} is gone")
        headers = headers | {"Nats-Msg-Id": uuid4().hex}  # there may have been another one just now
        stored = await publish_advisory(self._nc, letter.stream, durable, letter.sequence, letter.died_at, headers)
        return int(stored.seq)

    def _is_in_flight(self, item: Item) -> bool:
        return any(self._listener.heard.get(advisory) == Msg.Ack.Progress for advisory in item.advisories)

    async def _have_delivered(self, advisory: int) -> None:
        """Pull all advisories up to one, since the server ignores the ack of one that it has not delivered yet.

        Those that are not to be removed are redelivered to the DLQ processors after their back-off.
        """
        inbox, durable = self._nc.new_inbox(), f"{self._dlq_stream}.{self._dlq_durable}"
        subscription = await self._nc.subscribe(inbox, cb=_ignore)
        while True:
            info = await api_request(self._nc, f"CONSUMER.INFO.{durable}")
            missing = advisory - info["delivered"]["stream_seq"]
            if missing <= 0 or not info["num_pending"]:
                break
            if info["num_ack_pending"] >= info["config"].get("max_ack_pending", MAX_ACK_PENDING):
                raise Error(f"as many advisories are in flight as {self._dlq_durable} may have")
            request = json.dumps({"batch": min(missing, MAX_BATCH), "no_wait": True}).encode()
            await self._nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{durable}", request, inbox)
            await self._nc.flush()
        await subscription.unsubscribe()

    async def _remove(self, advisory: int) -> None:
        await self._nc.request(
            ack_subject(self._dlq_stream, self._dlq_durable, 1, advisory), CLAIM_ACK, REQUEST_TIMEOUT
        )
        async with asyncio.timeout(REQUEST_TIMEOUT):
            while await get_message(self._nc, self._dlq_stream, advisory):  # it leaves the stream after the answer
                await asyncio.sleep(POLL_INTERVAL)


async def _ignore(_: Msg) -> None:
    pass
