"""Dead letters that no advisory is on its way for are found."""

import asyncio
import signal
from pathlib import Path

from nats.aio.client import Client

from tests.harness import (
    ADVISORIES,
    CONSUMER,
    DLQ,
    Server,
    dead_letters,
    durable_info,
    emptied,
    holds,
    messages,
    publish,
    pull,
    request,
    state,
    until,
    with_body,
)

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
            "cannot look for dead letters without an advisory: "
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


async def test_an_advisory_whose_deliveries_are_used_up_is_taken_up_again(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    await dead_letters(nc, b"order-0")
    fixed = tmp_path / "fixed"
    body = f"if not __import__('os').path.exists({str(fixed)!r}):\n        raise ValueError"
    async with server.script(with_body("dlq/consumer.py", "reprocess", body, tmp_path), *DLQ[1:]) as dlq:
        await dlq.line("order-0 stays in orders_stream, and will be tried again within two minutes")
        fixed.touch()
        await emptied(nc, *BOTH)
        assert len(dlq.found("reprocessing order order-0")) == 3
        assert dlq.found("dead letter # 1 in orders_stream had no advisory left: published one")


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
    async with server.script(*DLQ) as dlq:
        await dlq.line("reprocessing order new-0")
        await asyncio.sleep(21)  # one more look at least
        assert len(dlq.found("reprocessing .*")) == 1
    assert await messages(nc, "orders_stream") == 1


async def test_orders_that_are_worked_on_or_wait_are_left_alone(server: Server, nc: Client) -> None:
    await publish(nc, *(b"order-%d" % i for i in range(20)))
    consumer = (*CONSUMER, "--failure-rate", "0", "--work-time", "2")
    async with server.script(*DLQ) as dlq, server.script(*consumer) as running:
        await emptied(nc, "orders_stream")
        assert len(running.found("received .*")) == 20
        assert not dlq.lines
        assert (await state(nc, "orders_unprocessed"))["last_seq"] == 0


async def test_dead_letters_that_are_being_reprocessed_are_left_alone(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    await dead_letters(nc, b"order-0", b"order-1")
    slow = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(25)", tmp_path)
    async with server.script(slow, *DLQ[1:]) as one, server.script(slow, *DLQ[1:]) as two:
        await emptied(nc, *BOTH)
        assert sorted(one.messages + two.messages) == ["reprocessing order order-0", "reprocessing order order-1"]
        assert (await state(nc, "orders_unprocessed"))["last_seq"] == 2


async def test_a_stuck_advisory_that_is_malformed_goes(server: Server, nc: Client) -> None:
    """Whatever used its deliveries up, say a processor that died of it."""
    durable = {"durable_name": "unprocessed_order_handler", "ack_policy": "explicit"}
    config = durable | {"max_deliver": 2, "backoff": [10**8]}
    made = {"stream_name": "orders_unprocessed", "config": config}
    await request(nc, "CONSUMER.DURABLE.CREATE.orders_unprocessed.unprocessed_order_handler", made)
    await publish(nc, b"junk", subject=f"{ADVISORIES}.processor")
    subscription = await pull(nc, "orders_unprocessed", "unprocessed_order_handler", 3)
    for _ in range(2):
        await subscription.next_msg(5)
    await until(lambda: is_dead(nc, "orders_unprocessed", "unprocessed_order_handler"))
    await subscription.unsubscribe()
    async with server.script(*DLQ) as dlq:
        await emptied(nc, "orders_unprocessed")
        assert not dlq.lines
