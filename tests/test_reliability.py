"""Where the port does better than the article's code: each of the seven points, on real faults."""

import asyncio
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.connection.connecting import connect
from tests.harness import (
    ADVISORIES,
    CONSUMER,
    DLQ,
    PATIENCE,
    PUBLISHER,
    Server,
    advisory,
    clustered,
    dead_letters,
    durable_info,
    emptied,
    has_in_flight,
    messages,
    publish,
    request,
    serving,
    until,
    waiting,
    with_body,
)
from tests.proxy import proxied

NO_FAILURES = ("--failure-rate", "0")


MALFORMED = [
    b"",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    advisory(2**64),
    advisory(stream="another_stream"),
    advisory(consumer="processor\r\nPUB orders.new 1\r\nx"),
    b'"\x1b[2J"',
]


# 1. The DLQ processor lives on.


async def test_the_dlq_survives_what_is_no_advisory(server: Server, nc: Client) -> None:
    for payload in MALFORMED:
        await publish(nc, payload, subject=f"{ADVISORIES}.processor")
    await dead_letters(nc, b"order-0")
    async with server.script(*DLQ) as dlq:
        await dlq.line("reprocessing order order-0")
        await emptied(nc, "orders_unprocessed", "orders_stream")
        assert len(dlq.found("deleted, for it is no advisory of orders_stream: .*")) == len(MALFORMED)
        assert all(line.isprintable() and len(line) < 400 for line in dlq.lines)
        assert len(dlq.lines) == len(MALFORMED) + 1
        assert await dlq.stop() == 0


async def test_an_advisory_whose_order_is_gone_is_done_with(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0", b"order-1")
    await request(nc, "STREAM.PURGE.orders_stream", {"seq": 2})
    async with server.script(*DLQ) as dlq:
        await dlq.line("nothing to reprocess: stream sequence # 1 in orders_stream is gone")
        await dlq.line("reprocessing order order-1")
        await emptied(nc, "orders_unprocessed", "orders_stream")


async def test_an_advisory_about_an_order_that_was_never_delivered_settles_nothing(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    await publish(nc, b"order-1")
    await publish(nc, advisory(2), subject=f"{ADVISORIES}.processor")
    async with server.script(*DLQ) as dlq:
        await dlq.line("reprocessing order order-0")
        await emptied(nc, "orders_unprocessed")
        assert dlq.found("nothing to reprocess: stream sequence # 2 in orders_stream will be delivered: .*")
    assert await messages(nc, "orders_stream") == 1


async def test_an_advisory_from_before_the_stream_was_created_again_settles_nothing(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    await request(nc, "STREAM.DELETE.orders_stream")
    await server.create_streams()
    await publish(nc, b"live")
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "60") as consumer:
        await consumer.line("received live .*")
        async with server.script(*DLQ) as dlq:
            await dlq.line("nothing to reprocess: .* is in flight or waits for a retry")
            await emptied(nc, "orders_unprocessed")
    assert await messages(nc, "orders_stream") == 1


async def test_a_passing_fault_burns_no_delivery_of_an_advisory(server: Server, nc: Client) -> None:
    """The stream of the orders is away for longer than both deliveries of an advisory take."""
    await dead_letters(nc, b"order-0")
    config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    async with server.script(*DLQ) as dlq:
        await dlq.line("reprocessing order order-0")
        await emptied(nc, "orders_unprocessed")
        await request(nc, "STREAM.DELETE.orders_stream")
        await publish(nc, advisory(), subject=f"{ADVISORIES}.processor")
        await dlq.line("dead letter # 1 in orders_stream: stream not found .*")
        await asyncio.sleep(11)
        info = await durable_info(nc, "orders_unprocessed", "unprocessed_order_handler")
        assert (info["num_ack_pending"], info["num_redelivered"]) == (1, 0)
        await request(nc, "STREAM.CREATE.orders_stream", config)
        await emptied(nc, "orders_unprocessed")


# 2. A dead order leaves the stream.


async def test_a_reprocessed_order_leaves_the_stream(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(50)))
    assert await messages(nc, "orders_stream") == 50
    async with server.script(*DLQ) as dlq:
        await emptied(nc, "orders_stream", "orders_unprocessed")
        assert Counter(dlq.found("reprocessing order (.*)")) == Counter(f"order-{i}" for i in range(50))


# 3. Work that takes longer than the ack wait is done once.


async def test_orders_that_wait_are_neither_delivered_twice_nor_dead(server: Server, nc: Client) -> None:
    await publish(nc, *(b"order-%d" % i for i in range(300)))
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "0.1", "--concurrency", "3") as consumer:
        await consumer.line("received .*", 100)
        # What is being processed, and at most 0.4 seconds of work.
        assert (await durable_info(nc, "orders_stream", "processor"))["num_ack_pending"] <= 3 + 12
        await emptied(nc, "orders_stream")
        received = consumer.found("received (.*) from .*")
    assert Counter(received) == Counter(f"order-{i}" for i in range(300))
    info = await durable_info(nc, "orders_stream", "processor")
    assert info["delivered"]["consumer_seq"] == 300
    assert await messages(nc, "orders_unprocessed") == 0


