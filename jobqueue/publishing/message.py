"""What is published, and what becomes of it."""

from enum import Enum
from typing import NamedTuple

from jobqueue.connection.client import Client
from jobqueue.errors import printable

HEADER_SIZE = len("NATS/1.0\r\nNats-Msg-Id: \r\n\r\n")


class Outcome(Enum):
    """The outcome of a publish. Only STORED is truthy.

    Example:
        outcome = await publish(nc, "orders.new", Message(b"order-1", id="order-1"))
        if outcome == Outcome.DUPLICATE:
            print("that order was published before")
    """

    STORED = "stored"
    DUPLICATE = "duplicate"  # an earlier call has stored a message with this id, and this one isn't stored
    FAILED = "failed"  # the server has not confirmed it; publish it again with the same id

    def __bool__(self) -> bool:
        """Return whether the message itself is stored."""
        return self is Outcome.STORED


class Message(NamedTuple):
    """What to publish.

    Attributes:
        payload: the bytes.
        id: the same for every attempt, so that the server stores the message once within the stream's duplicate window;
            not empty, and without spaces around it or line ends in it (https://docs.nats.io/using-nats/developer/develop_jetstream/model_deep_dive#message-deduplication).
        label: what the log calls it; the id, by default.

    Example:
        Message(json.dumps({"to": "ann"}).encode(), id="welcome-ann")
    """

    payload: bytes
    id: str
    label: str = ""

    def __str__(self) -> str:
        return printable(self.label or self.id)

    def check(self) -> None:
        """Raise ValueError or TypeError for what nats-py would change or refuse."""
        if not isinstance(self.payload, bytes) or not isinstance(self.id, str):
            raise TypeError("a message needs bytes for its payload, and a str for its id")
        self.id.encode()
        if not self.id or self.id != self.id.strip() or "\n" in self.id or "\r" in self.id:
            raise ValueError(f"a message's id can't be empty, or have spaces around it or line ends: {self.id!r}")

    def fits(self, nc: Client) -> bool:
        """Return whether the server takes it; nats-py doesn't count the header, and the server then disconnects."""
        return HEADER_SIZE + len(self.id.encode()) + len(self.payload) <= nc.max_payload
