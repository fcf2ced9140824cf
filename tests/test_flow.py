"""The article's flow: orders, failures, dead letters and load balancing."""

import asyncio
import re
from collections import Counter
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import CONSUMER, DLQ, PUBLISHER, Server, dead_letters, emptied, messages, publish, with_body

RECEIVED = r"received (order-\d+) from stream sequence # \d+"


async def test_twenty_orders_end_settled_once_each(server: Server, nc: Client) -> None:
    async with (
        server.script(*CONSUMER) as one,
        server.script(*CONSUMER) as two,
        server.script(*DLQ) as dlq,
        server.script(*PUBLISHER, "--interval", "0.05") as publisher,
    ):
        assert await publisher.status() == 0
        await emptied(nc, "orders_stream", "orders_unprocessed")
        assert [await script.stop() for script in (one, two, dlq)] == [0, 0, 0]
    orders = [f"order-{i}" for i in range(20)]
    assert publisher.messages == [f"published order no. {i}" for i in range(20)]
    received = one.found(RECEIVED) + two.found(RECEIVED)
    reprocessed = dlq.found(r"reprocessing order (order-\d+)")
    assert sorted(received + reprocessed) == sorted(orders)
    dead = one.found(r"(order-\d+) will be processed via DLQ") + two.found(r"(order-\d+) will be processed via DLQ")
    assert sorted(dead) == sorted(reprocessed)
    failures = Counter(one.found(r"error processing (order-\d+)") + two.found(r"error processing (order-\d+)"))
    assert {order for order, count in failures.items() if count == 2} == set(reprocessed)
    assert max(failures.values(), default=0) <= 2


async def test_lines_have_the_articles_form(server: Server, nc: Client) -> None:
    await publish(nc, b"before", b"order-0")
    async with server.script(*CONSUMER, "--failure-rate", "0") as consumer:
        await consumer.line(r"received order-0 from stream sequence # 2")
        line = consumer.lines[1]
    assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d received order-0 from stream sequence # 2", line)


async def test_an_order_that_fails_twice_is_a_dead_letter(server: Server, nc: Client) -> None:
    await publish(nc, b"order-0")
    async with server.script(*CONSUMER, "--failure-rate", "1") as consumer, server.script(*DLQ) as dlq:
        await dlq.line("reprocessing order order-0")
        await emptied(nc, "orders_stream", "orders_unprocessed")
        assert consumer.messages == [
            "error processing order-0",
            "error processing order-0",
            "order-0 will be processed via DLQ",
        ]


async def test_consumers_share_the_work(server: Server, nc: Client) -> None:
    consumer = (*CONSUMER, "--failure-rate", "0", "--work-time", "0.05")
    async with server.script(*consumer) as one, server.script(*consumer) as two:
        await publish(nc, *(b"order-%d" % i for i in range(60)))
        await emptied(nc, "orders_stream")
        ones, twos = one.found(RECEIVED), two.found(RECEIVED)
    assert Counter(ones + twos) == Counter(f"order-{i}" for i in range(60))
    assert ones and twos


async def test_the_names_of_the_connections_are_the_articles(server: Server) -> None:
    async with (
        server.script(*CONSUMER) as consumer,
        server.script(*DLQ) as dlq,
        server.script(*PUBLISHER, "--interval", "30") as publisher,
    ):
        await publisher.line("published order no. 0")
        names: set[str] = set()
        wanted = {"publisher_orders.new", "consumer_orders_stream", "dlq_orders_stream"}
        async with asyncio.timeout(30):
            while names != wanted:
                names = await server.connection_names()
        assert consumer.process.returncode is dlq.process.returncode is None


async def test_the_dlq_serves_consumers_that_are_not_ours(server: Server, nc: Client) -> None:
    """The advisory names the durable, whoever made it."""
    await dead_letters(nc, b"order-0", durable="somebody")
    async with server.script(*DLQ) as dlq:
        await dlq.line("reprocessing order order-0")
        await emptied(nc, "orders_stream", "orders_unprocessed")