async def test_an_order_that_takes_longer_than_the_ack_wait_is_done_once(server: Server, nc: Client) -> None:
    await publish(nc, b"order-0", b"order-1")
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "7") as one:
        await one.line("received order-0 .*")
        async with server.script(*CONSUMER, *NO_FAILURES) as two:
            await emptied(nc, "orders_stream")
            assert one.found("received (.*) from .*") == ["order-0", "order-1"]
            assert not two.lines
    assert (await durable_info(nc, "orders_stream", "processor"))["delivered"]["consumer_seq"] == 2


async def in_flight(nc: Client) -> int:
    found: int = (await durable_info(nc, "orders_stream", "processor"))["num_ack_pending"]
    return found


async def test_a_far_server_has_more_orders_sent_ahead_and_none_twice(server: Server, nc: Client) -> None:
    await publish(nc, *(b"order-%d" % i for i in range(1000)))
    async with proxied(server.port) as proxy:
        proxy.delay = 0.05  # seconds, each way
        async with server.script(*CONSUMER, *NO_FAILURES, NATS_URL=proxy.url) as consumer:

            async def is_busy() -> bool:
                return await in_flight(nc) >= 9  # ten of 10 ms in 100 ms

            await until(is_busy)
            assert await in_flight(nc) <= 41  # so that none waits longer than 0.4 s
            assert await consumer.stop() == 0
            received = len(consumer.found("received .*"))
    info = await durable_info(nc, "orders_stream", "processor")
    assert (info["num_ack_pending"], info["delivered"]["consumer_seq"]) == (0, received)


async def test_orders_that_were_sent_ahead_are_done_once_when_the_connection_is_lost(
    server: Server, nc: Client
) -> None:
    await publish(nc, *(b"order-%d" % i for i in range(500)))
    async with proxied(server.port) as proxy:
        proxy.delay = 0.05
        async with server.script(*CONSUMER, *NO_FAILURES, NATS_URL=proxy.url) as consumer:
            await consumer.line("received .*", 150)
            assert await in_flight(nc) > 2
            proxy.cut()
            await consumer.line("connection lost; reconnecting")
            proxy.restore()
            await emptied(nc, "orders_stream")
            assert await consumer.stop() == 0
            assert Counter(consumer.found("received (.*) from .*")) == Counter(f"order-{i}" for i in range(500))


