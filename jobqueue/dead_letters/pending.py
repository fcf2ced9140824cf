"""Is a message pending? The one exact question about a message that the server answers."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from jobqueue.connection.client import Client
from jobqueue.jetstream.acks import ack_subject, delayed_nak
from jobqueue.jetstream.streams import REQUEST_TIMEOUT, require_connection

NAKED = "$JS.EVENT.ADVISORY.CONSUMER.MSG_NAKED"  # .<stream>.<consumer>


class Pending:
    """Asks durables whether a message is pending: delivered, and neither acked nor exhausted.

    JetStream lists no pending messages, but it answers for one: a nak. For a message that is pending the server
    publishes a MSG_NAKED advisory with its stream sequence, and then answers the nak. For any other message (acked,
    dead, never delivered) it publishes nothing, changes nothing, and answers. Seen on nats-server 2.10.25 to 2.15.1, on
    one server and on three replicas, from any server of the cluster; with both forms of ack subjects, since every
    server takes version 1 of a nak.

    - The consumer sequence of the nak must lie above the ack floor's and up to the last delivered one. That of the last
      delivery will do: a pending message keeps the number of its first delivery, and the floor stays below that.
    - So the answer holds for messages that the durable had delivered when it was described (`Durable.delivered`).
    - The nak has a delay. What is being processed is not disturbed: its next heartbeat restarts its ack wait. What
      waits for a retry waits anew.
    - On a single server the ack of a message is processed as a whole, before the next nak. So a message that is not
      pending, and is still stored when it is read after that, was not acked. On replicas it may leave a moment later.

    `on_nak` is called with each advisory, whoever has sent the nak.
    """

    def __init__(self, nc: Client, on_nak: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self._nc = nc
        self._on_nak = on_nak
        self._asked: dict[tuple[str, str, int], list[asyncio.Event]] = {}  # by stream, durable and stream sequence
        self._subscriptions: list[Subscription] = []

    async def start(self, *streams: str) -> None:
        """Subscribe to the advisories of some streams. The server ends the script at once if that is not permitted."""
        for stream in streams:  # with a limit an advisory could be dropped, and its message taken for dead
            subscription = await self._nc.subscribe(
                f"{NAKED}.{stream}.*", cb=self._receive, pending_msgs_limit=0, pending_bytes_limit=0
            )
            self._subscriptions.append(subscription)
        await self._nc.flush()

    async def ask(
        self, stream: str, durable: str, consumer_seq: int, sequence: int, delay: float, reconnects: int
    ) -> bool:
        """Return whether a message is pending; then it is redelivered after the delay, unless a heartbeat follows.

        `consumer_seq` is the number of a delivery: the message's own one, or the last one of all. `reconnects` are
        those of the connection when the message, or the durable, was known to be there.
        """
        is_pending, key = asyncio.Event(), (stream, durable, sequence)
        self._asked.setdefault(key, []).append(is_pending)
        try:
            require_connection(self._nc, reconnects)
            reply = ack_subject(stream, durable, 1, sequence, consumer_seq)
            await self._nc.request(reply, delayed_nak(delay), REQUEST_TIMEOUT)
            while any(one.pending_msgs for one in self._subscriptions):  # they have come before the answer
                await asyncio.sleep(0)
            require_connection(self._nc, reconnects)
            return is_pending.is_set()
        finally:
            self._asked[key].remove(is_pending)
            if not self._asked[key]:
                del self._asked[key]

    async def _receive(self, message: Msg) -> None:
        with suppress(ValueError, TypeError, KeyError):
            advisory = json.loads(message.data)
            for is_pending in self._asked.get((advisory["stream"], advisory["consumer"], advisory["stream_seq"]), ()):
                is_pending.set()
            self._on_nak(advisory)
