"""Many orders at a time, and orders from a file or a pipe."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from jobqueue.connection.connecting import connect
from jobqueue.publishing.message import Message, Outcome
from jobqueue.publishing.publishing import publish, publish_many
from tests.harness import PATIENCE, PUBLISHER, Script, Server, edited, messages, request, serving, until
from tests.proxy import proxied

PIPELINED = (*PUBLISHER, "--interval", "0")


async def payloads(nc: Client) -> list[bytes]:
    """Return what orders_stream has, in order."""
    js = nc.jetstream()
    return [(await js.get_msg("orders_stream", i + 1)).data or b"" for i in range(await messages(nc, "orders_stream"))]


async def test_many_orders_at_a_time_are_each_stored_and_told_once(server: Server, nc: Client) -> None:
    publisher = await server.run(*PIPELINED, "--count", "5000")
    assert publisher.process.returncode == 0
    assert publisher.messages == [f"published order no. {i}" for i in range(5000)]
    assert await messages(nc, "orders_stream") == 5000


@pytest.mark.parametrize("lost", [b"order-300", b'"seq":300', b'"seq":999'])
async def test_a_connection_that_is_lost_with_many_on_their_way_loses_and_doubles_none(
    server: Server, nc: Client, lost: bytes
) -> None:
    async with proxied(server.port) as proxy:
        has_cut = proxy.cut_instead_of(lost)
        publisher = await server.run(*PIPELINED, "--count", "3000", NATS_URL=proxy.url)
        assert has_cut.is_set()
    assert publisher.process.returncode == 0, publisher.messages[-1]
    told = publisher.found(r"published order no\. (\d+)")
    assert sorted(told, key=int) == [str(i) for i in range(3000)]
    assert sorted(await payloads(nc)) == sorted(b"order-%d" % i for i in range(3000))


async def test_many_orders_at_a_time_that_are_not_stored_are_counted(server: Server, nc: Client) -> None:
    config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    await request(nc, "STREAM.UPDATE.orders_stream", config | {"max_msgs": 100})
    publisher = await server.run(*PIPELINED, "--count", "250")
    assert publisher.process.returncode == 1
    assert len(publisher.found("published order no. .*")) == 100 == await messages(nc, "orders_stream")
    assert len(publisher.found(r"order no\. \d+ is not published: maximum messages exceeded .*")) == 150
    assert publisher.messages[-1] == "150 of 250 orders are not published"


@pytest.mark.parametrize("interval", ["0", "0.001"])
async def test_orders_are_the_lines_of_a_file(server: Server, nc: Client, tmp_path: Path, interval: str) -> None:
    file = tmp_path / "orders"
    long = b"x" * 200_000
    lines = [b"first", b"", b"\xff\x00\r", b" ", long, b"y" * 3_000_000, b"", b"after", b"the last, without a newline"]
    file.write_bytes(b"\n".join(lines))
    publisher = await server.run(*PUBLISHER, "--interval", interval, "--input", str(file))
    assert publisher.process.returncode == 1
    assert await payloads(nc) == [b"first", b"\xff\x00\r", b" ", long, b"after", lines[-1]]
    assert publisher.found(r"line (\d) is empty: skipped") == ["2", "7"]
    assert publisher.found(r"order no\. (\d) is not published: maximum payload exceeded") == ["4"]
    assert publisher.messages[-1] == "1 of 7 orders are not published"


async def test_an_order_of_the_largest_size_is_stored_and_a_larger_one_is_told(server: Server, nc: Client) -> None:
    config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    await request(nc, "STREAM.UPDATE.orders_stream", config | {"max_msg_size": -1})
    for size, status in ((2**20 - 100, 0), (2**20 - 10, 1)):  # what is beside it counts too
        async with piped("--interval", "0", server=server) as (publisher, pipe):
            await asyncio.to_thread(write, pipe, b"x" * size)
            os.close(pipe)
            assert await publisher.status() == status, publisher.messages
            assert not publisher.found("connection lost.*")
    assert await messages(nc, "orders_stream") == 1


def write(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


@asynccontextmanager
async def piped(*options: str, server: Server) -> AsyncIterator[tuple[Script, int]]:
    """Run the publisher on standard input, and give the other end of that."""
    reading, writing = os.pipe()
    async with server.script(*PUBLISHER, *options, "--input", "-", stdin=reading) as script:
        os.close(reading)
        yield script, writing


async def test_orders_from_a_pipe_are_published_as_they_come(server: Server, nc: Client) -> None:
    async with piped("--interval", "0", server=server) as (publisher, pipe):
        os.write(pipe, b"one\ntw")
        await publisher.line("published order no. 0")
        os.write(pipe, b"o\nthree")
        await publisher.line("published order no. 1")
        os.close(pipe)
        assert await publisher.status() == 0
    assert await payloads(nc) == [b"one", b"two", b"three"]


async def test_a_stop_ends_the_wait_for_more_orders(server: Server, nc: Client) -> None:
    async with piped("--interval", "0", server=server) as (publisher, pipe):
        os.write(pipe, b"one\n")
        await publisher.line("published order no. 0")
        assert await publisher.stop(signal.SIGTERM) == 0
        os.close(pipe)
    assert await messages(nc, "orders_stream") == 1


@pytest.mark.parametrize("interval", ["0", "0.01"])
async def test_a_stop_before_the_end_of_a_file_says_how_far_it_came(
    server: Server, nc: Client, tmp_path: Path, interval: str
) -> None:
    file = tmp_path / "orders"
    file.write_text("\n".join(f"order-{i}" for i in range(100_000)))
    async with server.script(*PUBLISHER, "--interval", interval, "--input", str(file)) as publisher:
        await publisher.line("published order no. 1")
        assert await publisher.stop() == 1
    stored = await messages(nc, "orders_stream")
    assert len(publisher.found("published .*")) == stored < 100_000
    assert publisher.messages[-1] == f"stopped: line {stored + 1} and what follows it are not published"


async def test_a_file_that_is_faster_than_the_server_waits(server: Server, nc: Client, tmp_path: Path) -> None:
    """While the server takes nothing, little of the file is in memory."""
    file = tmp_path / "orders"
    file.write_bytes((b"x" * 1_000_000 + b"\n") * 200)
    async with (
        proxied(server.port) as proxy,
        server.script(*PIPELINED, "--input", str(file), NATS_URL=proxy.url) as publisher,
    ):
        await publisher.line("published .*", 3)
        proxy.stall()
        await asyncio.sleep(2)  # time enough to read all of it
        assert psutil.Process(publisher.process.pid).memory_info().rss < 100e6
        proxy.restore()
        assert await publisher.status() == 0
    assert await messages(nc, "orders_stream") == 200


async def test_an_order_that_was_given_up_is_not_sent_later(server: Server, nc: Client, tmp_path: Path) -> None:
    code = "from functools import partial\npublish = partial(publish, timeout=3)"  # and not 30
    impatient = edited(PUBLISHER[0], code, tmp_path)
    async with (
        proxied(server.port) as proxy,
        server.script(impatient, "orders.new", "--count", "3", "--interval", "2", NATS_URL=proxy.url) as publisher,
    ):
        await publisher.line("published order no. 0")
        proxy.cut()
        await publisher.line("order no. 1 is not published: not connected to the server")
        proxy.restore()
        await publisher.line("published order no. 2")
        assert await publisher.status() == 1
    assert await payloads(nc) == [b"order-0", b"order-2"]


async def test_what_cannot_be_read_is_told(server: Server, tmp_path: Path) -> None:
    publisher = await server.run(*PUBLISHER, "--input", str(tmp_path))
    assert (publisher.process.returncode, publisher.messages) == (1, [f"cannot read {tmp_path}: Is a directory"])


@pytest.mark.parametrize("limit", [{"max_msgs": 2}, {"max_bytes": 300}, {"max_msg_size": 60}])
async def test_what_the_stream_refuses_is_reported_at_once_and_alone(
    bare_server: Server, nc: Client, limit: dict[str, int]
) -> None:
    """Its words have "maximum" in them, as have those of a server that ends a connection."""
    config = {"name": "s", "subjects": ["orders.*"], "storage": "file", "discard": "new"}
    await request(nc, "STREAM.CREATE.s", config | limit)
    publisher = await bare_server.run(*PIPELINED, "--count", "5")
    stored = await messages(nc, "s")
    assert publisher.process.returncode == 1
    assert publisher.messages[:stored] == [f"published order no. {i}" for i in range(stored)]
    refused = publisher.found(r"order no\. (\d) is not published: (?:max|message size).* \(\d+\)")
    assert sorted(refused) == [str(i) for i in range(stored, 5)]
    assert publisher.messages[-1] == f"{5 - stored} of 5 orders are not published"
    assert len(publisher.lines) == 6


async def test_an_order_above_the_servers_limit_is_reported_at_once_and_alone(tmp_path: Path) -> None:
    async with serving(tmp_path, "max_payload: 1024") as server:
        await server.create_streams()
        file = tmp_path / "orders"
        file.write_bytes(b"small\n" + b"x" * 2000 + b"\nsmall\n")
        publisher = await server.run(*PIPELINED, "--input", str(file))
    assert publisher.process.returncode == 1
    assert sorted(publisher.messages) == [
        "1 of 3 orders are not published",
        "order no. 1 is not published: maximum payload exceeded",
        "published order no. 0",
        "published order no. 2",
    ]


async def test_a_duplicate_is_told_apart(
    server: Server, nc: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever publishes again under an old id must not take that for stored."""
    monkeypatch.setenv("NATS_URL", server.url)
    caplog.set_level("INFO")

    async def made(*numbers: int) -> AsyncIterator[Message]:
        for number in numbers:
            yield Message(b"order-%d" % number, f"id-{number}", f"order no. {number}")

    async with connect("test") as client:
        first = await anext(made(0))
        assert await publish(client, "orders.new", first) is Outcome.STORED
        again = await publish(client, "orders.new", first)
        assert again is Outcome.DUPLICATE and not again
        outcomes = await publish_many(client, "orders.new", made(0, 1, 2))
    assert outcomes == {Outcome.STORED: 2, Outcome.DUPLICATE: 1}
    lines = [record.getMessage() for record in caplog.records if record.name == "jobqueue.publishing.publishing"]
    assert lines == [
        "published order no. 0",
        "order no. 0 was already stored",
        "order no. 0 was already stored",
        "published order no. 1",
        "published order no. 2",
    ]
    assert await messages(nc, "orders_stream") == 3