async def test_a_far_server_has_one_order_sent_ahead_when_work_is_long(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    body = """await asyncio.sleep(0.01 if order.data == b"short" else 0.3)
    log.info("done")"""
    script = with_body("consumer/consumer.py", "process", body, tmp_path)
    await publish(nc, *[b"short"] * 200, *[b"long"] * 200)
    async with proxied(server.port) as proxy:
        proxy.delay = 0.05
        async with server.script(script, *CONSUMER[1:], NATS_URL=proxy.url) as consumer:
            await consumer.line("done", 100)
            assert await in_flight(nc) > 2
            await consumer.line("done", 220)  # those that were sent ahead are done
            assert await in_flight(nc) <= 3
            await consumer.line("done", 225)
            assert await in_flight(nc) <= 3


# 4. The publisher is honest, and stores nothing twice.


async def test_a_publish_whose_ack_is_lost_is_stored_once(server: Server, nc: Client) -> None:
    async with proxied(server.port) as proxy:
        proxy.cut_instead_of(b'"seq":')
        publisher = await server.run(*PUBLISHER, "--count", "2", "--interval", "0.001", NATS_URL=proxy.url)
    assert publisher.process.returncode == 0
    assert publisher.messages == [
        "order no. 0 is not published yet: not connected to the server; trying again",
        "connection lost; reconnecting",
        "connected again",
        "published order no. 0",
        "published order no. 1",
    ]
    assert await messages(nc, "orders_stream") == 2


async def test_a_stream_that_is_away_for_a_while_is_waited_for(server: Server, nc: Client) -> None:
    async with server.script(*PUBLISHER, "--count", "3", "--interval", "0.5") as publisher:
        await publisher.line("published order no. 0")
        await request(nc, "STREAM.DELETE.orders_stream")
        await publisher.line(r"order no. \d is not published yet: no response from stream; trying again")
        await server.create_streams()
        assert await publisher.status() == 0
        assert len(publisher.found("published order no. .*")) == 3


# 5. A stop loses nothing.


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_under_load_finishes_what_is_in_flight(server: Server, nc: Client, signum: int) -> None:
    await publish(nc, *(b"order-%d" % i for i in range(2000)))
    consumer = (*CONSUMER, *NO_FAILURES, "--work-time", "0.02", "--concurrency", "20")
    async with server.script(*consumer) as running:
        await running.line("received .*", 200)
        assert await running.stop(signum) == 0
        received = len(running.found("received .*"))
        assert running.messages[-1] == f"stopped: {received} orders processed, 0 deliveries failed"
    info = await durable_info(nc, "orders_stream", "processor")
    assert await messages(nc, "orders_stream") == 2000 - received
    assert (info["num_ack_pending"], info["delivered"]["consumer_seq"]) == (0, received)


async def test_orders_that_come_while_a_stop_waits_are_finished_too(server: Server, nc: Client) -> None:
    """A pull request that the server has must not get an order that nobody works on."""
    await publish(nc, b"long")
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "5") as consumer:
        await consumer.line("received long .*")
        consumer.process.send_signal(signal.SIGTERM)
        await consumer.line("shutting down: .*")
        for i in range(40):
            await publish(nc, b"late-%d" % i)
            await asyncio.sleep(0.1)
        assert await consumer.status() == 0
        received = len(consumer.found("received .*"))
    info = await durable_info(nc, "orders_stream", "processor")
    assert (info["num_ack_pending"], info["delivered"]["consumer_seq"]) == (0, received)


async def test_an_order_in_transit_at_a_shutdown_loses_no_attempt(server: Server, nc: Client) -> None:
    async with proxied(server.port) as proxy:
        proxy.delay = 0.3  # seconds, each way
        async with server.script(*CONSUMER, *NO_FAILURES, NATS_URL=proxy.url) as consumer:
            await until(lambda: is_waiting(nc))
            await publish(nc, b"order-0")
            await until(lambda: has_in_flight(nc, 1))
            assert await consumer.stop() == 0
    assert consumer.found("received .*") == ["received order-0 from stream sequence # 1"]
    info = await durable_info(nc, "orders_stream", "processor")
    assert (info["num_ack_pending"], info["delivered"]["consumer_seq"]) == (0, 1)


async def is_waiting(nc: Client) -> bool:
    waiting: int = (await durable_info(nc, "orders_stream", "processor"))["num_waiting"]
    return waiting == 1


async def test_a_second_signal_ends_it_at_once(server: Server, nc: Client) -> None:
    await publish(nc, b"order-0")
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "600") as consumer:
        await consumer.line("received .*")
        consumer.process.send_signal(signal.SIGTERM)
        await consumer.line(r"shutting down: finishing \d+ orders in flight \(signal again to exit now\)")
        while consumer.process.returncode is None:  # one that comes at the same time doesn't count
            with suppress(ProcessLookupError):
                consumer.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
        assert await consumer.status() == -signal.SIGTERM


# 6. Dead letters that nobody would hear of.


async def test_the_consumer_warns_when_no_stream_keeps_the_advisories(bare_server: Server, nc: Client) -> None:
    await bare_server.run("scripts/create_orders_stream.sh")
    warning = "no stream keeps the advisories .*, until you create one with .*"
    async with bare_server.script(*CONSUMER) as consumer:
        await consumer.line(warning)
        await consumer.stop()
    await bare_server.create_streams()
    await publish(nc, b"order-0")
    async with bare_server.script(*CONSUMER, *NO_FAILURES) as consumer:
        await consumer.line("received order-0 .*")
        assert not consumer.found(warning)


