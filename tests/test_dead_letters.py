"""What counts as a dead letter, when it becomes one, and what the DLQ processor does with it."""

import re
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import (
    ADVISORIES,
    CONSUMER,
    DLQ,
    Server,
    advisory,
    dead_letters,
    durable_info,
    edited,
    emptied,
    holds,
    messages,
    publish,
    request,
    until,
    with_body,
)
from tests.proxy import proxied

BOTH = ("orders_stream", "orders_unprocessed")


async def change(nc: Client, **fields: object) -> None:
    """Change the durable processor as an operator would."""
    config = (await durable_info(nc, "orders_stream", "processor"))["config"] | fields
    changed = {"stream_name": "orders_stream", "config": config, "action": "update"}
    subject = f"CONSUMER.CREATE.orders_stream.processor.{config['filter_subject']}"
    assert "error" not in await request(nc, subject, changed)


async def test_an_advisory_of_an_earlier_durable_leaves_its_order_alone(server: Server, nc: Client) -> None:
    """After `nats consumer rm` its orders are delivered again."""
    await dead_letters(nc, b"order-0", b"order-1")
    await request(nc, "CONSUMER.DELETE.orders_stream.processor")
    async with server.script(*CONSUMER, "--failure-rate", "0", "--work-time", "8") as consumer:
        await consumer.line("received order-0 .*")
        async with server.script(*DLQ) as dlq:
            await dlq.line(
                "nothing to reprocess: stream sequence # 1 in orders_stream is in flight or waits for a retry"
            )
            await dlq.line(
                "nothing to reprocess: stream sequence # 2 in orders_stream "
                "(will be delivered: processor has not delivered it yet|is in flight or waits for a retry)"
            )
            await emptied(nc, *BOTH)
            assert consumer.found("received (.*) from .*") == ["order-0", "order-1"]
            assert not dlq.found("reprocessing .*")


async def test_an_order_that_died_before_max_deliver_was_raised_is_reprocessed(server: Server, nc: Client) -> None:
    """No server was seen to deliver such an order again."""
    await dead_letters(nc, b"order-0")
    await change(nc, max_deliver=5)
    async with server.script(*DLQ) as dlq:
        await emptied(nc, *BOTH)
        assert dlq.messages == ["reprocessing order order-0"]


