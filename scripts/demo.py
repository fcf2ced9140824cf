"""The whole article on an embedded nats-server; scripts/demo.sh is what starts it."""

import argparse
import asyncio
import os
import re
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import nats
from nats.aio.client import Client

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent  # where nats-server and perhaps natscli are
STREAMS = ("orders_stream", "orders_unprocessed")
DONE_WITHIN = 45.0  # seconds after the last order was published


def say(who: str, line: str) -> None:
    """Print a line and whose it is."""
    print(f"{who:>11} | {line}", flush=True)


class Part:
    """A process of the demo, whose lines are shown and kept."""

    def __init__(self, who: str, process: Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reading = asyncio.create_task(self._read(who))

    async def _read(self, who: str) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace").rstrip())
            if who != "natscli" or len(self.lines) == 1:  # the rest of it is the stream's configuration
                say(who, self.lines[-1])

    async def wait(self) -> int:
        """Wait until the process has ended and return its exit status."""
        await self._reading
        return await self.process.wait()

    def payloads(self, line: str) -> list[str]:
        """Return the orders that the process has logged such a line about."""
        return [match[1] for match in map(re.compile(line).search, self.lines) if match]


@asynccontextmanager
async def part(who: str, *command: str | Path, **env: str) -> AsyncIterator[Part]:
    """Run a process of the demo; at the end stop it by SIGTERM, and by SIGKILL if that doesn't help."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=PIPE,
        stderr=STDOUT,
        env={**os.environ, **env},
        cwd=ROOT,
        start_new_session=True,  # a Ctrl-C is for the demo, which then stops its parts in order
    )
    try:
        yield Part(who, process)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()
                await process.wait()


async def succeed(who: str, *command: str | Path, **env: str) -> Part:
    """Run a process of the demo until it ends, successfully."""
    async with part(who, *command, **env) as running:
        if await running.wait():
            sys.exit(f"{who} failed")
        return running


async def server_url(directory: Path, server: Part) -> str:
    """Wait for the file in which nats-server says which port it has taken."""
    while not (files := list(directory.glob("*.ports"))) or not (ports := files[0].read_text()):
        if server.process.returncode is not None:
            sys.exit("nats-server has ended: " + "\n".join(server.lines[-1:]))
        await asyncio.sleep(0.05)
    found = re.search(r"nats://[\d.:]+", ports)
    assert found
    return found[0]


async def left(nc: Client) -> dict[str, int]:
    """Return how many messages are left in each stream."""
    return {stream: (await nc.jetstream().stream_info(stream)).state.messages for stream in STREAMS}


async def wait_until_empty(nc: Client) -> dict[str, int]:
    """Wait until both streams are empty, saying what is waited for; return how many messages are left."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DONE_WITHIN
    said = None
    while any((waiting := await left(nc)).values()) and loop.time() < deadline:
        if waiting != said:
            orders, advisories = waiting.values()
            say("demo", f"{orders} orders are not done yet, {advisories} of them dead letters")
        said = waiting
        await asyncio.sleep(0.2)
    return waiting


async def demo() -> int:
    """Run the demo and return its exit status."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nats-job-queue-")))
        say("demo", "starting nats-server")
        server = await stack.enter_async_context(
            part(
                "nats-server",
                *(BIN / "nats-server", "--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir", directory),
                *("--jetstream", "--store_dir", directory, "--log", directory / "log"),
            )
        )
        # Only this server counts, whatever the user's own variables say.
        env = {"NATS_URL": await server_url(directory, server), "NATS_CREDENTIALS_FILE_PATH": ""}
        for stream in STREAMS:
            await succeed("natscli", ROOT / "scripts" / f"create_{stream}.sh", **env)
        consumers = {
            who: await stack.enter_async_context(
                part(who, sys.executable, "consumer/consumer.py", "orders_stream", "orders.*", **env)
            )
            for who in ("consumer 1", "consumer 2")
        }
        dlq = await stack.enter_async_context(part("dlq", sys.executable, "dlq/consumer.py", *reversed(STREAMS), **env))
        publisher = await succeed("publisher", sys.executable, "publisher/publisher.py", "orders.new", **env)
        async with await nats.connect(env["NATS_URL"]) as nc:
            waiting = await wait_until_empty(nc)
        workers = {**consumers, "dlq": dlq}
        for worker in workers.values():
            worker.process.terminate()
        failed = [who for who, worker in workers.items() if await worker.wait()]

    published = publisher.payloads(r"published order no\. (\d+)$")
    received = {who: consumer.payloads(r"received order-(\d+) from") for who, consumer in consumers.items()}
    dead = [order for one in consumers.values() for order in one.payloads(r" order-(\d+) will be processed via")]
    reprocessed = dlq.payloads(r"reprocessing order order-(\d+)$")
    tally = {
        "published": len(published),
        **{f"received by {who}": len(orders) for who, orders in received.items()},
        "dead-lettered": len(dead),
        "reprocessed": len(reprocessed),
        **{f"left in {stream}": messages for stream, messages in waiting.items()},
    }
    for what, orders in tally.items():
        say("demo", f"{what:<26}{orders:4}")
    processed = Counter(sum(received.values(), reprocessed))
    accounted_for = processed == Counter(published) and Counter(dead) == Counter(reprocessed)
    if failed or any(waiting.values()) or not accounted_for:
        say("demo", f"NOT every order is accounted for {failed or ''}")
        return 1
    say("demo", "every order was received once or reprocessed once, and nothing is left")
    return 0


def main() -> None:
    """Run the demo; SIGINT and SIGTERM end it in order."""
    argparse.ArgumentParser(description=__doc__).parse_args()

    async def interruptible() -> int:
        running = asyncio.ensure_future(demo())

        def interrupt() -> None:
            say("demo", "interrupted: stopping everything")
            running.cancel()

        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, interrupt)
        try:
            return await running
        except asyncio.CancelledError:
            return 130

    sys.exit(asyncio.run(interruptible()))


if __name__ == "__main__":
    main()