# 7 is the subject of test_bad_input.py; here is what happens when the connection goes later.


async def test_a_lost_connection_is_waited_out(server: Server, nc: Client) -> None:
    async with proxied(server.port) as proxy, server.script(*CONSUMER, *NO_FAILURES, NATS_URL=proxy.url) as consumer:
        await publish(nc, b"order-0")
        await consumer.line("received order-0 .*")
        proxy.cut()
        await consumer.line("connection lost; reconnecting")

        async def is_noticed() -> bool:
            return "consumer_orders_stream" not in await server.connection_names()

        await until(is_noticed)  # before that, the server would send the order there
        await publish(nc, b"order-1")
        proxy.restore()
        await consumer.line("connected again")
        await consumer.line("received order-1 .*")
        await emptied(nc, "orders_stream")
        assert len(consumer.lines) == 4
        assert await consumer.stop() == 0
    assert (await durable_info(nc, "orders_stream", "processor"))["delivered"]["consumer_seq"] == 2


async def test_work_that_ends_without_a_connection_is_acknowledged_after_it(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """And before it asks for more, which it does not at once: others may have acks to send, too."""
    body = """log.info("received it")
    while order._client.is_connected:
        await asyncio.sleep(0.01)
    log.info("done")"""
    script = with_body("consumer/consumer.py", "process", body, tmp_path)
    seen: list[str] = []  # of its requests, before it asked for more
    has_asked = asyncio.Event()

    async def see(message: Msg) -> None:
        if "MSG.NEXT" in message.subject or message.data.startswith(b"+NXT"):
            has_asked.set()
        elif message.data != b"+WPI" and not has_asked.is_set():
            seen.append("ACK" if message.data == b"+ACK" else ".".join(message.subject.split(".")[2:4]))

    async with proxied(server.port) as proxy, server.script(script, *CONSUMER[1:], NATS_URL=proxy.url) as running:
        await publish(nc, b"order-0")
        await running.line("received it")
        proxy.cut()
        await running.line("done")
        await asyncio.sleep(1)  # it waits to acknowledge by then
        await nc.subscribe("$JS.>", cb=see)
        proxy.restore()
        async with asyncio.timeout(PATIENCE):
            await has_asked.wait()
        await emptied(nc, "orders_stream")
    assert seen.count("ACK") == 1
    assert seen.count("CONSUMER.INFO") >= 2, "it didn't wait for the grace period"
    assert (await durable_info(nc, "orders_stream", "processor"))["delivered"]["consumer_seq"] == 1


@pytest.mark.parametrize("failures", [0, 1])
async def test_an_order_that_is_redelivered_while_it_is_in_flight_waits_for_its_first_attempt(
    server: Server, nc: Client, tmp_path: Path, failures: int
) -> None:
    """A laptop sleeps for longer than the ack wait, say."""
    go = tmp_path / "go"
    body = f"""log.info("began")
    {waiting(go)}
    if order.metadata.num_delivered <= {failures}:
        raise ValueError"""
    script = with_body("consumer/consumer.py", "process", body, tmp_path)

    async def is_sent_again() -> bool:
        sent: int = (await durable_info(nc, "orders_stream", "processor"))["delivered"]["consumer_seq"]
        return sent == 2

    await publish(nc, b"order-0")
    async with server.script(script, *CONSUMER[1:]) as consumer:
        await consumer.line("began")
        consumer.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(7)
        consumer.process.send_signal(signal.SIGCONT)
        await until(is_sent_again)
        await asyncio.sleep(0.5)
        go.touch()
        await emptied(nc, "orders_stream")
        assert await consumer.stop() == 0
    assert len(consumer.found("began")) == 1 + failures
    assert await messages(nc, "orders_unprocessed") == 0
    assert await is_sent_again()


async def test_an_ack_that_was_lost_is_sent_again(server: Server, nc: Client) -> None:
    async with proxied(server.port) as proxy, server.script(*CONSUMER, *NO_FAILURES, NATS_URL=proxy.url) as consumer:
        await durable_info(nc, "orders_stream", "processor")
        proxy.cut_instead_of(b"+ACK")
        await publish(nc, b"order-0")
        await consumer.line("connection lost; reconnecting")
        await emptied(nc, "orders_stream")
        assert consumer.found("received .*") == ["received order-0 from stream sequence # 1"]
    assert (await durable_info(nc, "orders_stream", "processor"))["delivered"]["consumer_seq"] == 1


async def test_a_durable_that_was_deleted_is_created_again(server: Server, nc: Client) -> None:
    async with server.script(*CONSUMER, *NO_FAILURES) as consumer:
        await until(lambda: is_waiting(nc))
        await request(nc, "CONSUMER.DELETE.orders_stream.processor")
        await publish(nc, b"order-0")
        await consumer.line("received order-0 .*")
        await consumer.line("orders_stream is back")
        assert len(consumer.lines) == 3


async def test_a_durable_that_is_deleted_while_a_consumer_is_busy_is_created_again(server: Server, nc: Client) -> None:
    await publish(nc, b"order-0", b"order-1")
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "1") as consumer:
        await consumer.line("received order-0 .*")
        await until(lambda: has_in_flight(nc, 2))
        await request(nc, "CONSUMER.DELETE.orders_stream.processor")
        await emptied(nc, "orders_stream")
        assert await consumer.stop() == 0


