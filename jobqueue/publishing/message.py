"""What is published, and what becomes of it."""

import re
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from jobqueue.connection.client import Client
from jobqueue.errors import printable

HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)  # as nats-py has it
HEADER_SIZE = len("NATS/1.0\r\n\r\n")


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
        headers: further headers, such as those of a trace.

    Example:
        Message(json.dumps({"to": "ann"}).encode(), id="welcome-ann", headers={"language": "en"})
    """

    payload: bytes
    id: str
    label: str = ""
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return printable(self.label or self.id)

    def check(self) -> None:
        """Raise ValueError or TypeError for what nats-py would change or refuse."""
        if not isinstance(self.payload, bytes) or not isinstance(self.id, str):
            raise TypeError("a message needs bytes for its payload, and a str for its id")
        for name, value in self.all_headers.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise TypeError(f"a header's name and value are str: {name!r}: {value!r}")
            value.encode()
            if not HEADER_NAME.fullmatch(name) or value != value.strip() or "\n" in value or "\r" in value:
                raise ValueError(f"a header can't have spaces around it, line ends or an odd name: {name!r}: {value!r}")
        if not self.id or "Nats-Msg-Id" in (self.headers or ()):
            raise ValueError("a message's id can't be empty, and isn't one of its headers")

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers, and the id."""
        return {**(self.headers or {}), "Nats-Msg-Id": self.id}

    def fits(self, nc: Client) -> bool:
        """Return whether the server takes it; nats-py doesn't count the headers, and the server then disconnects."""
        lines = [len(f"{name}: {value}\r\n".encode()) for name, value in self.all_headers.items()]
        return HEADER_SIZE + sum(lines) + len(self.payload) <= nc.max_payload
