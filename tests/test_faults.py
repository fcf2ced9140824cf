"""Break everything that can break, and account for every order: `pytest -m faults [--seed N] [--soak TIMES]`."""

import asyncio
import random
import signal
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.crew import crew, settled
from tests.harness import (
    DLQ,
    PUBLISHER,
    Server,
    clustered,
    dead_letters,
    publish,
    until,
    with_body,
)

pytestmark = pytest.mark.faults

LOAD = ("--concurrency", "4", "--work-time", "0.02", "--failure-rate", "0.1")


def names(count: int) -> list[str]:
    return [f"order-{i}" for i in range(count)]


async def test_consumers_killed(server: Server, nc: Client, chance: random.Random, soak: int) -> None:
    kills = 20 * soak
    published = names(kills * 100)
    async with crew(server, 4, *LOAD) as working:
        await publish(nc, *(name.encode() for name in published))
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(0.1, 0.5))
            working.kill(chance)
        print(await settled(nc, working, published))


async def test_dlq_processors_killed(
    server: Server, nc: Client, chance: random.Random, soak: int, tmp_path: Path
) -> None:
    kills = 10 * soak
    published = names(kills * 10)
    await dead_letters(nc, *(name.encode() for name in published))
    slow = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(0.1)", tmp_path)
    async with crew(server, 0, dlq=(slow, *DLQ[1:])) as working:
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(0.5, 1.5))
            working.kill(chance)
        print(await settled(nc, working, published))


async def test_server_killed(server: Server, chance: random.Random, soak: int) -> None:
    kills = 5 * soak
    published = names(kills * 400)
    publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.002")
    async with crew(server, 2, *LOAD) as working, server.script(*publisher) as publishing:
        await publishing.line("published .*", 100)
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(0.5, 1.5))
            working.expose(2)  # a server without replicas may forget acks of its last moments
            await server.restart(signal.SIGKILL)
        assert await publishing.status() == 0
        async with server.client() as nc:
            print(await settled(nc, working, published))


async def test_server_in_lame_duck_mode(server: Server, soak: int) -> None:
    published = names(1000 * soak)
    publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.001")
    async with crew(server, 2, *LOAD) as working, server.script(*publisher) as publishing:
        await publishing.line("published .*", 200)
        await server.restart(signal.SIGUSR2)
        assert await publishing.status() == 0
        async with server.client() as nc:
            print(await settled(nc, working, published))


async def test_leaders_killed(tmp_path: Path, chance: random.Random, soak: int) -> None:
    """What was acknowledged comes again from no new leader; it may not know what was begun in the last moment."""
    async with clustered(tmp_path) as (cluster, nc):
        published = names(3000 * soak)
        publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.002")
        many = ("--concurrency", "40", "--work-time", "0.3", "--failure-rate", "0.1")
        async with crew(cluster, 3, *many) as working, cluster.script(*publisher) as publishing:
            await publishing.line("published .*", 100)
            for _ in range(3 * soak):
                await asyncio.sleep(chance.uniform(0.5, 2))
                leader = await cluster.leader(nc, "orders_stream")
                await leader.stop(signal.SIGKILL)
                working.expose(0.25)
                await leader.start()
                await until(cluster.is_healthy)
            assert await publishing.status() == 0
            print(await settled(nc, working, published))


async def test_rolling_restart(tmp_path: Path, chance: random.Random, soak: int) -> None:
    async with clustered(tmp_path) as (cluster, nc):
        published = names(1500 * soak)
        publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.003")
        async with crew(cluster, 3, *LOAD) as working, cluster.script(*publisher) as publishing:
            await publishing.line("published .*", 100)
            for _ in range(soak):
                for server in chance.sample(list(cluster.servers.values()), 3):
                    await server.restart(signal.SIGTERM)
                    await until(cluster.is_healthy)
            assert await publishing.status() == 0
            print(await settled(nc, working, published))
