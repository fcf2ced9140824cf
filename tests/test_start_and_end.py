"""How a script starts and ends when something is missing: a server, a leader, a valid password."""

import asyncio
import fcntl
import random
import shutil
import signal
import subprocess
import sys
import termios
from asyncio.subprocess import STDOUT
from pathlib import Path
from typing import BinaryIO

import nats
import psutil
import pytest
from nats.aio.client import Client

from tests.harness import (
    CONSUMER,
    DLQ,
    MANAGE,
    PUBLISHER,
    Server,
    clustered,
    dead_letters,
    edited,
    emptied,
    has_in_flight,
    has_pull_request,
    messages,
    publish,
    request,
    serving,
    silent_server,
    started,
    unread,
    until,
    waiting,
    with_body,
)

NO_FAILURES = ("--failure-rate", "0", "--work-time", "0")
AS_PROCESS_1 = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def can_be_process_1() -> bool:
    """Return whether this machine lets us make a process the first one of a namespace."""
    return bool(shutil.which("unshare")) and subprocess.run([*AS_PROCESS_1, "true"], check=False).returncode == 0


@pytest.mark.parametrize("command", [PUBLISHER, CONSUMER, DLQ, (*MANAGE, "list")])
async def test_a_signal_ends_a_script_that_is_connecting(command: tuple[str, ...]) -> None:
    async with silent_server() as url, started(sys.executable, *command, NATS_URL=url) as script:
        await until(lambda: bool(psutil.Process(script.process.pid).net_connections("tcp")))
        assert await script.stop() == -signal.SIGTERM
    assert script.messages == ["stopped by SIGTERM"]


def unread_bytes(pipe: BinaryIO) -> int:
    """Return how much may be read from a pipe at once."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


async def test_a_signal_ends_a_script_that_is_writing_to_its_log(server: Server, tmp_path: Path) -> None:
    """Nobody reads the log at first, so that the signal comes in the middle of a line."""
    program = tmp_path / "program.py"
    program.write_text(
        "import logging\nfrom jobqueue import run\n\n\n"
        "async def main():\n    while True:\n        logging.getLogger('__main__').info('x' * 1000)\n\n\nrun(main())\n"
    )
    async with unread(server, str(program), stderr=STDOUT) as (running, pipe):
        await until(lambda: unread_bytes(pipe) > 60_000)  # of the 64 KiB that a pipe has room for
        running.terminate()
        written = await asyncio.to_thread(pipe.read)
        assert await running.wait() == -signal.SIGTERM
    assert written.endswith(b" stopped by SIGTERM\n")
    assert b"Traceback" not in written


@pytest.mark.skipif(not can_be_process_1(), reason="unshare is not permitted")
@pytest.mark.parametrize("moment", range(6))
async def test_a_signal_ends_process_1_at_any_moment_of_its_start(server: Server, moment: int) -> None:
    """Linux ignores a signal for which process 1 of a container has no handler."""
    async with started(*AS_PROCESS_1, sys.executable, *CONSUMER, NATS_URL=server.url) as script:
        await until(lambda: has_handler(script.process.pid))
        await asyncio.sleep(random.random() * moment * 0.2)
        (process,) = psutil.Process(script.process.pid).children()
        process.terminate()
        async with asyncio.timeout(4):  # an open pull request takes two seconds
            await script.ended()


def has_handler(unshare: int) -> bool:
    """Return whether Python has begun to run the script, as its first child."""
    for process in psutil.Process(unshare).children():
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
        return bool(caught & 1 << (signal.SIGTERM - 1))
    return False


async def test_a_second_signal_ends_process_1(server: Server, nc: Client) -> None:
    if not can_be_process_1():
        pytest.skip("unshare is not permitted")
    await publish(nc, b"order-0")
    work = ("--failure-rate", "0", "--work-time", "60")
    async with started(*AS_PROCESS_1, sys.executable, *CONSUMER, *work, NATS_URL=server.url) as script:
        await script.line("received .*")
        (process,) = psutil.Process(script.process.pid).children()
        process.terminate()
        await script.line("shutting down: .*")
        await asyncio.sleep(0.3)  # sooner it would count as the same signal
        process.terminate()
        assert await script.status() == 128 + signal.SIGTERM


async def test_acks_that_are_not_confirmed_are_an_error(server: Server, nc: Client, tmp_path: Path) -> None:
    go = tmp_path / "go"
    await publish(nc, b"order-0", b"order-1")
    script = with_body(CONSUMER[0], "process", waiting(go), tmp_path)
    async with server.script(script, *CONSUMER[1:]) as consumer:
        await until(lambda: has_in_flight(nc, 2))
        await server.stop()
        go.touch()
        assert await consumer.stop() == 1
    assert consumer.messages[-2:] == [
        "stopped: 2 orders processed, 0 deliveries failed",
        "2 messages may be redelivered: their acks are not confirmed",
    ]


async def test_dead_letters_that_are_not_removed_are_an_error(server: Server, nc: Client, tmp_path: Path) -> None:
    go = tmp_path / "go"
    await dead_letters(nc, b"order-0")
    script = with_body(DLQ[0], "reprocess", waiting(go), tmp_path)
    async with server.script(script, *DLQ[1:]) as dlq:
        await dlq.line("reprocessing order order-0")
        await server.stop()
        go.touch()
        assert await dlq.stop() == 1
    assert dlq.messages[-2:] == [
        "stopped: 0 dead letters done, 0 attempts failed, 0 advisories deleted",
        "1 dead letters may be reprocessed again: their removal is not confirmed",
    ]


async def test_acks_that_waited_for_the_server_for_long_are_sent(server: Server, nc: Client, tmp_path: Path) -> None:
    """After 30 s, here 2, without a confirmation an ack isn't repeated, but that time begins with the connection."""
    await publish(nc, b"order-0")
    code = "import jobqueue.worker.in_flight\njobqueue.worker.in_flight.MAX_CONFIRM_TIME = 2.0"
    impatient = edited(CONSUMER[0], code, tmp_path)
    async with server.script(impatient, *CONSUMER[1:], "--failure-rate", "0", "--work-time", "1") as consumer:
        await consumer.line("received .*")
        await server.stop()
        await asyncio.sleep(5)
        await server.start()
        async with server.client() as again:
            await emptied(again, "orders_stream")
        assert await consumer.stop() == 0
    assert len(consumer.found("received .*")) == 1


