"""How a script ends: which signals shut it down, and what happens when nobody reads its log."""

import asyncio
import signal
import sys
from asyncio.subprocess import STDOUT
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from nats.aio.client import Client

from tests.harness import (
    CONSUMER,
    DLQ,
    MANAGE,
    PATIENCE,
    PUBLISHER,
    Server,
    edited,
    has_in_flight,
    publish,
    started,
    unread,
    until,
)

NO_FAILURES = ("--failure-rate", "0", "--work-time", "0")
IGNORES_HANGUPS = (
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
)


async def test_a_closed_terminal_shuts_it_down(server: Server, nc: Client) -> None:
    await publish(nc, b"order-0")
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "2") as consumer:
        await consumer.line("received .*")
        assert await consumer.stop(signal.SIGHUP) == 0
    assert consumer.messages[-1] == "stopped: 1 orders processed, 0 deliveries failed"


@pytest.mark.parametrize("signals", ["HUP HUP", "TERM HUP", "INT TERM", "HUP INT TERM"])
async def test_signals_that_come_together_are_one(server: Server, nc: Client, signals: str) -> None:
    """A shell and the kernel both send SIGHUP; a supervisor forwards Ctrl-C, which the process has had itself."""
    await publish(nc, b"order-0")
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "2") as consumer:
        await consumer.line("received .*")
        for name in signals.split():
            consumer.process.send_signal(signal.Signals[f"SIG{name}"])
        assert await consumer.status() == 0
    shutting_down = r"shutting down: finishing \d+ orders in flight \(signal again to exit now\)"
    assert len(consumer.found(shutting_down)) == 1
    assert len(consumer.lines) == 3


async def test_a_terminal_may_hang_up_again_and_again(server: Server, nc: Client) -> None:
    await publish(nc, b"order-0")
    async with server.script(*CONSUMER, *NO_FAILURES, "--work-time", "2") as consumer:
        await consumer.line("received .*")
        while consumer.process.returncode is None:
            with suppress(ProcessLookupError):
                consumer.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.002)
        assert await consumer.status() == 0


async def test_what_nohup_started_goes_on(server: Server, nc: Client) -> None:
    await publish(nc, b"order-0")
    command = (sys.executable, "-c", IGNORES_HANGUPS, sys.executable, *CONSUMER, *NO_FAILURES)
    async with started(*command, NATS_URL=server.url) as consumer:
        await consumer.line("received order-0 .*")
        consumer.process.send_signal(signal.SIGHUP)
        await publish(nc, b"order-1")
        await consumer.line("received order-1 .*")
        assert await consumer.stop() == 0


async def test_it_shuts_down_when_nobody_reads_its_log(server: Server, nc: Client) -> None:
    await publish(nc, *(b"order-%d" % i for i in range(100)))
    command = (*CONSUMER, *NO_FAILURES, "--work-time", "0.1")
    async with unread(server, *command, stderr=STDOUT) as (consumer, pipe):
        assert b"received order-0" in await asyncio.to_thread(pipe.read, 1000)
        pipe.close()
        assert await asyncio.wait_for(consumer.wait(), PATIENCE) == 0
    info = await nc.jetstream().consumer_info("orders_stream", "processor")
    assert info.num_ack_pending == 0
    assert 0 < (info.num_pending or 0) < 100


async def test_a_second_signal_ends_it_while_its_log_is_stalled(server: Server, nc: Client) -> None:
    await publish(nc, *(b"order-%d" % i * 20 for i in range(3000)))

    async def is_stalled() -> bool:
        before = psutil.Process(consumer.pid).cpu_times()
        await asyncio.sleep(0.5)
        after = psutil.Process(consumer.pid).cpu_times()
        info = await nc.jetstream().consumers_info("orders_stream")
        return bool(info) and info[0].num_ack_pending != 0 and before == after

    async with unread(server, *CONSUMER, *NO_FAILURES, stderr=STDOUT) as (consumer, _):
        await until(is_stalled)
        while consumer.returncode is None:  # the first ones are one
            with suppress(ProcessLookupError):
                consumer.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
        assert await consumer.wait() == -signal.SIGTERM


@pytest.mark.parametrize("command", [PUBLISHER, CONSUMER, DLQ, (*MANAGE, "list")])
async def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path: Path, command: tuple[str, ...]) -> None:
    """The first import of a script takes until the signal has come."""
    (tmp_path / "argparse.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    async with started(sys.executable, *command, PYTHONPATH=f"{tmp_path}") as script:
        await script.line("importing")
        assert await script.stop(signal.SIGINT) == 128 + signal.SIGINT
    assert script.lines == ["importing"]


async def test_what_holds_up_the_exit_is_said_again_and_again(server: Server, nc: Client, tmp_path: Path) -> None:
    """A thread can't be cancelled, and its order is neither in flight any more nor done."""
    code = "import time\nasync def process(order: Msg) -> None:\n    await asyncio.to_thread(time.sleep, 40)"
    consumer = edited(CONSUMER[0], code, tmp_path)
    await publish(nc, b"order-0")
    async with server.script(consumer, *CONSUMER[1:], "--time-limit", "14") as running:
        await until(lambda: has_in_flight(nc, 1))
        running.process.send_signal(signal.SIGTERM)
        await running.line("still shutting down: finishing 1 orders in flight .*")
        await running.line("stopped: .*")
        await running.line(r"shutting down: waiting for a thread of a cancelled order \(signal to exit now\)")
        assert await running.stop() == -signal.SIGTERM
