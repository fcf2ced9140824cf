"""An ack hits no other message than its own, and isn't withheld from its own."""

import asyncio
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from tests.harness import (
    CONSUMER,
    Server,
    durable_info,
    emptied,
    has_in_flight,
    messages,
    publish,
    request,
    until,
    with_body,
)
from tests.proxy import proxied

OLD = [b"old-%d" % i for i in range(15)]
NEW = [b"new-%d" % i for i in range(10)]


def waiting_consumer(go: Path, directory: Path) -> str:
    """Make a consumer whose old orders wait for a file, and whose new ones fail at first."""
    body = f"""from pathlib import Path
    log.info("began %s", printable(order.data))
    while order.data.startswith(b"old") and not Path({str(go)!r}).exists():
        await asyncio.sleep(0.05)
    if order.data.startswith(b"new") and order.metadata.num_delivered == 1:
        raise ValueError
    log.info("done with %s", printable(order.data))"""
    return with_body("consumer/consumer.py", "process", body, directory)


async def test_acks_after_a_backup_and_a_restore_are_sent(server: Server, nc: Client, tmp_path: Path) -> None:
    """The restored stream is younger than its messages, and still theirs."""
    go = tmp_path / "go"
    await publish(nc, *OLD)
    async with server.script(waiting_consumer(go, tmp_path), *CONSUMER[1:], "--concurrency", "15") as consumer:
        await consumer.line("began old-.*", len(OLD))
        backup = str(tmp_path / "backup")
        for command in ("backup orders_stream", "rm --force orders_stream", "restore"):
            directory = [] if "rm" in command else [backup, "--no-progress"]
            natscli = await server.run("nats", "stream", *command.split(), *directory)
            assert natscli.process.returncode == 0, natscli.lines
        await consumer.line("orders_stream is back")
        go.touch()
        await emptied(nc, "orders_stream")
        assert await consumer.stop() == 0
    assert Counter(consumer.found("began (.*)")) == Counter(order.decode() for order in OLD)
    assert await messages(nc, "orders_unprocessed") == 0


async def test_acks_after_an_edit_and_two_restarts_are_sent(server: Server, tmp_path: Path) -> None:
    """Up to nats-server 2.12 the second restart moves the time when the stream was created."""
    go = tmp_path / "go"
    async with server.client() as nc:
        await publish(nc, *OLD)
    async with server.script(waiting_consumer(go, tmp_path), *CONSUMER[1:], "--concurrency", "15") as consumer:
        await consumer.line("began old-.*", len(OLD))
        await server.restart(signal.SIGTERM)
        await consumer.line("connected again")
        async with server.client() as nc:
            config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
            await request(nc, "STREAM.UPDATE.orders_stream", config | {"description": "edited"})
        await server.restart(signal.SIGTERM)
        await consumer.line("connected again", 2)
        go.touch()
        async with server.client() as nc:
            await emptied(nc, "orders_stream")
            assert await messages(nc, "orders_unprocessed") == 0
        assert await consumer.stop() == 0
    assert Counter(consumer.found("began (.*)")) == Counter(order.decode() for order in OLD)


async def test_acks_of_orders_that_a_roll_back_took_away_hit_no_new_ones(server: Server, tmp_path: Path) -> None:
    """The server's volume is set back to a snapshot, and new orders get the stream sequences of old ones."""
    go = tmp_path / "go"
    store, snapshot = tmp_path / "store", tmp_path / "snapshot"
    async with server.script(waiting_consumer(go, tmp_path), *CONSUMER[1:], "--concurrency", "30") as consumer:
        async with server.client() as nc:
            await durable_info(nc, "orders_stream", "processor")
        await server.stop()
        shutil.copytree(store, snapshot)
        await server.start()
        await consumer.line("connected again")
        async with server.client() as nc:
            await publish(nc, *OLD)
        await consumer.line("began old-.*", len(OLD))
        await server.stop(signal.SIGKILL)
        shutil.rmtree(store)
        snapshot.rename(store)
        await server.start()
        async with server.client() as nc:
            await publish(nc, *NEW)
            await consumer.line("connected again", 2)
            await consumer.line("error processing new-.: ValueError .*", len(NEW))
            go.touch()
            await consumer.line("done with old-.*", len(OLD))
            await consumer.line("done with new-.*", len(NEW))
            await emptied(nc, "orders_stream")
            assert await consumer.stop() == 0
            assert await messages(nc, "orders_unprocessed") == 0
    assert Counter(consumer.found("done with (new-.)")) == Counter(order.decode() for order in NEW)
    assert len(consumer.found("stream sequence # .* in orders_stream is (another message now|gone): not acked")) == 15


async def test_another_stream_at_the_same_address_gets_no_acks_of_the_first(server: Server, tmp_path: Path) -> None:
    """The store is lost altogether, and the streams are created again."""
    go = tmp_path / "go"
    async with server.client() as nc:
        await publish(nc, *OLD)
    async with server.script(waiting_consumer(go, tmp_path), *CONSUMER[1:], "--concurrency", "30") as consumer:
        await consumer.line("began old-.*", len(OLD))
        await server.stop(signal.SIGKILL)
        shutil.rmtree(tmp_path / "store")
        await server.start()
        await server.create_streams()
        async with server.client() as nc:
            await publish(nc, *NEW)
            go.touch()
            await consumer.line("done with old-.*", len(OLD))
            await consumer.line("done with new-.*", len(NEW))
            await emptied(nc, "orders_stream")
        assert await consumer.stop() == 0
    assert Counter(consumer.found("began (new-.)")) == Counter(2 * [order.decode() for order in NEW])


