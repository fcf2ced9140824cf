"""Acks: what is sent for a delivery, and the subject that it is sent to."""

from nats.aio.msg import Msg

from jobqueue.connection.client import Client

ACK = Msg.Ack.Ack
TERM = Msg.Ack.Term
NAK = Msg.Ack.Nak  # redelivered at once, or after a delay that may follow; after the last delivery it is a dead letter
LEAVE = b""  # no ack at all: redelivered after the back-off

VERSION_1_TOKENS = 9  # of an ack subject; version 2 has a domain and an account's hash before the stream


def ack_subject(stream: str, durable: str, deliveries: int, sequence: int, consumer_seq: int = 0, time: int = 0) -> str:
    """Return the ack subject of a delivery (version 1, which every server takes); a field that nobody reads may be 0.

    `consumer_seq` is the number of the delivery among all of the durable; `time` is when the message was stored, in
    nanoseconds.
    """
    return f"$JS.ACK.{stream}.{durable}.{deliveries}.{sequence}.{consumer_seq}.{time}.0"


def parse_ack_subject(subject: str) -> tuple[int, int, int]:
    """Return a delivery's stream sequence, when its message was stored, in nanoseconds, and its consumer sequence.

    Source: https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-15.md (both versions).
    """
    tokens = subject.split(".")
    at = 5 if len(tokens) == VERSION_1_TOKENS else 7
    return int(tokens[at]), int(tokens[at + 2]), int(tokens[at + 1])


async def probe_ack(nc: Client, subject: str) -> None:
    """Send a heartbeat, so that the server refuses at once an ack subject that this user may not publish to."""
    await nc.publish(subject, Msg.Ack.Progress)


def delayed_nak(seconds: float) -> bytes:
    """Return a nak after which the message is redelivered when some seconds are over."""
    return Msg.Ack.Nak + b' {"delay": %d}' % (seconds * 1e9)