@pytest.mark.parametrize("answer", [b"null", b"42", b"[]", b"{}", b'{"ok":true}', b"hello"])
async def test_only_a_streams_answer_counts(
    server: Server, nc: Client, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    """Somebody else answers the first orders, too."""
    monkeypatch.setenv("NATS_URL", server.url)
    config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    await request(nc, "STREAM.DELETE.orders_stream")
    answered = asyncio.Event()

    async def interfere(message: Msg) -> None:
        await message.respond(answer)
        answered.set()

    async def made() -> AsyncIterator[Message]:
        for number in range(5):
            yield Message(b"order-%d" % number, f"id-{number}", f"order no. {number}")

    subscription = await nc.subscribe("orders.new", cb=interfere)
    await nc.flush()
    async with connect("test") as client:
        publishing = asyncio.create_task(publish_many(client, "orders.new", made()))
        await answered.wait()
        await subscription.unsubscribe()
        await request(nc, "STREAM.CREATE.orders_stream", config)
        async with asyncio.timeout(PATIENCE):
            assert await publishing == {Outcome.STORED: 5}
    assert await messages(nc, "orders_stream") == 5


async def test_a_signal_ends_the_wait_for_a_writer_of_a_named_pipe(server: Server, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "orders")
    async with server.script(*PUBLISHER, "--input", str(tmp_path / "orders")) as publisher:
        process = psutil.Process(publisher.process.pid)
        await until(lambda: process.num_threads() > 1)  # one that opens it
        assert await publisher.stop() == 0
