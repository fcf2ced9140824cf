"""A dead letter: a message that is dead, as it was seen just now."""

import base64
from typing import Any, NamedTuple

from nats.aio.msg import Msg

from jobqueue.connection.client import Client
from jobqueue.dead_letters.headers import find_header, read_headers
from jobqueue.jetstream.acks import ack_subject
from jobqueue.jetstream.durables import Durable
from jobqueue.jetstream.reading import StoredMessage, format_time
from jobqueue.jetstream.reasons import Reason


class DeadLetter(NamedTuple):
    """A message that is dead."""

    stream: str
    durable: Durable  # which has delivered it
    deliveries: int
    died_at: int  # nanoseconds; 0 if that isn't known
    message: StoredMessage

    async def as_delivered(self, nc: Client) -> Msg:
        """Return the message as its consumer got it in its last delivery."""
        message, headers = self.message, await nc._process_headers(self.message.header_block)
        reply = ack_subject(self.stream, self.durable.name, self.deliveries, message.sequence, 0, message.stored_at)
        return Msg(nc, message.subject, reply, message.data, headers or None)

    def as_json(self, reason: Reason | None = None) -> dict[str, Any]:
        """Return all that is known of it, and why it died. A header that is repeated has a list of its values."""
        message = self.message
        try:
            payload = {"payload": message.data.decode()}
        except UnicodeDecodeError:
            payload = {"payload_base64": base64.b64encode(message.data).decode()}
        headers: dict[str, Any] = {}
        for name, value in read_headers(message.header_block):
            headers[name] = [*headers.get(name, []), value]
        why: dict[str, Any] = {}
        if reason:
            why = {"reason": reason.text, "attempt": reason.attempt, "failed": format_time(reason.failed_at)}
        return {
            "sequence": message.sequence,
            "subject": message.subject,
            "published": format_time(message.stored_at),
            "died": format_time(self.died_at) if self.died_at else None,
            "deliveries": self.deliveries,
            "id": find_header(message.header_block, "Nats-Msg-Id") or None,
            **why,
            "headers": {name: values if len(values) > 1 else values[0] for name, values in headers.items()},
            **payload,
        }