async def test_nothing_is_sent_for_what_cannot_be_verified(server: Server, tmp_path: Path) -> None:
    """Neither acks nor heartbeats: after the reconnect there is no stream to read the orders from."""
    go = tmp_path / "go"
    seen: list[bytes] = []

    async def see(message: Msg) -> None:
        seen.append(message.data)

    async with server.script(waiting_consumer(go, tmp_path), *CONSUMER[1:], "--concurrency", "15") as consumer:
        async with server.client() as nc:
            await publish(nc, *OLD)
        await consumer.line("began old-.*", len(OLD))
        await server.stop(signal.SIGKILL)
        shutil.rmtree(tmp_path / "store")
        await server.start()
        async with server.client() as nc:
            await nc.subscribe("$JS.ACK.>", cb=see)
            await consumer.line("connected again")
            await asyncio.sleep(4)  # longer than two heartbeats
            go.touch()
            await consumer.line("done with old-.*", len(OLD))
            await asyncio.sleep(2)
        assert not seen


async def test_an_order_that_was_removed_while_it_waits_is_not_processed(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """It was queued behind another one when the connection was lost."""
    go = tmp_path / "go"
    await publish(nc, b"old-0", b"new-0")
    async with server.script(waiting_consumer(go, tmp_path), *CONSUMER[1:]) as consumer:
        await consumer.line("began old-0")
        await until(lambda: has_in_flight(nc, 2))
        await nc.request("$JS.ACK.orders_stream.processor.1.2.0.0.0", b"+ACK", timeout=5)
        await server.restart(signal.SIGKILL)
        await consumer.line("stream sequence # 2 in orders_stream is gone: not acked")
        go.touch()
        await consumer.line("done with old-0")
        assert await consumer.stop() == 0
    assert not consumer.found("began new-0")


@pytest.mark.parametrize("what", ["no allow_direct", "an order with a status"])
async def test_orders_that_no_direct_get_can_read_are_verified_too(
    server: Server, nc: Client, tmp_path: Path, what: str
) -> None:
    """Nobody answers it in the one case, and in the other nats-py takes the order's own header for that."""
    go = tmp_path / "go"
    await publish(nc, b"old-0", **({"Status": "503"} if what == "an order with a status" else {}))
    async with (
        proxied(server.port) as proxy,
        server.script(waiting_consumer(go, tmp_path), *CONSUMER[1:], NATS_URL=proxy.url) as consumer,
    ):
        await consumer.line("began old-0")
        if what == "no allow_direct":
            config = (await request(nc, "STREAM.INFO.orders_stream"))["config"] | {"allow_direct": False}
            assert "error" not in await request(nc, "STREAM.UPDATE.orders_stream", config)
        proxy.cut()
        await consumer.line("connection lost; reconnecting")
        proxy.restore()
        await consumer.line("connected again")
        go.touch()
        await emptied(nc, "orders_stream")
        assert await consumer.stop() == 0
    assert len(consumer.found("began .*")) == 1


async def test_a_redelivery_that_waited_is_no_fresher_than_its_arrival(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """Its ack would hit an order of the stream's successor, which another consumer is processing."""
    failed, go = tmp_path / "failed", tmp_path / "go"
    body = f"""import time
    from pathlib import Path
    log.info("began %s %d", printable(order.data), order.metadata.num_delivered)
    if order.data == b"old-0" and order.metadata.num_delivered == 1:
        time.sleep(6)  # the server hears nothing for longer than the ack wait
        while not Path({str(failed)!r}).exists():
            await asyncio.sleep(0.05)
        raise ValueError
    if order.data == b"old-1":
        raise ValueError
    while not Path({str(go)!r}).exists() and order.data != b"old-0":
        await asyncio.sleep(0.05)"""
    script = with_body("consumer/consumer.py", "process", body, tmp_path)
    await publish(nc, b"old-0")
    async with server.script(script, *CONSUMER[1:]) as busy:
        await busy.line("began old-0 1")
        await until(lambda: is_redelivered(nc))
        await publish(nc, b"old-1")
        await until(lambda: has_in_flight(nc, 2))  # so no pull request is open, whose end would tell of the deletion
        await request(nc, "STREAM.DELETE.orders_stream")
        await server.create_streams()
        async with server.script(script, *CONSUMER[1:], "--concurrency", "2") as other:
            await publish(nc, b"new-0", b"new-1")
            await other.line("began new-. 1", 2)
            await asyncio.sleep(1)  # longer than a delivery counts as fresh
            failed.touch()
            await busy.line("began old-0 2")
            await busy.line("stream sequence # 1 in orders_stream is another message now: not acked")
            assert await messages(nc, "orders_stream") == 2
            go.touch()
            await emptied(nc, "orders_stream")


async def is_redelivered(nc: Client) -> bool:
    found: int = (await durable_info(nc, "orders_stream", "processor"))["num_redelivered"]
    return found >= 1
