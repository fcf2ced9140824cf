"""What the queue is compared with: workers that do the same, a log line and a sleep an order.

Usage:
    python -m tests.benchmarks.rivals nats-py|faststream|taskiq CONCURRENCY WORK_TIME
    python -m tests.benchmarks.rivals enqueue COUNT
"""

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

import nats
from faststream import AckPolicy as FastStreamAck
from faststream import FastStream
from faststream.nats import JStream, NatsBroker, PullSub
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, RetentionPolicy, StreamConfig
from taskiq_nats import PullBasedJetStreamBroker

URL = os.environ.get("NATS_URL", "")
WORK_TIME = float(os.environ.get("WORK_TIME", "0"))
BATCH = 100

log = logging.getLogger("rival")
broker = PullBasedJetStreamBroker(
    [URL],
    subject="tasks.new",
    stream_name="taskiq",
    durable="taskiq",
    stream_config=StreamConfig(name="taskiq", subjects=["tasks.*"], retention=RetentionPolicy.WORK_QUEUE),
    consumer_config=ConsumerConfig(durable_name="taskiq", max_ack_pending=1000),
    pull_consume_batch=BATCH,
    pull_consume_timeout=1,
)


@broker.task(task_name="process")
async def process(order: str) -> None:
    """Do the work of an order, as a taskiq task."""
    log.info("received %s", order)
    await asyncio.sleep(WORK_TIME)


async def nats_py(concurrency: int) -> None:
    """Fetch a batch, work on so many at a time, and have each ack confirmed."""
    nc = await nats.connect(URL.split(","))
    subscription = await nc.jetstream().pull_subscribe("orders.*", "processor", "orders_stream")
    free = asyncio.Semaphore(concurrency)

    async def work(order: Msg) -> None:
        async with free:
            log.info("received %s", order.data.decode())
            await asyncio.sleep(WORK_TIME)
        await order.ack_sync()

    while True:
        try:
            orders = await subscription.fetch(BATCH, timeout=1)
        except TimeoutError:
            continue
        await asyncio.gather(*(work(order) for order in orders))


async def faststream(concurrency: int) -> None:
    """Subscribe with FastStream's own pull subscription."""
    fast = NatsBroker(URL, logger=None)

    @fast.subscriber(
        "orders.*",
        durable="processor",
        stream=JStream("orders_stream", declare=False),
        pull_sub=PullSub(batch_size=BATCH),
        max_workers=concurrency,
        ack_policy=FastStreamAck.ACK,
    )
    async def handle(order: str) -> None:
        log.info("received %s", order)
        await asyncio.sleep(WORK_TIME)

    await FastStream(fast, logger=None).run()


async def enqueue(count: int) -> None:
    """Enqueue orders for taskiq."""
    await broker.startup()
    for first in range(0, count, 500):
        await asyncio.gather(*(process.kiq(f"order-{i}") for i in range(first, min(first + 500, count))))
    await broker.shutdown()


def main() -> None:
    """Run one of them until it is killed."""
    if sys.argv[1] == "enqueue":
        asyncio.run(enqueue(int(sys.argv[2])))
        return
    which, concurrency, work_time = sys.argv[1:]
    if which == "taskiq":
        taskiq = [str(Path(sys.executable).parent / "taskiq"), "worker", "tests.benchmarks.rivals:broker"]
        options = ["--workers", "1", "--max-async-tasks", concurrency, "--max-prefetch", str(BATCH)]
        sys.exit(subprocess.run([*taskiq, *options], env={**os.environ, "WORK_TIME": work_time}).returncode)
    global WORK_TIME
    WORK_TIME = float(work_time)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    asyncio.run({"nats-py": nats_py, "faststream": faststream}[which](int(concurrency)))


if __name__ == "__main__":
    main()
