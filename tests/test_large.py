"""Orders of all sizes, on links of all speeds."""

import asyncio
import time
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from tests.harness import CONSUMER, DLQ, PUBLISHER, Server, durable_info, emptied, request, serving
from tests.proxy import proxied

NO_FAILURES = ("--failure-rate", "0")
SMALL_BUFFER = "max_pending: 12MB"  # the server ends a connection for which more waits; 64 MB is the default


async def publish_large(nc: Client, count: int, size: int) -> None:
    """Publish orders one by one, into a stream that may grow."""
    config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    await request(nc, "STREAM.UPDATE.orders_stream", config | {"max_bytes": -1, "max_msg_size": -1})
    for number in range(count):
        await nc.jetstream().publish("orders.new", b"order-%d " % number + b"x" * size, timeout=30)


async def deliveries(nc: Client) -> tuple[int, int]:
    """Return how many deliveries there were, and how many advisories of dead letters."""
    info = await durable_info(nc, "orders_stream", "processor")
    dead = (await request(nc, "STREAM.INFO.orders_unprocessed"))["state"]["last_seq"]
    return info["delivered"]["consumer_seq"], dead


@pytest.mark.parametrize(("count", "size", "concurrency"), [(60, 1_000_000, "100"), (300, 200_000, "500")])
async def test_large_orders_do_not_end_the_connection(tmp_path: Path, count: int, size: int, concurrency: str) -> None:
    """The server would end it, and each order that is on its way then would lose an attempt."""
    async with serving(tmp_path, SMALL_BUFFER) as server:
        await server.create_streams()
        async with (
            server.client() as nc,
            server.script(*CONSUMER, *NO_FAILURES, "--concurrency", concurrency) as consumer,
        ):
            await publish_large(nc, count, size)
            await emptied(nc, "orders_stream")
            assert await deliveries(nc) == (count, 0)
            assert await consumer.stop() == 0
    assert not consumer.found("connection lost.*")


@pytest.mark.parametrize("concurrency", ["1", "16"])
async def test_one_order_of_the_largest_size_comes_through(tmp_path: Path, concurrency: str) -> None:
    """It is larger than all that may be requested at a time, and comes after small ones."""
    async with serving(tmp_path, "max_payload: 32MB") as server:
        await server.create_streams()
        async with server.client() as nc:
            await publish_large(nc, 30, 100)
            await publish_large(nc, 2, 30_000_000)
            await publish_large(nc, 30, 100)
            async with server.script(*CONSUMER, *NO_FAILURES, "--concurrency", concurrency) as consumer:
                await emptied(nc, "orders_stream")
                assert await deliveries(nc) == (62, 0)
                assert await consumer.stop() == 0
    assert not consumer.found(".*trying again")


async def test_a_limit_of_the_operator_below_an_orders_size_stops_nothing(server: Server, nc: Client) -> None:
    """The limit is for the bytes of a pull request, and says nothing of an order."""
    async with server.script(*CONSUMER, *NO_FAILURES) as consumer:
        config = (await durable_info(nc, "orders_stream", "processor"))["config"] | {"max_bytes": 5000}
        update = {"stream_name": "orders_stream", "config": config, "action": "update"}
        assert "error" not in await request(nc, "CONSUMER.CREATE.orders_stream.processor.orders.*", update)
        await publish_large(nc, 30, 10_000)
        await emptied(nc, "orders_stream")
        assert await deliveries(nc) == (30, 0)
        assert await consumer.stop() == 0


@pytest.mark.parametrize("cut", [False, True])
async def test_a_slow_link_carries_large_orders(server: Server, nc: Client, cut: bool) -> None:
    """What waits for the link for longer than the ack wait loses an attempt, and a request behind it times out."""
    await publish_large(nc, 40, 200_000)
    async with proxied(server.port) as proxy:
        proxy.rate = 1_250_000  # 10 Mbit/s
        work = (*NO_FAILURES, "--concurrency", "16", "--work-time", "0.1")
        async with server.script(*CONSUMER, *work, NATS_URL=proxy.url) as consumer:
            if cut:
                await consumer.line("received .*", 5)
                proxy.cut()
                await consumer.line("connection lost.*")
                proxy.restore()
            await emptied(nc, "orders_stream")
            assert await consumer.stop() == 0
    assert (await deliveries(nc))[1] == 0
    assert len(consumer.found("received .*")) == 40
    assert not consumer.found(".*trying again")


@pytest.mark.parametrize(("count", "size"), [(150, 10_000), (2, 900_000)])
async def test_a_slow_link_carries_what_is_published(server: Server, tmp_path: Path, count: int, size: int) -> None:
    """At 1 Mbit/s, what is in flight takes longer than one attempt has time for."""
    orders = tmp_path / "orders"
    orders.write_text(f"{'x' * size}\n" * count)
    async with proxied(server.port) as proxy:
        proxy.rate = 125_000
        publisher = await server.run(*PUBLISHER, "--interval", "0", "--input", str(orders), NATS_URL=proxy.url)
    assert publisher.process.returncode == 0
    assert len(publisher.found("published .*")) == len(publisher.lines) == count


@pytest.mark.faults  # 40 MB, by way of two scripts
async def test_many_large_dead_letters_do_not_end_the_connection(tmp_path: Path) -> None:
    async with serving(tmp_path, SMALL_BUFFER) as server:
        await server.create_streams()
        async with server.client() as nc:
            await publish_large(nc, 40, 1_000_000)
            async with server.script(*CONSUMER, "--failure-rate", "1", "--concurrency", "16") as consumer:
                await consumer.line(".* will be processed via DLQ", 40)
                assert await consumer.stop() == 0  # killed now, it might not have sent the last nak
            async with server.script(*DLQ, "--concurrency", "100") as dlq:
                await emptied(nc, "orders_stream", "orders_unprocessed")
                assert await dlq.stop() == 0
    assert len(dlq.found("reprocessing order .*")) == 40
    assert not dlq.found("connection lost.*")


async def test_orders_that_take_a_while_need_few_checks(server: Server, nc: Client) -> None:
    """Other deliveries have just shown that the stream is still the same one when their acks are sent."""
    checks: list[str] = []

    async def see(message: Msg) -> None:
        checks.append(message.subject)

    async with server.script(*CONSUMER, *NO_FAILURES, "--concurrency", "64", "--work-time", "0.6") as consumer:
        await nc.jetstream().publish("orders.new", b"order")
        await consumer.line("received .*")
        await asyncio.sleep(1)  # what a start checks is done
        await nc.subscribe("$JS.API.STREAM.INFO.orders_stream", cb=see)
        begun = time.monotonic()
        for number in range(200):
            await nc.jetstream().publish("orders.new", b"order-%d" % number)
            await asyncio.sleep(0.02)
        await consumer.line("received .*", 201)
        seconds = time.monotonic() - begun
    assert len(checks) < seconds  # without the deliveries there are two a second