async def test_a_reprocessed_order_is_logged_as_such_though_the_last_answer_is_lost(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    async with proxied(server.port) as proxy, server.script(*DLQ, NATS_URL=proxy.url) as dlq:

        def is_ack(piece: bytes) -> bool:
            if b"PUB $JS.ACK.orders_stream" in piece and b"+ACK" in piece:
                proxy.cut_instead_of(b"MSG")  # the answer
            return False

        proxy.drops = is_ack
        await emptied(nc, *BOTH)
        assert dlq.found("connection lost; reconnecting")
        assert await dlq.stop() == 0
        assert "stopped: 1 dead letters done, 0 attempts failed, 0 advisories deleted" in dlq.messages
        assert not dlq.found("nothing to reprocess.*")


async def test_a_shutdown_in_the_middle_of_a_retry_is_no_error(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    async with server.script(*DLQ) as dlq:
        await emptied(nc, *BOTH)
        await request(nc, "STREAM.DELETE.orders_stream")
        await publish(nc, advisory(), subject=f"{ADVISORIES}.processor")
        await dlq.line("dead letter # 1 in orders_stream: .*; trying again")
        assert await dlq.stop() == 0
        begun = [line for line in dlq.messages if not line.startswith(("orders_stream: ", "cannot search for "))]
        assert [line[:20] for line in begun] == [
            *("reprocessing order o", "dead letter # 1 in o", "shutting down: finis", "stopped: 1 dead lett")
        ]
    await request(nc, "STREAM.CREATE.orders_stream", config)


async def test_the_last_failed_attempt_makes_a_dead_letter_at_once(server: Server, nc: Client, tmp_path: Path) -> None:
    """Without waiting for the last back-off, here one that the test would not outlast."""
    longer = edited("consumer/consumer.py", "BACKOFF = [0.5, 600.0]", tmp_path)
    await publish(nc, b"order-0")
    async with server.script(longer, *CONSUMER[1:], "--failure-rate", "1") as consumer:
        await until(lambda: holds(nc, "orders_unprocessed", 1))
        assert consumer.messages == ["error processing order-0"] * 2 + ["order-0 will be processed via DLQ"]


async def test_a_consumer_whose_max_deliver_is_not_the_durables_leaves_that_to_others(
    server: Server, nc: Client
) -> None:
    async with server.script(*CONSUMER, "--failure-rate", "1") as consumer:
        await durable_info(nc, "orders_stream", "processor")
        await change(nc, max_deliver=3, backoff=[10**9])
        await publish(nc, b"order-0")
        await until(lambda: holds(nc, "orders_unprocessed", 1))
        assert consumer.messages == ["error processing order-0"] * 3


@pytest.mark.faults
async def test_orders_that_wait_for_a_retry_hold_up_no_others(server: Server, nc: Client, tmp_path: Path) -> None:
    code = """
BACKOFF = [60.0]


async def process(order: Msg) -> None:
    if order.data.startswith(b"bad"):
        raise ValueError("no such customer")
    log.info("done %s", printable(order.data))
"""
    consumer = (edited("consumer/consumer.py", code, tmp_path), *CONSUMER[1:], "--concurrency", "16")
    await publish(nc, *(b"bad-%d" % i for i in range(5000)), *(b"good-%d" % i for i in range(20)))
    async with server.script(*consumer) as running:
        await running.line("done .*", 20)
        assert len(running.found(r"error processing bad-\d+: .*")) == 5000


async def test_max_ack_pending_is_raised_where_it_is_the_servers_default(server: Server, nc: Client) -> None:
    for stream, durable in (("orders_stream", "processor"), ("orders_unprocessed", "unprocessed_order_handler")):
        config = {"durable_name": durable, "ack_policy": "explicit"}
        config |= {"filter_subject": "orders.*"} if durable == "processor" else {}
        made = {"stream_name": stream, "config": config}
        command = CONSUMER if durable == "processor" else DLQ
        for before, after in ((1000, 100_000), (500, 500)):
            await request(nc, f"CONSUMER.DURABLE.CREATE.{stream}.{durable}", made)
            await request(nc, f"CONSUMER.DELETE.{stream}.{durable}")
            made["config"]["max_ack_pending"] = before  # type: ignore[index]
            await request(nc, f"CONSUMER.DURABLE.CREATE.{stream}.{durable}", made)
            async with server.script(*command) as script:

                async def is_updated(stream: str = stream, durable: str = durable) -> bool:
                    return bool((await durable_info(nc, stream, durable))["config"].get("description"))

                await until(is_updated)
                assert (await durable_info(nc, stream, durable))["config"]["max_ack_pending"] == after
                assert await script.stop() == 0


async def test_a_users_own_exception_has_its_traceback_escaped_and_indented(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    await publish(nc, b"order-0")
    body = 'raise ValueError("amount\\n2026/11/23 20:24:25 published order no. 3\\x1b[2J")'
    async with server.script(with_body("consumer/consumer.py", "process", body, tmp_path), *CONSUMER[1:]) as consumer:
        await consumer.line("order-0 will be processed via DLQ")
    assert consumer.found(r"error processing order-0: ValueError: amount.* \(attempt . of 2, stream sequence # 1\)")
    assert consumer.lines[1] == "  Traceback (most recent call last):"
    assert re.fullmatch(r'    File ".*/consumer.py", line \d+, in process', consumer.lines[2])
    assert "  2026/11/23 20:24:25 published order no. 3\\x1b[2J" in consumer.lines
    assert all(re.match(r"20.* error processing|20.* will be processed via DLQ|  ", line) for line in consumer.lines)


async def test_reprocess_gets_the_orders_real_metadata(server: Server, nc: Client, tmp_path: Path) -> None:
    await dead_letters(nc, b"order-0", b"order-1")
    stored = (await request(nc, "STREAM.MSG.GET.orders_stream", {"seq": 2}))["message"]["time"]
    body = (
        "m = order.metadata; log.info('got %s %s %s %s %s', "
        "m.stream, m.consumer, m.sequence.stream, m.num_delivered, m.timestamp.isoformat())"
    )
    async with server.script(with_body("dlq/consumer.py", "reprocess", body, tmp_path), *DLQ[1:]) as dlq:
        await dlq.line("got .*", 2)
        assert dlq.found("got orders_stream processor 2 2 (.*)")[0][:23] == stored[:23]


async def test_dead_letters_are_reprocessed_at_the_same_time(server: Server, nc: Client, tmp_path: Path) -> None:
    """Each waits for all of the others."""
    await dead_letters(nc, *(b"order-%d" % i for i in range(8)))
    code = """
import asyncio

barrier = asyncio.Event()
waiting = []


async def reprocess(order: Msg) -> None:
    waiting.append(order)
    if len(waiting) == 8:
        barrier.set()
    await barrier.wait()
"""
    async with server.script(edited("dlq/consumer.py", code, tmp_path), *DLQ[1:], "--concurrency", "8") as dlq:
        await emptied(nc, *BOTH)
        assert await dlq.stop() == 0
        assert dlq.messages[-1] == "stopped: 8 dead letters done, 0 attempts failed, 0 advisories deleted"


async def test_many_dead_letters_whose_retry_is_not_due_hold_up_no_others(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    async def are_waiting() -> bool:
        durable = await durable_info(nc, "orders_unprocessed", "unprocessed_order_handler")
        return bool(durable["num_ack_pending"] > 1000)  # the server's default limit

    await dead_letters(nc, *(b"bad-%d" % i for i in range(1200)))
    body = "if order.data.startswith(b'bad'):\n        raise ValueError"
    dlq = (with_body("dlq/consumer.py", "reprocess", body, tmp_path), *DLQ[1:], "--concurrency", "64")
    async with server.script(*dlq) as running:
        await running.line(r"bad-\d+ stays in orders_stream; next attempt in 10 s")
        await until(are_waiting)
        await publish(nc, b"good")
        async with server.script(*CONSUMER, "--failure-rate", "1"):
            await running.line("reprocessing order good")
    assert await messages(nc, "orders_stream") >= 1200
