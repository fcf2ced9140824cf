"""A nak tells whether a message is pending, and what is decided by that."""

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.connection.connecting import connect
from jobqueue.dead_letters.pending import Pending
from jobqueue.jetstream.durables import Durables
from tests.harness import (
    ACKS_OF_VERSION_2,
    ADVISORIES,
    CONSUMER,
    DLQ,
    PATIENCE,
    Server,
    clustered,
    dead_letters,
    durable_info,
    edited,
    emptied,
    has_in_flight,
    holds,
    knows_acks_of_version_2,
    messages,
    publish,
    pull,
    request,
    serving,
    until,
    with_body,
)

BOTH = ("orders_stream", "orders_unprocessed")


@asynccontextmanager
async def running(kind: str, directory: Path) -> AsyncIterator[tuple[Client, list[str]]]:
    """Run one server or three with both streams, and yield a connection, and the URL of each."""
    if kind == "three replicas":
        async with clustered(directory) as (cluster, nc):
            yield nc, [server.url for server in cluster.servers.values()]
        return
    if kind == "acks of version 2" and not knows_acks_of_version_2():
        pytest.skip("this nats-server doesn't know the feature flag")
    async with serving(directory, ACKS_OF_VERSION_2 if kind == "acks of version 2" else "") as server:
        await server.create_streams()
        async with server.client() as nc:
            yield nc, [server.url]


