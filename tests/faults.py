"""What a random round breaks, and how it is repaired."""

import asyncio
import random
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from nats.aio.client import Client
from nats.errors import Error

from tests.account import REDRIVE, Accountant, Fault
from tests.harness import ADVISORIES, CONSUMER, Cluster, Script, Server, durable_info, messages, request, until
from tests.process_group import STREAMS, ProcessGroup
from tests.proxy import Link

MANAGE = ("dlq/manage.py", "orders_unprocessed", "orders_stream")
DURABLES = {"orders_stream": "processor", "orders_unprocessed": "unprocessed_order_handler"}
INTERRUPTED = re.compile("may be in the queue already|has not finished")

Cause = Callable[[random.Random], Awaitable[None]]


class Faults:
    """Causes faults in several lanes, so that they overlap; in each lane one is repaired before the next one."""

    def __init__(self, server: Server, nc: Client, group: ProcessGroup, links: list[Link], *, is_calm: bool) -> None:
        self.server = server
        self.books = Accountant(group)
        self.tally: Counter[str] = Counter()
        self.nc = nc
        self.group = group
        self.links = links
        self._is_calm = is_calm
        self._busy: set[Script] = set()  # what a signal is being tried on
        self._server_is_away = asyncio.Lock()  # never two of three
        self._streams: dict[str, dict[str, Any]] = {}  # their configurations

    async def cause(self, seed: int, seconds: float) -> None:
        """Cause faults for some time."""
        for stream in STREAMS:  # as they are before the first fault
            self._streams[stream] = (await request(self.nc, f"STREAM.INFO.{stream}"))["config"]
        async with asyncio.TaskGroup() as tasks:
            for number, lane in enumerate(self._lanes()):
                tasks.create_task(self._run(lane, random.Random(f"{seed} {number}"), seconds))

    def _lanes(self) -> list[list[Cause]]:
        replicated = isinstance(self.server, Cluster)
        gentle: list[Cause] = [self.cut, self.cut, self.cut, self.slow_down, self.lame_duck]
        gentle += [self.step_down, self.step_down, self.step_down, self.restart_servers] if replicated else []
        if self._is_calm:
            orderly: list[Cause] = [self.terminate, self.terminate, self.manage]
            return [gentle, orderly] if replicated else [gentle + orderly]  # acks are not confirmed without a server
        rough = [self.kill, self.kill, self.suspend, self.kill_server, self.delete_durable]
        full = [self.limit_durable, self.limit_stream]
        lane = [*gentle, self.restart_servers, self.terminate, self.manage, *rough, *full]
        return [lane, lane, lane]

    async def _run(self, lane: list[Cause], rng: random.Random, seconds: float) -> None:
        now = asyncio.get_running_loop().time
        ends_at = now() + seconds
        while now() < ends_at:
            # Two interruptions in a row would be a long one, unless a heartbeat is sent in between.
            await asyncio.sleep(rng.uniform(2.5, 4) if self._is_calm else rng.uniform(0.5, 5))
            await rng.choice(lane)(random.Random(rng.random()))

    @contextmanager
    def _fault(self, kind: str, hit: Collection[Script] = (), before: float = 0) -> Iterator[Fault]:
        """Note a fault, which ends with the block; it may concern what happened some seconds before."""
        now = asyncio.get_running_loop().time
        self.tally[kind] += 1
        fault = Fault(kind, now() - before, hit)
        self.books.faults.append(fault)
        try:
            yield fault
        finally:
            fault.end = now()

    # Processes

    @contextmanager
    def _one(self, rng: random.Random) -> Iterator[Script]:
        """Draw a process on which no other signal is being tried."""
        free = [one for one in self.group.running if one not in self._busy] or self.group.all
        # Most of the work is the consumers'.
        (script,) = rng.choices(free, [3 if self.group.commands[one][1:3] == CONSUMER[1:] else 1 for one in free])
        self._busy.add(script)
        try:
            yield script
        finally:
            self._busy.discard(script)

    async def kill(self, rng: random.Random) -> None:
        with self._one(rng) as script, self._fault("script killed", [script]), suppress(ProcessLookupError):
            self.books.signalled.add(script)
            script.process.kill()
            await script.ended()

    async def terminate(self, rng: random.Random) -> None:
        with self._one(rng) as script, self._fault("SIGTERM", [script]), suppress(ProcessLookupError):
            self.books.signalled.add(script)
            await script.stop()

    async def suspend(self, rng: random.Random) -> None:
        with self._one(rng) as script, self._fault("suspended", [script]), suppress(ProcessLookupError):
            script.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(rng.uniform(0.3, 9))
            script.process.send_signal(signal.SIGCONT)

    async def manage(self, rng: random.Random) -> None:
        """List or redrive the dead letters; what was interrupted is run again, but not in a wild round."""
        command, is_again = rng.choice([["list"], ["retry", "--all"]]), True
        with self._fault("manage.py") as fault:
            while is_again:
                async with self.group.member(*MANAGE, *command, url=rng.choice(self.links).url) as script:
                    status = await script.ended()
                is_interrupted = command != ["list"] and (
                    status < 0 or bool(script.found(f".*({INTERRUPTED.pattern}).*"))
                )
                is_again = is_interrupted and self._is_calm
        if is_interrupted:
            self.books.faults.append(Fault(REDRIVE, fault.start, [script], fault.end))

    # The network

    async def cut(self, rng: random.Random) -> None:
        """Cut or stall one link or all; a calm round takes less than three seconds for it, with the reconnect."""
        links = rng.choice([self.links, [rng.choice(self.links)]])
        is_cut = rng.random() < 0.5
        hit = self._behind(links)
        with self._fault("cut" if is_cut else "black hole", hit):
            for link in links:
                link.cut() if is_cut else link.stall()
            await asyncio.sleep(rng.uniform(0.1, 1.5) if self._is_calm else rng.uniform(0.1, 8))
            for link in links:
                link.restore()
            await until(lambda: self.group.is_connected(hit))

    async def slow_down(self, rng: random.Random) -> None:
        link, seconds = rng.choice(self.links), rng.uniform(0.01, 0.1)
        with self._fault("delay", self._behind([link])):
            link.delay(seconds)
            await asyncio.sleep(rng.uniform(1, 4))
            link.delay(0)

    def _behind(self, links: list[Link]) -> list[Script]:
        urls = {link.url for link in links}
        return [script for script in self.group.running if self.group.urls[script] in urls]

    # Servers

    async def kill_server(self, rng: random.Random) -> None:
        async with self._server_is_away:
            server = self.server
            if isinstance(server, Cluster):
                leader = await server.leader(self.nc, rng.choice(STREAMS))
                server = rng.choice([leader, leader, *server.servers.values()])
            with self._fault("leader killed" if server != self.server else "server killed", before=2):
                await server.stop(signal.SIGKILL)
                await asyncio.sleep(rng.uniform(0, 2))
                await server.start()
                await self._stable()

    async def restart_servers(self, rng: random.Random) -> None:
        servers = list(self.server.servers.values()) if isinstance(self.server, Cluster) else [self.server]
        async with self._server_is_away:
            with self._fault("restart"):
                for server in rng.sample(servers, len(servers)):
                    await server.restart(signal.SIGTERM)
                    await self._stable()

    async def lame_duck(self, rng: random.Random) -> None:
        servers = list(self.server.servers.values()) if isinstance(self.server, Cluster) else [self.server]
        async with self._server_is_away:
            with self._fault("lame duck"):
                await rng.choice(servers).restart(signal.SIGUSR2)
                await self._stable()

    async def step_down(self, rng: random.Random) -> None:
        stream = rng.choice(["orders_stream", "orders_stream", "orders_unprocessed"])
        subject = rng.choice(
            [f"STREAM.LEADER.STEPDOWN.{stream}", f"CONSUMER.LEADER.STEPDOWN.{stream}.{DURABLES[stream]}"]
        )
        with self._fault("step-down"):
            with suppress(Error):
                await request(self.nc, subject)
            await self._stable()

    async def _stable(self) -> None:
        """Wait until servers, streams and durables are there, and the processes are connected."""
        await until(self.server.is_healthy)
        for stream, durable in DURABLES.items():
            await durable_info(self.nc, stream, durable)
        if self._is_calm:
            await until(self.group.is_connected)

    # Streams and durables

    async def delete_durable(self, rng: random.Random) -> None:
        stream = rng.choice(STREAMS)
        with self._fault("durable deleted" if stream == "orders_stream" else "DLQ durable deleted"):
            with suppress(Error):
                await request(self.nc, f"CONSUMER.DELETE.{stream}.{DURABLES[stream]}")
            await durable_info(self.nc, stream, DURABLES[stream])

    async def limit_durable(self, rng: random.Random) -> None:
        """Let few orders be in flight for a while."""
        config = (await durable_info(self.nc, "orders_stream", "processor"))["config"]
        with self._fault("durable limited"):
            await self._update_durable(config | {"max_ack_pending": rng.randint(1, 50)})
            await asyncio.sleep(rng.uniform(1, 8))
            await self._update_durable(config)

    async def _update_durable(self, config: dict[str, Any]) -> None:
        update = {"stream_name": "orders_stream", "config": config, "action": "update"}

        async def is_done() -> bool:
            answer = await request(self.nc, "CONSUMER.CREATE.orders_stream.processor", update)
            return answer.get("error", {}).get("code") in (None, 400, 404)  # it may have been deleted meanwhile

        await until(is_done)

    async def limit_stream(self, rng: random.Random) -> None:
        """Let a stream be full, or orders_unprocessed get no advisories, for a while."""
        stream = rng.choice(STREAMS)
        full = {"max_msgs": 1}
        with suppress(Error, KeyError):  # another fault may keep the server from telling
            full = {"max_msgs": max(1, await messages(self.nc, stream))}
        deaf = {"subjects": [f"{ADVISORIES}.nobody"]}
        change: Mapping[str, Any] = rng.choice([full, deaf]) if stream == "orders_unprocessed" else full
        with self._fault(f"{stream} {'full' if change == full else 'deaf'}"):
            await self._update_stream(stream, change)
            await asyncio.sleep(rng.uniform(1, 8))
            await self._update_stream(stream, {})

    async def _update_stream(self, stream: str, change: Mapping[str, Any]) -> None:
        async def is_done() -> bool:
            return "error" not in await request(self.nc, f"STREAM.UPDATE.{stream}", {**self._streams[stream], **change})

        await until(is_done)

    async def repair(self) -> None:
        """Repair what two faults at the same time may have left."""
        for link in self.links:
            link.restore()
            link.delay(0)
        await until(self.server.is_healthy)
        for stream in STREAMS:
            await self._update_stream(stream, {})
        await until(self.group.is_connected)
