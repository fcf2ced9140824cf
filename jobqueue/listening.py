"""Listening to the acks and heartbeats of a durable's messages, whoever sends them."""

from collections.abc import Iterable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from jobqueue.streams import parse_ack_subject

# The server treats +OK as +ACK. Claims (claims.py) send this one, so that it isn't taken for a processor's own ack.
CLAIM_ACK = b"+OK"
MAX_SUBSCRIPTIONS = 200  # for more messages than that, all acks of the durable are heard


class AckListener:
    """Records what was last sent on the ack subject of each message: a heartbeat means that it is in flight."""

    def __init__(self, nc: Client, stream: str, durable: str) -> None:
        self.heard: dict[int, bytes] = {}  # by stream sequence
        self._nc = nc
        self._durable = f"{stream}.{durable}"
        self._subscriptions: list[Subscription] = []

    async def start(self, sequences: Iterable[int] = ()) -> None:
        """Begin to listen, and return when no more can be missed.

        Args:
            sequences: the stream sequences of the messages that matter; by default, all.
        """
        wanted = list(sequences)
        tokens = [f"*.{sequence}.>" for sequence in wanted] if 0 < len(wanted) <= MAX_SUBSCRIPTIONS else [">"]
        for token in tokens:
            for prefix in ("$JS.ACK", "$JS.ACK.*.*"):  # versions 1 and 2
                subject = f"{prefix}.{self._durable}.{token}"
                self._subscriptions.append(await self._nc.subscribe(subject, cb=self._hear))
        await self._nc.flush()

    async def stop(self) -> None:
        """End listening, and forget what was heard."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        self._subscriptions.clear()
        self.heard.clear()

    async def _hear(self, message: Msg) -> None:
        sequence, _ = parse_ack_subject(message.subject)
        if message.data != CLAIM_ACK:
            self.heard[sequence] = message.data


async def check_permission(nc: Client, stream: str) -> None:
    """Subscribe to ack subjects of a stream for a moment, so that the server refuses it now if it isn't permitted."""
    listener = AckListener(nc, stream, "*")
    await listener.start([0])
    await listener.stop()