async def test_a_publisher_stores_ids_that_differ_between_runs(server: Server, nc: Client) -> None:
    for _ in range(2):
        assert (await server.run(*PUBLISHER, "--count", "2", "--interval", "0")).process.returncode == 0
    assert await messages(nc, "orders_stream") == 4


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("await asyncio.sleep(600)", r"TimeoutError: not done within the time limit of 0\.5 s"),
        ("asyncio.current_task().cancel(); await asyncio.sleep(1)", "CancelledError"),
    ],
)
async def test_work_that_raises_is_a_failed_order(
    server: Server, nc: Client, tmp_path: Path, statement: str, reason: str
) -> None:
    await publish(nc, b"order-0")
    consumer = with_body("consumer/consumer.py", "process", statement, tmp_path)
    async with server.script(consumer, *CONSUMER[1:], "--time-limit", "0.5") as running:
        await running.line("order-0 will be processed via DLQ")
        attempts = running.found(rf"error processing order-0: {reason} \(attempt (\d) of 2, stream sequence # 1\)")
        assert attempts == ["1", "2"]
        assert all(re.match(r"20\d\d/|  ", line) for line in running.lines)
        assert await running.stop() == 0


async def test_work_that_cancels_its_own_task_and_returns_is_done(server: Server, nc: Client, tmp_path: Path) -> None:
    """Its cancellation must not hit the next order, which the same task processes."""
    await publish(nc, *(b"order-%d" % i for i in range(5)))
    body = """log.info("processed")
    await asyncio.sleep(0.1)
    if order.data == b"order-2":
        asyncio.current_task().cancel()"""
    async with server.script(with_body(CONSUMER[0], "process", body, tmp_path), *CONSUMER[1:]) as running:
        await emptied(nc, "orders_stream")
        assert await running.stop() == 0
    assert running.messages[-1] == "stopped: 5 orders processed, 0 deliveries failed"
    assert len(running.found("processed")) == 5


async def test_work_that_ignores_its_cancellation_holds_up_no_other_order(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """At the time limit it goes on for ever, and its order is redelivered all the same."""
    await publish(nc, b"stubborn", *(b"order-%d" % i for i in range(5)))
    body = """while order.data == b"stubborn":
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            log.info("never mind")
    log.info("done with %s", printable(order.data))"""
    consumer = with_body(CONSUMER[0], "process", body, tmp_path)
    async with server.script(consumer, *CONSUMER[1:], "--time-limit", "0.5") as running, server.script(*DLQ) as dlq:
        await running.line("done with order-.", 5)
        await running.line("stream sequence # 1 in orders_stream: its processing cannot be stopped", 2)
        await dlq.line("reprocessing order stubborn")
        await emptied(nc, "orders_stream", "orders_unprocessed")


async def test_a_script_leaves_the_logging_of_a_users_libraries_alone(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """Their debugging stays silent, their warnings come, and records of theirs say where they are from."""
    body = """for level in (logging.INFO, logging.WARNING):
        logging.getLogger("library").log(level, "of level %d", level)
    from logging.handlers import BufferingHandler
    records = BufferingHandler(9)
    logging.getLogger("library").addHandler(records)
    logging.getLogger("library").error("an error")
    record = records.buffer[0]
    log.info("%s %s %s", record.funcName, record.threadName, record.process == __import__("os").getpid())
    log.info("with extra", extra={"order": 1})
    log.warning("with a traceback", exc_info=ValueError("mine"))"""
    await publish(nc, b"order-0")
    async with server.script(with_body(CONSUMER[0], "process", body, tmp_path), *CONSUMER[1:]) as running:
        await emptied(nc, "orders_stream")
        assert await running.stop() == 0
    assert running.messages[:5] == [
        "of level 30",
        "an error",
        "process MainThread True",
        "with extra",
        "with a traceback",
    ]
    assert "ValueError: mine" in running.lines


async def test_a_dead_letter_whose_reprocessing_fails_stays(server: Server, nc: Client, tmp_path: Path) -> None:
    await dead_letters(nc, b"order-0")
    dlq = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(600)", tmp_path)
    reason = "TimeoutError: not done within the time limit of 0.5 s"
    async with server.script(dlq, *DLQ[1:], "--time-limit", "0.5") as running:
        await running.line("order-0 stays in orders_stream; next attempt in 10 s")
        failure = f"error reprocessing order order-0: {reason} (attempt %d, stream sequence # 1)"
        stays = "order-0 stays in orders_stream; next attempt in %d s"
        assert [line for line in running.messages if not line.startswith("  ")] == [
            *("reprocessing order order-0", failure % 1, stays % 5),
            *("reprocessing order order-0", failure % 2, stays % 10),
        ]
        assert await running.stop() == 0
    assert [await messages(nc, stream) for stream in ("orders_stream", "orders_unprocessed")] == [1, 1]
