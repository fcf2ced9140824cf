"""A job queue with a dead letter queue on NATS JetStream.

The names in `__all__` are public, and stable by semantic versions. Everything else is internal and may change in any
version.

Example:
    from jobqueue import Retry, consume, run


    async def process(order):
        if not order.data:
            raise Retry("it is empty")
        print(order.data)


    run(consume("orders_stream", "orders.*", process, backoff=[2, 10], max_deliver=3, concurrency=16))
"""

from jobqueue.connection.client import Client
from jobqueue.connection.connecting import connect
from jobqueue.dead_letters.consuming import consume_dead_letters
from jobqueue.errors import Dead, Failure, Retry, printable
from jobqueue.jetstream.streams import require_stream_for
from jobqueue.publishing.message import Message, Outcome
from jobqueue.publishing.publishing import publish, publish_many
from jobqueue.script.arguments import make_parser, number, stream_name, subject, subject_filter, whole_number
from jobqueue.script.lines import read_lines
from jobqueue.script.running import run
from jobqueue.worker.consuming import consume
from jobqueue.worker.shutdown import shutdown_on_signal

__all__ = [
    "Client",
    "Dead",
    "Failure",
    "Message",
    "Outcome",
    "Retry",
    "connect",
    "consume",
    "consume_dead_letters",
    "make_parser",
    "number",
    "printable",
    "publish",
    "publish_many",
    "read_lines",
    "require_stream_for",
    "run",
    "shutdown_on_signal",
    "stream_name",
    "subject",
    "subject_filter",
    "whole_number",
]
