"""What programs import from jobqueue: each name's own example, and what happens without permissions or a server."""

import asyncio
import gc
import inspect
import itertools
import signal
import sys
import textwrap
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.errors import Error

import jobqueue
from jobqueue import Message, Outcome, connect, consume, consume_dead_letters, publish, publish_many
from jobqueue.connection.client import Client
from tests.harness import Server, dead_letters, emptied, has_pull_request, messages, serving, started, until
from tests.harness import publish as publish_

PERMISSIONS = """authorization { users: [
    { user: admin, password: a },
    { user: shop, password: s, permissions: {
        publish: { allow: ["orders.new", "$JS.API.INFO"] }, subscribe: { allow: ["_INBOX.shop.>"] } } }
] }"""


def example(documented: object) -> str:
    """Return the example in a docstring."""
    return textwrap.dedent((inspect.getdoc(documented) or "").partition("Example:\n")[2])


@pytest.fixture
async def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """A connection of a program that may publish to orders.new only."""
    async with serving(tmp_path, PERMISSIONS) as server:
        await server.create_streams(NATS_URL=f"nats://admin:a@127.0.0.1:{server.port}")
        monkeypatch.setenv("NATS_URL", f"nats://shop:s@127.0.0.1:{server.port}")
        async with connect("shop") as nc:
            yield nc


PROGRAMS = ["consume", "consume_dead_letters", "run"]  # their examples run until they are stopped
COMMAND_LINE = ["make_parser", "number", "stream_name", "subject", "subject_filter", "whole_number"]
WORK = ["Retry", "Dead"]
PREAMBLE = """import asyncio
import json
import random
import sys

from jobqueue import *


"""


@pytest.mark.parametrize("name", ["", *PROGRAMS])
async def test_an_example_that_consumes_runs(server: Server, nc: NatsClient, tmp_path: Path, name: str) -> None:
    program = tmp_path / "program.py"
    process = "async def process(order):\n    print(order.data)\n\n\n" if name == "run" else ""
    program.write_text(PREAMBLE + process + example(getattr(jobqueue, name) if name else jobqueue))
    await (dead_letters if name == "consume_dead_letters" else publish_)(nc, b"order-0")
    async with server.script(str(program)) as running:
        await emptied(nc, "orders_stream", "orders_unprocessed")
        assert await running.stop() == 0
    assert any("b'order-0'" in line for line in running.lines)


@pytest.mark.parametrize(("name", "reason"), [("Retry", "busy"), ("Dead", "it is empty")])
async def test_an_example_of_work_that_fails_runs(
    server: Server, nc: NatsClient, tmp_path: Path, name: str, reason: str
) -> None:
    program = tmp_path / "program.py"
    code = f"{PREAMBLE}def is_busy() -> bool:\n    return True\n\n\n{example(getattr(jobqueue, name))}\n\n"
    program.write_text(code + 'run(consume("orders_stream", "orders.*", process))\n')
    await publish_(nc, b"")
    async with server.script(str(program)) as running:
        await running.line(rf"error processing : {reason} \(attempt 1 of 2, stream sequence # 1\)")
        assert await running.stop() == 0


