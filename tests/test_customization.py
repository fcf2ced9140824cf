"""What docs/your-own-work.md says, from its own text."""

import asyncio
import os
import re
import shlex
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import (
    CONSUMER,
    DLQ,
    DOCS,
    PUBLISHER,
    ROOT,
    Server,
    durable_info,
    edited,
    emptied,
    example,
    publish,
    started,
    until,
)

NO_FAILURES = ("--failure-rate", "0", "--work-time", "0")


def with_sendmail(commands: str, directory: Path) -> str:
    """Make a `sendmail` of shell commands, and return the PATH on which it is."""
    sendmail = directory / "sendmail"
    sendmail.write_text(f"#!/bin/sh\n{commands}\n")
    sendmail.chmod(0o755)
    return f"{directory}{os.pathsep}{os.environ['PATH']}"


async def test_asynchronous_work_and_json(server: Server, nc: Client, tmp_path: Path) -> None:
    path = with_sendmail(f'text=$(cat)\n[ "$1" = ann ] || exit 75\nprintf "%s" "$text" >{tmp_path}/sent', tmp_path)
    consumer = edited(CONSUMER[0], example("create_subprocess_exec"), tmp_path)
    orders = ['{"to": "ann", "text": "Welcome"}', '{"to": "bob", "text": "Hello"}', '{"to": "ann']
    await publish(nc, *(order.encode() for order in orders))
    async with server.script(consumer, *CONSUMER[1:], PATH=path) as running:
        await running.line(".* will be processed via DLQ", 2)
    assert (tmp_path / "sent").read_text() == "Welcome"
    (logged,) = re.findall(r"(error processing .*) \(attempt 1 of 2, .*", DOCS)
    assert running.found(".*bob.*")[0].startswith(f"{logged} (attempt ")
    assert running.found(r"error processing \{\"to\": \"ann: JSONDecodeError: .*")


@pytest.mark.parametrize("stop_first", [True, False])
async def test_asynchronous_work_that_is_a_process_is_finished_at_a_stop_and_killed_at_the_time_limit(
    server: Server, nc: Client, tmp_path: Path, stop_first: bool
) -> None:
    path = with_sendmail(f"cat >{tmp_path}/read\nsleep 2\necho >{tmp_path}/sent", tmp_path)
    consumer = edited(CONSUMER[0], example("create_subprocess_exec"), tmp_path)
    await publish(nc, b'{"to": "ann", "text": "Welcome"}')
    own_group = "import os, sys; os.setpgid(0, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    limit = ("--time-limit", "600" if stop_first else "1")
    async with started(
        sys.executable, "-c", own_group, consumer, *CONSUMER[1:], *limit, PATH=path, NATS_URL=server.url
    ) as running:

        async def has_begun() -> bool:
            return (tmp_path / "read").exists()

        await until(has_begun)
        if stop_first:
            os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does
            assert await running.status() == 0
        else:
            await running.line(".*TimeoutError.*")
            await asyncio.sleep(2)
    assert (tmp_path / "sent").exists() == stop_first