async def test_scripts_wait_for_a_cluster_to_have_a_leader(tmp_path: Path) -> None:
    async with clustered(tmp_path) as (cluster, nc):
        await publish(nc, b"order-0")
        one, *others = cluster.servers.values()
        for server in others:
            await server.stop()
        async with one.client() as alone:
            await until(lambda: has_no_leader(alone))
        async with one.script(*CONSUMER, *NO_FAILURES) as consumer:
            await consumer.line("JetStream at .*: .*; trying again")
            for server in others:
                await server.start()
            await consumer.line("received order-0 .*")
            assert await consumer.stop() == 0


async def has_no_leader(nc: Client) -> bool:
    answer = await request(nc, "INFO")
    return bool(answer.get("error", {}).get("err_code") == 10008)


async def test_the_log_says_why_there_is_no_connection(tmp_path: Path) -> None:
    """Not only once: whoever looks later sees it too."""
    password = "authorization {{ user: me, password: {} }}"
    async with serving(tmp_path, password.format("old")) as server:
        url = server.url.replace("//", "//me:old@")
        await server.create_streams(NATS_URL=url)
        async with server.script(*CONSUMER, *NO_FAILURES, NATS_URL=url) as consumer:
            async with await nats.connect(url) as nc:
                await publish(nc, b"order-0")
                await consumer.line("received .*")
                await emptied(nc, "orders_stream")
            server.configure(password.format("new"))
            await server.restart(signal.SIGTERM)
            await consumer.line("the server refused the connection: .*Authorization Violation.*")
            await consumer.line("cannot reconnect yet: .*Authorization Violation.*", 2)
            assert await consumer.stop() == 0
    assert not any("old" in line for line in consumer.lines)


async def test_processes_of_a_users_work_can_be_ended(server: Server, nc: Client, tmp_path: Path) -> None:
    """A forked one would have the graceful shutdown of its parent, and ignore its signals."""
    body = """import multiprocessing, time
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    await asyncio.to_thread(child.join)
    log.info("ended by %d", -child.exitcode)"""
    await publish(nc, b"order-0")
    async with server.script(with_body(CONSUMER[0], "process", body, tmp_path), *CONSUMER[1:]) as consumer:
        await consumer.line("ended by 15")
        await emptied(nc, "orders_stream")
        assert await consumer.stop() == 0
    assert await messages(nc, "orders_unprocessed") == 0


@pytest.mark.parametrize("command", [PUBLISHER, CONSUMER, DLQ])
async def test_a_script_starts_without_what_windows_lacks(
    server: Server, nc: Client, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Here these names are deleted, after the imports of the standard library that need them on Linux."""
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, concurrent.futures.thread, logging, multiprocessing, os, random, runpy, signal, sys, uuid\n"
        "del signal.SIGHUP, signal.pthread_sigmask, os.register_at_fork, os.set_blocking, os.get_blocking\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    await publish(nc, b"order-0")
    async with server.script(str(program), *command) as script:
        if command == PUBLISHER:
            await script.line("published order no. 0")
        else:
            stream, durable = (
                ("orders_stream", "processor")
                if command == CONSUMER
                else ("orders_unprocessed", "unprocessed_order_handler")
            )
            await until(lambda: has_pull_request(nc, stream, durable))
        assert await script.stop() in (0, 1)
    assert not any("Error" in line for line in script.lines)