async def test_one_event_shuts_several_consumers_of_a_process_down(
    server: Server, nc: NatsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is begun after that ends at once."""
    monkeypatch.setenv("NATS_URL", server.url)
    done: list[bytes] = []
    shutdown = asyncio.Event()

    async def process(order: Msg) -> None:
        done.append(order.data)
        shutdown.set()

    await publish_(nc, b"order-0")
    async with asyncio.timeout(20):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(consume("orders_stream", "orders.*", process, shutdown=shutdown))
            tasks.create_task(consume_dead_letters("orders_unprocessed", "orders_stream", process, shutdown=shutdown))
        await consume("orders_stream", "orders.*", process, shutdown=shutdown)
    assert done == [b"order-0"]


async def test_a_consumer_that_is_cancelled_ends_its_work_first(
    server: Server, nc: NatsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_URL", server.url)
    begun, ended = asyncio.Event(), list[bytes]()

    async def process(order: Msg) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)  # such as an answer to be waited for
            ended.append(order.data)

    await publish_(nc, b"order-0")
    async with asyncio.timeout(20):
        consuming = asyncio.create_task(consume("orders_stream", "orders.*", process))
        await begun.wait()
        consuming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consuming
    assert ended == [b"order-0"]


async def test_one_signal_shuts_several_consumers_of_a_process_down(
    server: Server, nc: NatsClient, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio\nfrom jobqueue import consume, consume_dead_letters, run\n\n"
        "async def work(order):\n    print(order.data)\n\n"
        "async def main():\n    async with asyncio.TaskGroup() as tasks:\n"
        "        tasks.create_task(consume('orders_stream', 'orders.*', work))\n"
        "        tasks.create_task(consume_dead_letters('orders_unprocessed', 'orders_stream', work))\n\n"
        "run(main())\n"
    )
    await publish_(nc, b"order-0")
    async with server.script(str(program)) as running:
        await emptied(nc, "orders_stream")
        await until(lambda: has_pull_request(nc, "orders_unprocessed", "unprocessed_order_handler"))
        assert await running.stop() == 0
    assert sorted(line for line in running.messages if line.startswith("stopped: ")) == [
        "stopped: 0 dead letters done, 0 attempts failed, 0 advisories deleted",
        "stopped: 1 orders processed, 0 deliveries failed",
    ]
    (told,) = running.found("shutting down: finishing (.*)")
    assert sorted(told.removesuffix(" (signal again to exit now)").split(", ")) == [
        "0 dead letters in flight",
        "0 orders in flight",
    ]


@pytest.mark.parametrize("run", ["asyncio.run", "run"])
async def test_a_signal_ends_just_one_of_two_programs_in_a_process(
    server: Server, nc: NatsClient, tmp_path: Path, run: str
) -> None:
    """Each gracefully; after that the signals are the user's own again."""
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, signal, sys\nfrom jobqueue import consume, run\n\n"
        "async def process(order):\n    print(order.data, flush=True)\n    await asyncio.sleep(1)\n\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "for _ in range(2):\n"
        f"    {run}(consume('orders_stream', 'orders.*', process))\n    print('ended', flush=True)\n"
        "signal.pause()\n"
    )
    async with server.script(str(program)) as running:
        for number in range(2):
            await publish_(nc, b"order-%d" % number)
            await running.line(f"b'order-{number}'")
            running.process.terminate()
            await running.line("ended", number + 1)
        assert await running.stop() == (9 if run == "asyncio.run" else -signal.SIGTERM)
    assert await messages(nc, "orders_stream") == 0


IN_A_GROUP = "async with asyncio.TaskGroup() as group:\n        for why in ('one', 'two'): group.create_task(fail(why))"
ENDS = [
    ("sys.exit(3)", 3, []),
    ("asyncio.get_running_loop().create_task(leave())\n    await asyncio.sleep(60)", 3, []),
    ("raise Failure('one')", 1, ["one"]),
    (IN_A_GROUP, 1, ["one", "two"]),
    ("raise KeyError", 1, None),
]


@pytest.mark.parametrize(("end", "status", "lines"), ENDS)
async def test_the_exit_status_is_what_the_program_ends_with(
    server: Server, end: str, status: int, lines: list[str] | None, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, sys\nfrom jobqueue import Failure, run\n"
        "async def leave():\n    sys.exit(3)\n"
        "async def fail(why):\n    raise Failure(why)\n"
        f"async def main():\n    {end}\nrun(main())\n"
    )
    script = await server.run(program)
    assert script.process.returncode == status
    assert lines is None or script.messages == lines