async def test_a_new_leader_gets_all_acks_before_it_is_asked_for_more(tmp_path: Path) -> None:
    """The leader changes while a busy consumer asks for nothing, and again before it asks for more."""
    go = tmp_path / "go"
    body = f"""{waiting(go)}
    await asyncio.sleep(1 if order.data == b"order-0" else 4.5)"""
    script = with_body("consumer/consumer.py", "process", body, tmp_path)
    durable = "orders_stream.processor"
    acked: set[str] = set()  # before more was asked for
    has_acked, has_asked = asyncio.Event(), asyncio.Event()

    async def see(message: Msg) -> None:
        if not message.subject.startswith("$JS.ACK"):
            has_asked.set()
        elif message.data != b"+WPI" and not has_asked.is_set():
            acked.add(message.subject)
            has_acked.set()

    async def leader() -> str:
        name: str = (await durable_info(nc, "orders_stream", "processor"))["cluster"].get("leader", "")
        return name

    async def is_another() -> bool:
        return await leader() not in ("", old)

    async with clustered(tmp_path) as (cluster, nc):
        await publish(nc, b"order-0", b"order-1")
        async with cluster.script(script, *CONSUMER[1:]):
            await until(lambda: has_in_flight(nc, 2))
            for subject in (f"$JS.API.CONSUMER.MSG.NEXT.{durable}", f"$JS.ACK.{durable}.>"):
                await nc.subscribe(subject, cb=see)
            old = await leader()
            await request(nc, f"CONSUMER.LEADER.STEPDOWN.{durable}")
            await until(is_another)
            go.touch()
            async with asyncio.timeout(PATIENCE):
                await has_acked.wait()
                await asyncio.sleep(1)  # it has looked who leads by then, and looks again in two seconds
                await request(nc, f"CONSUMER.LEADER.STEPDOWN.{durable}")
                await has_asked.wait()
    assert len(acked) == 2


