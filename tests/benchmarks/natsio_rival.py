"""natsio's own consume loop and publisher, as rivals: they need Python 3.13 or later, and natsio.

Usage:
    python natsio_rival.py consume CONCURRENCY WORK_TIME
    python natsio_rival.py publish COUNT
"""

import asyncio
import logging
import os
import sys

import natsio
from natsio.jetstream.message import JsMsg

log = logging.getLogger("rival")


async def consume(nc: natsio.Client, concurrency: int, work_time: float) -> None:
    """Process so many orders at a time, and have each ack confirmed."""
    stream = await nc.jetstream().stream("orders_stream")
    consumer = await stream.consumer("processor")
    tasks: set[asyncio.Task[None]] = set()
    free = asyncio.Semaphore(concurrency)

    async def process(order: JsMsg) -> None:
        log.info("received %s", order.data.decode())
        await asyncio.sleep(work_time)
        free.release()
        await order.ack_sync()

    async with consumer.consume() as orders:
        async for order in orders:
            await free.acquire()
            task = asyncio.create_task(process(order))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


async def publish(nc: natsio.Client, count: int) -> None:
    """Publish orders with ids, and log each when the server has stored it."""
    js = nc.jetstream()

    def log_stored(i: int) -> None:
        log.info("published order no. %d", i)

    for i in range(count):
        stored = await js.publish_async("orders.new", b"order-%d" % i, msg_id=f"order-{i}")
        stored.add_done_callback(lambda _, i=i: log_stored(i))
    await js.publish_async_complete()


async def main() -> None:
    """Run one of them."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    async with await natsio.connect(os.environ["NATS_URL"].split(",")[0]) as nc:
        if sys.argv[1] == "publish":
            await publish(nc, int(sys.argv[2]))
        else:
            await consume(nc, int(sys.argv[2]), float(sys.argv[3]))


if __name__ == "__main__":
    asyncio.run(main())
