"""A server for each test, and what the tests that break things take from the command line."""

import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import Server, serving

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and each process of a test inherits that


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=random.randrange(10**6), help="of what is random; a failed test tells")
    parser.addoption("--soak", type=int, default=1, help="how many times as many faults and orders")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """What decides which process is hit, and when."""
    seed = request.config.getoption("seed")
    print(f"--seed {seed}")
    return random.Random(seed)


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> int:
    """How many times as many faults and orders."""
    times: int = request.config.getoption("soak")
    return times


@pytest.fixture
async def bare_server(tmp_path: Path) -> AsyncIterator[Server]:
    """A nats-server with JetStream and no stream."""
    async with serving(tmp_path) as server:
        yield server


@pytest.fixture
async def server(bare_server: Server) -> Server:
    """A nats-server with both streams."""
    await bare_server.create_streams()
    return bare_server


@pytest.fixture
async def nc(bare_server: Server) -> AsyncIterator[Client]:
    """A connection to the test's server."""
    async with bare_server.client() as client:
        yield client
