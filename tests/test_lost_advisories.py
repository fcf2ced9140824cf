"""Dead letters that no advisory is on its way for are found."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import (
    ADVISORIES,
    CONSUMER,
    DLQ,
    PATIENCE,
    Script,
    Server,
    dead_letters,
    durable_info,
    edited,
    emptied,
    holds,
    messages,
    publish,
    pull,
    request,
    state,
    until,
    waiting,
    with_body,
)

PROCESSOR = ("orders_stream", "processor")
BOTH = ("orders_stream", "orders_unprocessed")


async def is_dead(nc: Client, stream: str = "orders_stream", durable: str = "processor") -> bool:
    return not (await durable_info(nc, stream, durable))["num_ack_pending"]


async def test_orders_that_died_before_their_dlq_was_there_are_found(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(20)))
    await request(nc, "STREAM.DELETE.orders_unprocessed")
    await server.create_streams()
    async with server.script(*DLQ) as one, server.script(*DLQ) as two:
        await emptied(nc, *BOTH)
        orders = one.found("reprocessing order (.*)") + two.found("reprocessing order (.*)")
        assert sorted(orders) == sorted(f"order-{i}" for i in range(20))
        assert await one.stop() == await two.stop() == 0


async def test_orders_that_died_before_their_durable_had_no_limit_are_found(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    config = (await durable_info(nc, "orders_stream", "processor"))["config"] | {"max_deliver": -1}
    del config["backoff"]
    made = {"stream_name": "orders_stream", "config": config}
    assert "error" not in await request(nc, "CONSUMER.DURABLE.CREATE.orders_stream.processor", made)
    await request(nc, "STREAM.PURGE.orders_unprocessed")
    async with server.script(*DLQ) as dlq:
        await emptied(nc, "orders_stream")
        assert dlq.found("reprocessing order (.*)") == ["order-0"]


async def test_orders_that_are_done_in_a_stream_that_is_no_work_queue_are_not(bare_server: Server, nc: Client) -> None:
    await request(nc, "STREAM.CREATE.orders_stream", {"name": "orders_stream", "subjects": ["orders.*"]})
    await bare_server.run("scripts/create_orders_unprocessed.sh")
    await publish(nc, b"order-0")
    async with bare_server.script(*CONSUMER, "--failure-rate", "0") as consumer, bare_server.script(*DLQ) as dlq:
        await consumer.line("received order-0 .*")
        await dlq.line(
            "cannot search for dead letters without an advisory: "
            "orders_stream is no work queue, and keeps what is done; trying again"
        )
        await asyncio.sleep(12)  # longer than two looks
        assert len(dlq.lines) == 1


async def test_an_order_that_died_while_the_dlq_was_full_is_found(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    config = (await request(nc, "STREAM.INFO.orders_unprocessed"))["config"]
    await request(nc, "STREAM.UPDATE.orders_unprocessed", config | {"max_msgs": 1})
    await publish(nc, b"order-1")
    async with server.script(*CONSUMER, "--failure-rate", "1") as consumer:
        await consumer.line("order-1 will be processed via DLQ")
        await until(lambda: is_dead(nc))
    assert await messages(nc, "orders_unprocessed") == 1
    async with server.script(*DLQ) as dlq:
        await emptied(nc, *BOTH)
        assert dlq.found("reprocessing order (.*)") == ["order-0", "order-1"]


async def test_a_dead_letter_whose_reprocessing_fails_is_tried_again_at_growing_intervals(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """For longer than half a minute, too: the article's processor dies 30 s after its start."""
    await dead_letters(nc, b"order-0")
    fixed = tmp_path / "fixed"
    body = f"if not __import__('os').path.exists({str(fixed)!r}):\n        raise ValueError"
    async with server.script(with_body("dlq/consumer.py", "reprocess", body, tmp_path), *DLQ[1:]) as dlq:
        await dlq.line("order-0 stays in orders_stream; next attempt in 10 s")
        await dlq.line(r"error reprocessing order order-0: ValueError \(attempt 3, stream sequence # 1\)")
        await dlq.line("order-0 stays in orders_stream; next attempt in 20 s")
        await until(lambda: holds(nc, "orders_unprocessed", 1))  # and not the old advisory as well
        assert await messages(nc, "orders_stream") == 1
        fixed.touch()
        await emptied(nc, *BOTH)
        assert len(dlq.found("reprocessing order order-0")) == 4
        assert dlq.times[-1] - dlq.times[0] > 31
        await dead_letters(nc, b"order-1")
        await dlq.line("reprocessing order order-1")


