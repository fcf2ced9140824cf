"""Publish to a job queue from a program of your own.

The names in `__all__` are public. Everything else is internal and may change in any version.

Example:
    import asyncio

    from jobqueue import Message, connect, publish


    async def main() -> None:
        async with connect("shop") as nc:
            await publish(nc, "orders.new", Message(b"order-1", id="order-1"))


    asyncio.run(main())
"""

from jobqueue.connection.client import Client
from jobqueue.connection.connecting import connect
from jobqueue.errors import Failure
from jobqueue.publishing.message import Message, Outcome
from jobqueue.publishing.publishing import publish, publish_many

__all__ = ["Client", "Failure", "Message", "Outcome", "connect", "publish", "publish_many"]