@pytest.mark.parametrize("kind", ["one server", "acks of version 2", "three replicas"])
async def test_a_nak_tells_exactly_whether_a_message_is_pending(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences 1 to 20 are dead, of 21 to 60 each fourth is acked, 61 to 80 are not delivered."""
    async with running(kind, tmp_path) as (nc, urls):
        await dead_letters(nc, *(b"dead-%d" % i for i in range(20)))
        config = (await durable_info(nc, "orders_stream", "processor"))["config"] | {"backoff": [60 * 10**9]}
        made = {"stream_name": "orders_stream", "config": config}
        await request(nc, "CONSUMER.CREATE.orders_stream.processor.orders.*", made)
        await publish(nc, *(b"order-%d" % i for i in range(20, 80)))
        subscription = await pull(nc, "orders_stream", "processor", 40)
        for sequence in range(21, 61):
            delivery = await subscription.next_msg(5)
            if sequence % 4 == 0:
                await nc.request(delivery.reply, b"+ACK")
        await until(lambda: holds(nc, "orders_stream", 70))
        for url in urls:
            monkeypatch.setenv("NATS_URL", url)
            async with connect("test") as asker:
                pending, durables = Pending(asker), Durables(asker, "orders_stream")
                await pending.start("orders_stream")
                durable = await durables.find("processor")
                assert durable and durable.delivered == 60
                delay = durable.longest_wait
                answers = await asyncio.gather(
                    *(
                        pending.ask("orders_stream", "processor", durable.consumer_seq, number, delay, 0)
                        for number in range(1, 81)
                    )
                )
                assert [number for number, is_pending in enumerate(answers, 1) if is_pending] == [
                    number for number in range(21, 61) if number % 4
                ]
        assert await messages(nc, "orders_stream") == 70


async def test_advisories_of_living_orders_do_them_no_harm(server: Server, nc: Client, tmp_path: Path) -> None:
    """Some are in flight, some wait for a retry, and some are not delivered yet; the advisories are of any date."""
    body = "log.info('began %s', order.data.decode())\n    await asyncio.sleep(1.5)"
    body += "\n    if order.data == b'order-0' and order.metadata.num_delivered == 1:\n        raise ValueError"
    consumer = (with_body("consumer/consumer.py", "process", body, tmp_path), *CONSUMER[1:], "--concurrency", "5")
    await publish(nc, *(b"order-%d" % i for i in range(20)))
    async with server.script(*consumer) as working:
        await working.line("error processing order-0: .*")
        for consumer_name, timestamp in (("processor", "1970-01-01T00:00:00Z"), ("other", "2999-01-01T00:00:00Z")):
            for sequence in 2 * list(range(1, 21)):
                advisory = {
                    "stream": "orders_stream",
                    "consumer": consumer_name,
                    "stream_seq": sequence,
                    "deliveries": 2,
                }
                payload = json.dumps(advisory | {"timestamp": timestamp}).encode()
                await publish(nc, payload, subject=f"{ADVISORIES}.{consumer_name}")
        async with server.script(*DLQ, "--concurrency", "16") as dlq:
            await emptied(nc, *BOTH)
            assert not dlq.found("reprocessing .*")
        assert sorted(working.found("began (.*)")) == sorted(f"order-{i}" for i in [0, *range(20)])


async def test_an_order_that_its_own_work_has_naked_is_no_dead_letter(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """The nak counts, though an exception follows; and the count of the dead is off: no durable takes one order."""
    body = """log.info("began %s", order.data.decode())
    if order.metadata.num_delivered == 1:
        await order.nak(delay=30)
        raise ValueError"""
    consumer = (with_body("consumer/consumer.py", "process", body, tmp_path), "orders_stream", "orders.new")
    await publish(nc, b"order-0")
    await publish(nc, b"nobody's", subject="orders.other")
    async with server.script(*consumer) as working, server.script(*DLQ) as dlq:
        await working.line("began order-0", 2)
        await until(lambda: holds(nc, "orders_stream", 1))
        assert not dlq.found("reprocessing .*|.*had no advisory.*")


async def test_a_nak_of_ones_own_work_outlasts_the_backoff(server: Server, nc: Client, tmp_path: Path) -> None:
    """Nor do heartbeats cut it short while the work goes on, nor does a failed last attempt make it a dead letter."""
    body = """log.info("began %s", order.data.decode())
    if order.data == b"later":
        await order.nak(delay=3600)
        await asyncio.sleep(4)
    raise ValueError"""
    consumer = (with_body("consumer/consumer.py", "process", body, tmp_path), *CONSUMER[1:], "--concurrency", "2")
    async with server.script(*consumer) as working:
        await publish(nc, b"later")
        await working.line("error processing later: .*")
        await publish(nc, b"order-1")
        await working.line("order-1 will be processed via DLQ")
        assert working.found("began (.*)") == ["later", "order-1", "order-1"]


async def test_a_nak_of_ones_own_work_at_the_last_attempt_counts_too(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """It becomes a dead letter when its delay is over."""
    body = """if order.data == b"later" and order.metadata.num_delivered == 2:
        await order.nak(delay=3600)
    raise ValueError"""
    consumer = (with_body("consumer/consumer.py", "process", body, tmp_path), *CONSUMER[1:])
    async with server.script(*consumer) as working:
        await publish(nc, b"later")
        await working.line("error processing later: .*", 2)
        await publish(nc, b"order-1")
        await until(lambda: holds(nc, "orders_unprocessed", 1))
        assert working.found(".* will be processed via DLQ") == ["order-1 will be processed via DLQ"]


async def test_a_nak_and_then_a_return_is_done(server: Server, nc: Client, tmp_path: Path) -> None:
    nak = with_body("consumer/consumer.py", "process", "await order.nak(delay=3600)", tmp_path)
    await publish(nc, b"order-0")
    async with server.script(nak, *CONSUMER[1:]):
        await emptied(nc, "orders_stream")


async def test_what_waits_for_a_retry_is_postponed_once_between_two_deliveries(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """A dead letter whose reprocessing fails keeps the search looking."""
    code = "BACKOFF = [40.0]\n\n\nasync def process(order: Msg) -> None:\n    raise ValueError"
    consumer = (edited("consumer/consumer.py", code, tmp_path), *CONSUMER[1:])
    failing = with_body("dlq/consumer.py", "reprocess", "raise ValueError", tmp_path)
    await dead_letters(nc, b"dead-0")
    looks = await nc.subscribe("$JS.API.CONSUMER.LIST.orders_stream")
    naks = await nc.subscribe("$JS.EVENT.ADVISORY.CONSUMER.MSG_NAKED.orders_stream.processor")
    async with server.script(*consumer) as working, server.script(failing, *DLQ[1:]):
        await publish(nc, b"order-1")
        await working.line("error processing order-1: .*")
        for _ in range(12):  # half a minute
            await looks.next_msg(PATIENCE)
        assert not working.found("order-1 will be processed via DLQ")
        asked = [json.loads((await naks.next_msg(1)).data)["stream_seq"] for _ in range(naks.pending_msgs)]
        assert asked.count(2) == 1


async def test_repeated_advisories_do_not_keep_a_retry_away(server: Server, nc: Client, tmp_path: Path) -> None:
    code = "BACKOFF = [5.0]\n\n\nasync def process(order: Msg) -> None:\n    raise ValueError"
    consumer = (edited("consumer/consumer.py", code, tmp_path), *CONSUMER[1:])
    async with server.script(*consumer) as working, server.script(*DLQ, "--concurrency", "4"):
        await publish(nc, b"order-0")
        await working.line("error processing order-0: .*")
        acks = await nc.subscribe("$JS.ACK.orders_stream.processor.*.1.>")
        await nc.flush()
        advisory = {"stream": "orders_stream", "consumer": "processor", "stream_seq": 1, "deliveries": 2}
        for _ in range(8):
            await publish(nc, json.dumps(advisory).encode(), subject=f"{ADVISORIES}.processor")
        await working.line("order-0 will be processed via DLQ")
        await emptied(nc, *BOTH)
        sent = [(await acks.next_msg(1)).data for _ in range(acks.pending_msgs)]
        assert b"+WPI" not in sent, "it restarts the ack wait"
        before_its_death = sent[: sent.index(b"-NAK")]
        assert len([ack for ack in before_its_death if ack.startswith(b"-NAK {")]) <= 3, "questions"


async def test_two_advisories_of_one_dead_letter_are_one_attempt(server: Server, nc: Client, tmp_path: Path) -> None:
    slow = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(2)", tmp_path)
    await dead_letters(nc, b"order-0")
    advisory = {"stream": "orders_stream", "consumer": "processor", "stream_seq": 1, "deliveries": 2}
    await publish(nc, json.dumps(advisory).encode(), subject=f"{ADVISORIES}.processor")
    async with server.script(slow, *DLQ[1:], "--concurrency", "4") as dlq:
        await emptied(nc, *BOTH)
        assert dlq.found("reprocessing .*") == ["reprocessing order order-0"]


async def test_a_dead_letter_that_was_reprocessed_removes_nothing_of_another_server(
    bare_server: Server, tmp_path: Path
) -> None:
    """That has an order in flight with the same sequence; nats-py would send the ack when it is connected again."""
    server, go = bare_server, tmp_path / "go"
    await server.create_streams()
    body = f"from pathlib import Path\n    while not Path({str(go)!r}).exists():\n        await asyncio.sleep(0.05)"
    async with server.client() as nc:
        await dead_letters(nc, b"order-0")
    dlq = (with_body("dlq/consumer.py", "reprocess", body, tmp_path), *DLQ[1:])
    async with server.script(*dlq) as running:
        await running.line("reprocessing order order-0")
        await server.stop(signal.SIGKILL)
        await running.line("connection lost; reconnecting")
        go.touch()
        shutil.rmtree(server.directory / "store")
        await asyncio.sleep(1)  # the work ends, and nats-py would buffer the ack
        await server.start()
        await server.create_streams()
        async with server.client() as nc:
            await dead_letters(nc, backoff=600)
            await publish(nc, b"another")
            await pull(nc, "orders_stream", "processor", 1)
            await until(lambda: has_in_flight(nc, 1))
            await durable_info(nc, "orders_unprocessed", "unprocessed_order_handler")
            assert await running.stop() == 0
            assert await messages(nc, "orders_stream") == 1


async def test_without_the_servers_answers_nothing_is_taken_for_dead(server: Server, nc: Client) -> None:
    """As where a process may use the API of another account, but doesn't get its advisories."""
    await dead_letters(nc, b"order-0")
    code = "import runpy, sys\nimport jobqueue.dead_letters.pending as pending\npending.NAKED = 'nowhere'\n"
    code += "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    async with server.script("-c", code, *DLQ, PYTHONPATH=".") as dlq:
        await dlq.line("advisory # 1 in orders_unprocessed is gone, or not pending")
        assert await dlq.stop() == 0
        assert not dlq.found("reprocessing .*")
    assert [await messages(nc, stream) for stream in BOTH] == [1, 1]


async def test_on_replicas_a_dead_letter_is_looked_at_twice(tmp_path: Path) -> None:
    """What was acked just now may still be stored."""
    async with clustered(tmp_path) as (cluster, nc):
        await dead_letters(nc, b"order-0", b"order-1")
        seen: list[dict[str, Any]] = []

        async def see(message: Msg) -> None:
            seen.append(json.loads(message.data))

        await nc.subscribe("$JS.EVENT.ADVISORY.CONSUMER.MSG_NAKED.orders_unprocessed.*", cb=see)
        async with cluster.script(*DLQ) as dlq:
            await emptied(nc, *BOTH)
            assert sorted(dlq.messages) == ["reprocessing order order-0", "reprocessing order order-1"]
        naked = {one["stream_seq"] for one in seen if one["deliveries"] == 1}
        assert naked == {1, 2}  # until the second look
        assert not (await durable_info(nc, "orders_unprocessed", "unprocessed_order_handler"))["num_ack_pending"]
