"""A server for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import Server, serving


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