async def test_blocking_work_in_a_thread_is_kept_alive_and_done_once(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """The database is locked for longer than the ack wait."""
    database = tmp_path / "emails.db"
    code = example("asyncio.to_thread").replace('"emails.db"', repr(str(database)))
    consumer = edited(CONSUMER[0], code, tmp_path)
    async with server.script(consumer, *CONSUMER[1:], "--concurrency", "2") as running:
        with closing(sqlite3.connect(database)) as db:
            db.execute("BEGIN EXCLUSIVE")
            await publish(nc, b'{"to": "ann"}', **{"Nats-Msg-Id": "1"})
            await publish(nc, b'{"to": "bob"}', **{"Nats-Msg-Id": "2"})
            await asyncio.sleep(7)  # seconds; the ack wait is 5
            db.rollback()
        await emptied(nc, "orders_stream")
        info = await durable_info(nc, "orders_stream", "processor")
        assert info["delivered"]["consumer_seq"] == 2
        assert await running.stop() == 0
    with closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT * FROM emails ORDER BY id").fetchall() == [("1", "ann"), ("2", "bob")]


async def test_each_order_at_work_may_have_a_thread(server: Server, nc: Client, tmp_path: Path) -> None:
    """They wait for each other; Python by itself has a few threads for each core."""
    many = 40
    code = f"import threading\nbarrier = threading.Barrier({many})\n"
    code += "async def process(order: Msg) -> None:\n    await asyncio.to_thread(barrier.wait, 60)"
    consumer = edited(CONSUMER[0], code, tmp_path)
    await publish(nc, *[b"order"] * many)
    async with server.script(consumer, *CONSUMER[1:], "--concurrency", str(many)) as running:
        await emptied(nc, "orders_stream")
        assert await running.stop() == 0
    assert running.messages[-1] == f"stopped: {many} orders processed, 0 deliveries failed"


async def test_more_attempts_and_longer_backoffs(server: Server, nc: Client, tmp_path: Path) -> None:
    """A durable that is there gets what the constants say, and an order has so many attempts."""

    async def is_updated() -> bool:
        config = (await durable_info(nc, "orders_stream", "processor"))["config"]
        return bool(config["max_deliver"] == 5)

    async with server.script(*CONSUMER):
        await durable_info(nc, "orders_stream", "processor")
    constants = example("BACKOFF = ")
    async with server.script(edited(CONSUMER[0], constants, tmp_path), *CONSUMER[1:]) as running:
        await until(is_updated)
        info = await durable_info(nc, "orders_stream", "processor")
        assert info["config"]["backoff"] == [seconds * 10**9 for seconds in (10, 60, 300)]
        assert info["config"]["ack_wait"] == 10 * 10**9
        assert await running.stop() == 0
    short = re.sub(r"\[.*\]", "[0.2, 0.3, 0.4]", constants)
    await publish(nc, b"order-0")
    async with (
        server.script(edited(CONSUMER[0], short, tmp_path), *CONSUMER[1:], "--failure-rate", "1") as running,
        server.script(*DLQ) as dlq,
    ):
        await dlq.line("reprocessing order order-0")
        await emptied(nc, "orders_stream", "orders_unprocessed")
    assert running.messages == ["error processing order-0"] * 5 + ["order-0 will be processed via DLQ"]


async def test_another_queue_beside_the_first(server: Server, nc: Client, tmp_path: Path) -> None:
    for part in ("scripts", "publisher", "consumer", "dlq"):
        shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / "emails.jsonl").write_text('{"to": "ann"}\n{"to": "bob"}\n')
    for line in example("mkdir emails").splitlines():
        command = shlex.split(line)
        async with started(*command, cwd=tmp_path, NATS_URL=server.url) as running:
            assert await running.status() == 0, running.lines
    emails = tmp_path / "emails"
    body = "assert b'ann' in order.data"
    code = re.sub(r"\[.*\]", "[0.2]", example("BACKOFF = ")) + f"\nasync def process(order: Msg) -> None:\n    {body}"
    edited(str(emails / "consumer.py"), code, emails)
    consumer, dlq, publisher = (
        [sys.executable, *shlex.split(line)[1:]] for line in example("python emails/dlq.py").splitlines()[-3:]
    )
    async with (
        server.script(*CONSUMER, *NO_FAILURES) as orders,
        server.script(*DLQ) as dead_orders,
        started(*consumer, cwd=tmp_path, NATS_URL=server.url) as mails,
        started(*dlq, cwd=tmp_path, NATS_URL=server.url) as dead_mails,
        started(*publisher, cwd=tmp_path, NATS_URL=server.url) as mailing,
    ):
        assert await mailing.status() == 0
        assert (await server.run(*PUBLISHER, "--count", "2", "--interval", "0")).process.returncode == 0
        await dead_mails.line(r'reprocessing order \{"to": "bob"\}')
        await emptied(nc, "orders_stream", "orders_unprocessed", "emails_stream", "emails_unprocessed")
        for script in (orders, dead_orders, mails, dead_mails):
            assert await script.stop() == 0
    assert orders.messages[-1] == "stopped: 2 orders processed, 0 deliveries failed"
    assert dead_orders.messages[-1] == "stopped: 0 dead letters done, 0 attempts failed, 0 advisories deleted"
    assert mails.messages[-1] == "stopped: 1 orders processed, 5 deliveries failed"
    assert len(dead_mails.found("reprocessing .*")) == 1


async def test_a_failure_is_told_though_a_thread_is_still_at_work(server: Server, tmp_path: Path) -> None:
    code = "import threading\n\nfrom jobqueue import Failure\n"
    code += "async def main() -> None:\n"
    code += "    asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)\n    raise Failure('told')"
    async with server.script(edited(CONSUMER[0], code, tmp_path), *CONSUMER[1:]) as running:
        await running.line("told")
        assert running.process.returncode is None