async def test_the_example_of_each_other_name_runs(server: Server, nc: NatsClient, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    special = {*PROGRAMS, *COMMAND_LINE, *WORK, "connect", "Failure", "shutdown_on_signal", "read_lines"}
    in_a_connection = [example(getattr(jobqueue, name)) for name in jobqueue.__all__ if name not in special]
    assert all(in_a_connection)
    (tmp_path / "orders.txt").write_text("one\n")
    program.write_text(
        PREAMBLE
        + "\n".join(example(getattr(jobqueue, name)) for name in COMMAND_LINE)
        + "\n\nasync def write_next_line() -> None:\n    shutdown.set()\n\n"
        + "async def main() -> None:\n    global shutdown\n"
        + textwrap.indent(example(connect), "    ")
        + "\n"
        + textwrap.indent("\n".join([*in_a_connection, example(jobqueue.shutdown_on_signal)]), "        ")
        + "\n        shutdown.clear()\n"
        + textwrap.indent(example(jobqueue.read_lines), "        ")
        + "\n"
        + example(jobqueue.Failure)
    )
    async with started(sys.executable, program, NATS_URL=server.url, cwd=tmp_path) as script:
        assert await script.status() == 0, script.lines
    assert script.lines[0] == server.url.removeprefix("nats://")
    found = ["1000 stored", r"\x1b[2J clears a terminal", "not stored, or stored before", "b'one'"]
    assert sorted(script.lines[1:]) == sorted(found)
    assert await messages(nc, "orders_stream") == 1001
    unreachable = await server.run(program, NATS_URL="nats://127.0.0.1:1")
    assert unreachable.process.returncode == 1
    assert unreachable.lines == ["cannot connect to nats://127.0.0.1:1: Connection refused"]


async def test_a_subject_that_is_refused_fails_its_requests_and_nothing_else(
    shop: Client, caplog: pytest.LogCaptureFixture
) -> None:
    async def messages_() -> AsyncIterator[Message]:
        for number in range(5000):  # more than are in flight at a time
            yield Message(b"order", f"order-{number}")

    async with asyncio.timeout(20):  # seconds; without the refusal each takes 30
        with pytest.raises(Error, match='permissions violation for publish to "secrets"'):
            await shop.request("secrets", timeout=60)
        outcomes = await asyncio.gather(
            *(publish(shop, subject, Message(b"order", f"{subject}-0")) for subject in ("secrets", "orders.new"))
        )
        assert outcomes == [Outcome.FAILED, Outcome.STORED]
        assert await publish_many(shop, "secrets", messages_()) == {Outcome.FAILED: 5000}
    assert await publish(shop, "orders.new", Message(b"order", "again")) is Outcome.STORED
    assert 'secrets-0 is not published: permissions violation for publish to "secrets"' in caplog.text


async def test_a_refusal_that_no_request_waits_for_is_logged_once_a_connection(
    shop: Client, caplog: pytest.LogCaptureFixture
) -> None:
    async def is_connected() -> bool:
        return "connected again" in caplog.messages and shop.is_connected

    async def publish_in_vain() -> None:
        for _ in range(3):
            await shop.publish("secrets")
            await shop.flush()

    caplog.set_level("INFO")
    await publish_in_vain()
    refused = ['the server refused: permissions violation for publish to "secrets"']
    assert caplog.messages == refused
    await shop.force_reconnect()
    await until(is_connected)
    await publish_in_vain()
    assert caplog.messages[-1:] == refused
    assert caplog.messages.count(*refused) == 2


async def test_an_inbox_that_is_refused_for_a_while_fails_requests_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends the subscription, and not the connection."""
    config = "authorization {{ users: [ {{ user: shop, password: s, permissions: {{ subscribe: [{}] }} }} ] }}"
    async with serving(tmp_path, config.format('"_INBOX.>"')) as server:
        monkeypatch.setenv("NATS_URL", f"nats://shop:s@127.0.0.1:{server.port}")
        await server.create_streams(NATS_URL=f"nats://shop:s@127.0.0.1:{server.port}")
        async with connect("shop") as nc:

            async def is_refused() -> bool:
                try:
                    await nc.request("$JS.API.INFO", timeout=60)
                except Error as error:
                    return 'permissions violation for subscription to "_inbox.' in str(error)
                return False

            async def is_published() -> bool:
                return bool(await publish(nc, "orders.new", Message(b"order", uuid.uuid4().hex)))

            server.configure(config.format('"elsewhere"'))
            await until(is_refused)
            server.configure(config.format('"_INBOX.>"'))
            await until(is_published)


async def test_a_cancelled_publish_many_leaves_nothing_behind(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def endless() -> AsyncIterator[Message]:
        for number in itertools.count():
            yield Message(b"order", f"order-{number}")

    monkeypatch.setenv("NATS_URL", server.url)
    async with connect("shop") as nc:
        before = len(nc._subs), len(asyncio.all_tasks())
        for _ in range(10):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await publish_many(nc, "orders.new", endless())
        assert len(nc._subs) == before[0]
        await until(lambda: len(asyncio.all_tasks()) == before[1])


async def test_a_cancelled_request_leaves_no_exception_behind(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled about when its answer comes."""
    unretrieved: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unretrieved.append(context["message"]))
    monkeypatch.setenv("NATS_URL", server.url)
    async with connect("shop") as nc:
        for number in range(400):
            request = asyncio.create_task(nc.request("nobody", timeout=5))
            await asyncio.sleep(number % 40 * 30e-6)
            request.cancel()
            await asyncio.wait((request,))
            del request
    gc.collect()
    assert not unretrieved