async def test_a_dlq_that_was_killed_twice_with_an_advisory_takes_it_up_again(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    await dead_letters(nc, b"order-0")
    hanging = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(600)", tmp_path)
    for _ in range(2):
        async with server.script(hanging, *DLQ[1:]) as dlq:
            await dlq.line("reprocessing order order-0")
            await dlq.stop(signal.SIGKILL)
    async with server.script(*DLQ) as dlq:
        await emptied(nc, *BOTH)
        assert dlq.found("reprocessing order (.*)") == ["order-0"]


@asynccontextmanager
async def traffic(nc: Client) -> AsyncIterator[None]:
    """Publish ten orders a second, one in ten of them a slow one, until the block ends."""

    async def publish_on() -> None:
        for i in count():
            await publish(nc, b"slow-%d" % i if i % 10 == 0 else b"quick-%d" % i)
            await asyncio.sleep(0.1)

    publishing = asyncio.create_task(publish_on())
    try:
        yield
    finally:
        publishing.cancel()


BUSY = """
async def process(order: Msg) -> None:
    if order.data.startswith(b"dead"):
        raise ValueError
    log.info("began %s", printable(order.data))
    await asyncio.sleep(60 if order.data.startswith(b"slow") else 0.01)
"""


@asynccontextmanager
async def busy(server: Server, nc: Client, directory: Path) -> AsyncIterator[tuple[Script, Script]]:
    """Run a consumer in traffic that never stops, with work that takes longer than all back-offs, and the DLQ."""
    consumer = (edited("consumer/consumer.py", BUSY, directory), *CONSUMER[1:], "--concurrency", "128")
    async with server.script(*consumer) as working, server.script(*DLQ) as dlq, traffic(nc):
        yield working, dlq
    begun = working.found("began (.*)")
    assert len(begun) == len(set(begun)), "done twice"
    assert not set(begun) & set(dlq.found("reprocessing order (.*)")), "living orders were reprocessed"


@pytest.mark.faults
async def test_dead_letters_without_advisory_are_found_on_a_queue_that_is_never_idle(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """Others wait for a retry meanwhile, or are in flight for longer than all back-offs."""
    config = (await request(nc, "STREAM.INFO.orders_unprocessed"))["config"]
    async with busy(server, nc, tmp_path) as (consumer, dlq):
        await consumer.line("began slow-10")
        await request(nc, "STREAM.UPDATE.orders_unprocessed", config | {"subjects": [f"{ADVISORIES}.nobody"]})
        advisories = await nc.subscribe(f"{ADVISORIES}.processor")
        await publish(nc, b"dead-0", b"dead-1")
        for _ in range(2):
            await advisories.next_msg(PATIENCE)
        await advisories.unsubscribe()
        await request(nc, "STREAM.UPDATE.orders_unprocessed", config)
        number = 2
        async with asyncio.timeout(PATIENCE):
            while len(dlq.found("dead letter .* had no advisory: published one")) < 2:
                await publish(nc, b"dead-%d" % number)
                number += 1
                await asyncio.sleep(0.5)
        await dlq.line("reprocessing order dead-.*", number)
        assert len(consumer.found("error processing dead-.*")) == 2 * number
        assert len(dlq.found("reprocessing order .*")) == number


@pytest.mark.faults
async def test_orders_that_died_since_max_deliver_was_lowered_are_found_under_traffic(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """Servers from 2.11 on publish no advisory for them."""
    code = BUSY + "\n\nBACKOFF = [2.0]\nMAX_DELIVER = 9\n"
    (tmp_path / "patient").mkdir()
    patient = (edited("consumer/consumer.py", code, tmp_path / "patient"), *CONSUMER[1:], "--concurrency", "64")
    await publish(nc, *(b"dead-%d" % i for i in range(5)))
    async with server.script(*patient) as consumer:
        await consumer.line("error processing dead-.: ValueError .attempt 4 of 9.*", 5)
        await consumer.stop()
    async with busy(server, nc, tmp_path) as (_, dlq):
        await dlq.line("reprocessing order dead-.", 5)
        assert sorted(dlq.found("reprocessing order (.*)")) == [f"dead-{i}" for i in range(5)]


async def test_a_look_costs_two_requests_while_nothing_is_dead(server: Server, nc: Client) -> None:
    subscription = await nc.subscribe("$JS.API.>")
    async with server.script(*DLQ) as dlq:
        requests: list[str] = []
        while requests.count("$JS.API.CONSUMER.LIST.orders_stream") < 5:
            subject = (await subscription.next_msg(PATIENCE)).subject
            requests += [subject] * ("MSG.NEXT" not in subject)
        # The first looks come while the processor starts.
        assert requests[-4:] == ["$JS.API.STREAM.INFO.orders_stream", "$JS.API.CONSUMER.LIST.orders_stream"] * 2
        assert await dlq.stop() == 0


async def test_each_durable_is_looked_at_by_its_own_filter(server: Server, nc: Client) -> None:
    """What one durable has not delivered yet may lie below what another has."""
    await publish(nc, b"urgent-0", subject="orders.urgent")
    for subject in ("new", "urgent"):
        config = {
            "durable_name": subject,
            "filter_subject": f"orders.{subject}",
            "ack_policy": "explicit",
            "max_deliver": 2,
            "backoff": [10**8],
        }
        made = {"stream_name": "orders_stream", "config": config}
        assert "error" not in await request(nc, f"CONSUMER.CREATE.orders_stream.{subject}.orders.{subject}", made)
    await publish(nc, b"new-0")
    await pull(nc, "orders_stream", "new", 3)
    await until(lambda: holds(nc, "orders_unprocessed", 1))
    await request(nc, "STREAM.PURGE.orders_unprocessed")
    looks = await nc.subscribe("$JS.API.CONSUMER.LIST.orders_stream")
    async with server.script(*DLQ) as dlq:
        await dlq.line("reprocessing order new-0")
        for _ in range(looks.pending_msgs + 3):
            await looks.next_msg(PATIENCE)
        assert len(dlq.found("reprocessing .*")) == 1
    assert await messages(nc, "orders_stream") == 1


async def test_orders_that_are_worked_on_or_wait_are_left_alone(server: Server, nc: Client) -> None:
    await publish(nc, *(b"order-%d" % i for i in range(10)))
    consumer = (*CONSUMER, "--failure-rate", "0", "--work-time", "2")
    async with server.script(*DLQ) as dlq, server.script(*consumer) as running:
        await emptied(nc, "orders_stream")
        assert len(running.found("received .*")) == 10
        assert not dlq.lines
        assert (await state(nc, "orders_unprocessed"))["last_seq"] == 0


async def test_dead_letters_that_are_being_reprocessed_are_left_alone(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    await dead_letters(nc, b"order-0", b"order-1")
    go = tmp_path / "go"
    slow = with_body("dlq/consumer.py", "reprocess", waiting(go), tmp_path)
    looks = await nc.subscribe("$JS.API.CONSUMER.LIST.orders_stream")
    async with server.script(slow, *DLQ[1:]) as one, server.script(slow, *DLQ[1:]) as two:
        for _ in range(2 * 8):  # 20 s: each looks after 10, and publishes what it has found 7.5 s later
            await looks.next_msg(PATIENCE)
        go.touch()
        await emptied(nc, *BOTH)
        assert sorted(one.messages + two.messages) == ["reprocessing order order-0", "reprocessing order order-1"]
        assert (await state(nc, "orders_unprocessed"))["last_seq"] == 2


async def test_orders_that_wait_for_a_retry_while_their_durable_is_paused_are_left_alone(
    server: Server, nc: Client
) -> None:
    await dead_letters(nc, b"dead-0")
    await request(nc, "STREAM.PURGE.orders_unprocessed")
    await publish(nc, b"order-1")
    async with server.script(*CONSUMER, "--failure-rate", "1") as consumer:
        await consumer.line("error processing order-1")
        end = f"{datetime.now(UTC) + timedelta(seconds=22):%Y-%m-%dT%H:%M:%SZ}"
        try:
            await request(nc, "CONSUMER.PAUSE.orders_stream.processor", {"pause_until": end})
        except TimeoutError:
            pytest.skip("this nats-server cannot pause a durable")
        async with server.script(*DLQ) as dlq:
            await consumer.line("order-1 will be processed via DLQ")
            assert not dlq.found("reprocessing order order-1")
            await emptied(nc, *BOTH)
            assert len(dlq.found("reprocessing order .*")) == 2


async def test_a_durable_that_is_created_again_makes_no_order_of_its_own_dead(server: Server, nc: Client) -> None:
    """What the old one had delivered last tells nothing of the new one."""
    await dead_letters(nc, b"dead-0")
    await request(nc, "STREAM.PURGE.orders_unprocessed")
    await publish(nc, *(b"order-%d" % i for i in range(150)))
    consumer = (*CONSUMER, "--failure-rate", "0", "--concurrency")
    async with server.script(*consumer, "150", "--work-time", "600") as old:
        await old.line("received .*", 150)
        looks = await nc.subscribe("$JS.API.CONSUMER.LIST.orders_stream")
        async with server.script(*DLQ) as dlq:
            for _ in range(3):
                await looks.next_msg(PATIENCE)
            await old.stop(signal.SIGKILL)
            made = {"stream_name": "orders_stream", "config": (await durable_info(nc, *PROCESSOR))["config"]}
            await request(nc, "CONSUMER.DELETE.orders_stream.processor")
            await request(nc, "CONSUMER.CREATE.orders_stream.processor.orders.*", made)
            async with server.script(*consumer, "4", "--work-time", "0.8") as new:
                await new.line("received .*", 100)
                assert not dlq.found("reprocessing order order-.*")