async def test_an_order_of_a_stream_that_was_deleted_acknowledges_nothing_in_its_successor(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    body = """if order.data == b"old":
        await asyncio.sleep(5)
    elif order.metadata.num_delivered == 1:
        raise ValueError
    log.info("done with %s", printable(order.data))"""
    script = with_body("consumer/consumer.py", "process", body, tmp_path)
    await publish(nc, b"old")
    async with server.script(script, *CONSUMER[1:], "--concurrency", "2") as consumer:
        await until(lambda: has_in_flight(nc, 1))
        await request(nc, "STREAM.DELETE.orders_stream")
        await consumer.line("orders_stream: .*; trying again")
        await server.create_streams()
        await publish(nc, b"new")  # under the stream sequence of the old one
        await consumer.line("error processing new: ValueError .*")
        await consumer.line("done with old")
        await consumer.line("done with new")
        await emptied(nc, "orders_stream")


async def test_the_same_holds_while_a_consumer_is_busy(server: Server, nc: Client, tmp_path: Path) -> None:
    body = """if order.data.startswith(b"old"):
        await asyncio.sleep(4)
    elif order.metadata.num_delivered == 1:
        raise ValueError
    log.info("done with %s", printable(order.data))"""
    script = with_body("consumer/consumer.py", "process", body, tmp_path)
    await publish(nc, b"old-0", b"old-1")
    async with server.script(script, *CONSUMER[1:]) as saturated:
        await until(lambda: has_in_flight(nc, 2))
        await request(nc, "STREAM.DELETE.orders_stream")
        await server.create_streams()
        async with server.script(script, *CONSUMER[1:]) as other:
            await publish(nc, b"new-0", b"new-1")
            await other.line("error processing new-1: ValueError .*")
            assert not saturated.lines
            await saturated.line("done with old-0")
            await emptied(nc, "orders_stream")
            assert sorted(saturated.found("done with (new-.)") + other.found("done with (new-.)")) == ["new-0", "new-1"]


async def test_orders_that_nats_py_cannot_read_hold_up_no_others(server: Server, nc: Client) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await reader.readline()
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
    writer.write(b"PUB orders.caf\xe9 4\r\nlame\r\n")
    writer.write(b"HPUB orders.new 8 12\r\nNATS/1.0odd!\r\nHPUB orders.new 4 8\r\n\r\n\r\nodd?\r\nPING\r\n")
    await reader.readline()
    writer.close()
    await publish(nc, *(b"order-%d" % i for i in range(20)))
    async with server.script(*CONSUMER, *NO_FAILURES) as consumer:
        await emptied(nc, "orders_stream")
        assert (
            len(consumer.lines) == (await durable_info(nc, "orders_stream", "processor"))["delivered"]["consumer_seq"]
        )
        assert len(consumer.lines) > 20
        assert not consumer.found("connection lost.*")


async def test_unsent_bytes_on_a_dead_connection_do_not_hold_up_the_reconnect(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxied(server.port) as proxy:
        monkeypatch.setenv("NATS_URL", proxy.url)
        async with connect("test") as client:
            proxy.stall()
            for _ in range(20):
                client._transport.write(b"PUB nowhere 1000000\r\n" + b"x" * 1_000_000 + b"\r\n")  # type: ignore[union-attr]
            await client.force_reconnect()
            async with asyncio.timeout(20):
                while client.stats["reconnects"] != 1:
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("lost", [b"STREAM.INFO.orders_stream", b".STREAM.NAMES", b"CONSUMER.CREATE."])
async def test_a_connection_that_is_lost_at_the_start_is_waited_out(server: Server, nc: Client, lost: bytes) -> None:
    async with proxied(server.port) as proxy:
        proxy.cut_instead_of(lost)
        async with server.script(*CONSUMER, *NO_FAILURES, NATS_URL=proxy.url) as consumer:
            await consumer.line("connected again")
            await publish(nc, b"order-0")
            await consumer.line("received order-0 .*")
            assert await consumer.stop() == 0


async def test_credentials_that_stop_being_good_are_waited_out(tmp_path: Path) -> None:
    async with serving(tmp_path, "authorization { token: first }") as server:
        good = {"NATS_URL": f"nats://first@127.0.0.1:{server.port}"}
        await server.create_streams(**good)
        async with server.script(*CONSUMER, *NO_FAILURES, **good) as consumer:
            for _ in range(2):
                assert (await server.run(*PUBLISHER, "--count", "1", **good)).process.returncode == 0
            await consumer.line("received order-0 .*", 2)
            server.configure("authorization { token: second }")
            await consumer.line("the server refused the connection: .*")
            server.configure("authorization { token: first }")
            await consumer.line("connected again")
            assert (await server.run(*PUBLISHER, "--count", "1", **good)).process.returncode == 0
            await consumer.line("received order-0 .*", 3)
            assert await consumer.stop() == 0


async def test_a_server_that_was_killed_is_waited_for(server: Server, nc: Client) -> None:
    async with server.script(*CONSUMER, *NO_FAILURES) as consumer, server.script(*DLQ) as dlq:
        await durable_info(nc, "orders_stream", "processor")
        await durable_info(nc, "orders_unprocessed", "unprocessed_order_handler")
        await server.restart(signal.SIGKILL)
        await consumer.line("connected again")
        await dlq.line("connected again")
        async with server.client() as after:
            await publish(after, b"order-0")
            await consumer.line("received order-0 .*")
            await consumer.stop()
            await dead_letters(after, b"dead")
        await dlq.line("reprocessing order dead")
