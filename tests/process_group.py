"""Consumers and DLQ processors that are killed and started again, and the account of their orders."""

import asyncio
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from nats.aio.client import Client

from tests.harness import CONSUMER, DLQ, Script, Server, emptied

AT_WORK = 8  # what a killed process may have been group on, and as many whose acks may not have been sent
BEGUN = r"(?:received|reprocessing order) (order-\d+)"
STREAMS = ("orders_stream", "orders_unprocessed")


class ProcessGroup:
    """The processes that are there now, and those that were."""

    def __init__(self, server: Server, url: str = "") -> None:
        self.server = server
        self.running: list[Script] = []
        self.all: list[Script] = []
        self.exposed: set[str] = set()  # the orders that may be done twice
        self.commands: dict[Script, tuple[str, ...]] = {}
        self.urls: dict[Script, str] = {}
        self._killed: list[Script] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = False
        self._url = url or server.url

    async def start(self, *command: str, url: str = "") -> None:
        """Run a script, and run it again as soon as it ends, and wait until it is there for the first time."""
        there = asyncio.Event()
        self._keepers.append(asyncio.create_task(self._keep(command, url, there)))
        await there.wait()

    async def _keep(self, command: tuple[str, ...], url: str, there: asyncio.Event) -> None:
        while not self._stopping:
            async with self.member(*command, url=url) as script:
                there.set()
                await script.ended()
                if script in self._killed:
                    self.exposed |= set(begun(script)[-AT_WORK:])

    @asynccontextmanager
    async def member(
        self, *command: str, url: str = "", stdin: Any = asyncio.subprocess.DEVNULL
    ) -> AsyncIterator[Script]:
        """Run a script once, as one of the group."""
        url = url or self._url
        async with self.server.script(*command, stdin=stdin, NATS_URL=url) as script:
            self.running.append(script)
            self.all.append(script)
            self.commands[script], self.urls[script] = command, url
            try:
                yield script
            finally:
                if script in self.running:
                    self.running.remove(script)

    def kill(self, rng: random.Random) -> None:
        """Kill one of the processes that have work; what it was group on may be done once more."""
        script = rng.choice([script for script in self.running if begun(script)] or self.running)
        self.running.remove(script)
        self._killed.append(script)
        script.process.kill()

    def expose(self, seconds: float = 0) -> None:
        """Note that what is in flight, or was begun within the last seconds, may be done once more."""
        since = asyncio.get_running_loop().time() - seconds
        for script in self.running:
            self.exposed |= {*begun(script)[-AT_WORK:], *begun(script, since)}

    async def is_connected(self, concerned: Iterable[Script] = ()) -> bool:
        """Return whether each process (or each of these) that lost its connection has it again."""
        lost, again = "connection lost; reconnecting", "connected again"
        scripts = set(self.running) & set(concerned or self.running)
        return all(len(script.found(lost)) == len(script.found(again)) for script in scripts)

    async def stop(self) -> list[int]:
        """Have all of them stop and return the exit statuses."""
        self._stopping = True
        return [await script.stop() for script in list(self.running)]

    def account(self, published: Iterable[str], may_repeat: Iterable[str] = (), may_vanish: Iterable[str] = ()) -> str:
        """Check that each order was settled, and more than once only where that is allowed; return a line of it.

        Others may be done as often as they like, or not at all.
        """
        done = Counter(order for script in self.all for order in begun(script))
        reprocessed = {order for script in self.all for order in script.found(r"reprocessing order (.*)")}
        wanted = set(published)
        missing = wanted - set(done)
        assert not missing - set(may_vanish), "lost:\n" + self._story(missing)
        self.exposed |= set(may_repeat)
        assert not set(done) - wanted - self.exposed, f"made up: {set(done) - wanted}"
        twice = {order for order, times in done.items() if times > 1}
        assert not twice - self.exposed, "done twice:\n" + self._story(twice - self.exposed)
        vanished = f", {len(missing)} removed by the server" if missing else ""
        return f"{len(wanted)} orders: {len(reprocessed)} of them reprocessed, {len(twice)} done twice{vanished}"

    def _story(self, concerned: set[str]) -> str:
        """Return the lines of all processes, in the order in which they came, but those of other orders."""
        lines = sorted(
            (when, f"{when:.2f} {which} {line[20:]}")
            for which, script in enumerate(self.all)
            for when, line in zip(script.times, script.lines, strict=True)
        )
        return "\n".join(
            line for _, line in lines if not (found := re.search(r"order-\d+", line)) or found[0] in concerned
        )


def begun(script: Script, since: float = 0) -> list[str]:
    """Return the orders that a process has begun to work on, one after the other."""
    found = (re.search(BEGUN, line) for line, when in zip(script.lines, script.times, strict=True) if when >= since)
    return [match[1] for match in found if match]


@asynccontextmanager
async def process_group(
    server: Server, consumers: int, *options: str, dlq: tuple[str, ...] = DLQ, url: str = ""
) -> AsyncIterator[ProcessGroup]:
    """Run consumers with these options, and a DLQ processor."""
    group = ProcessGroup(server, url)
    try:
        for _ in range(consumers):
            await group.start(*CONSUMER, *options)
        await group.start(*dlq)
        yield group
    finally:
        for keeper in group._keepers:
            keeper.cancel()
        await asyncio.gather(*group._keepers, return_exceptions=True)


async def settled(
    nc: Client,
    group: ProcessGroup,
    published: Iterable[str],
    may_repeat: Iterable[str] = (),
    may_vanish: Iterable[str] = (),
) -> str:
    """Wait until both streams are empty, stop the processes, and return the account."""
    await emptied(nc, *STREAMS)
    assert set(await group.stop()) == {0}
    return group.account(published, may_repeat, may_vanish)