async def test_a_malformed_message_raises_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def made() -> AsyncIterator[Message]:
        yield Message(b"order", "1")
        yield Message(b"order", "")

    monkeypatch.setenv("NATS_URL", server.url)
    async with connect("shop") as nc, asyncio.timeout(20):
        with pytest.raises(TypeError):
            await publish(nc, "orders.new", Message(b"order", uuid.uuid4()))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="id"):
            await publish_many(nc, "orders.new", made())
        with pytest.raises(TypeError):
            await publish(nc, "orders.new", Message(b"order", "2", headers={"attempt": 1}))  # type: ignore[dict-item]
        for subject in ("orders." + "x" * 5000, "orders.>", "orders..new", ""):
            with pytest.raises(ValueError, match="subject"):
                await publish(nc, subject, Message(b"order", "2"))
        assert await publish(nc, "orders.new", Message(b"order", "1")) is Outcome.DUPLICATE


async def test_publishing_after_the_end_of_the_connection_fails_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def made() -> AsyncIterator[Message]:
        yield Message(b"order", "1")

    monkeypatch.setenv("NATS_URL", server.url)
    async with connect("shop") as nc:
        pass
    async with asyncio.timeout(20):
        assert await publish(nc, "orders.new", Message(b"order", "1")) is Outcome.FAILED
        with pytest.raises(Error):
            await publish_many(nc, "orders.new", made())


async def test_publish_takes_no_longer_than_its_timeout(
    server: Server, nc: NatsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_URL", server.url)
    async with connect("shop") as client:
        await nc.request("$JS.API.STREAM.DELETE.orders_stream")
        async with asyncio.timeout(20):  # seconds; by default it takes 30
            assert await publish(client, "orders.new", Message(b"order", "1"), timeout=1) is Outcome.FAILED
        assert server.process
        server.process.send_signal(signal.SIGSTOP)
        large = (Message(b"x" * 500_000, f"{number}") for number in range(10))  # more than the client buffers
        publishing = [asyncio.create_task(publish(client, "orders.new", one, timeout=0.5)) for one in large]
        await asyncio.wait(publishing, timeout=4)  # seconds; an attempt may take 5
        is_done = [one.done() for one in publishing]
        server.process.send_signal(signal.SIGCONT)
        assert is_done == [True] * 10
        assert await asyncio.gather(*publishing) == [Outcome.FAILED] * 10


async def test_what_the_server_says_before_it_hangs_up_is_shown(tmp_path: Path) -> None:
    async with serving(tmp_path, "max_connections: 1") as server, server.client():
        script = await server.run("consumer/consumer.py", "orders_stream", "orders.*")
    assert script.process.returncode == 1
    assert script.messages == [f"cannot connect to {server.url}: maximum connections exceeded"]
