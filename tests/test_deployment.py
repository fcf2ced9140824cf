"""What a user copies to run the queue: the server's configuration, compose.yaml, the Dockerfile's context."""

import fnmatch
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import pytest
import yaml
from nats.aio.client import Client

from jobqueue.worker.worker import SHUTDOWN_CONFIRM_TIME
from tests.harness import (
    CONSUMER,
    DLQ,
    MANAGE,
    NATS_SERVER,
    PUBLISHER,
    ROOT,
    Script,
    Server,
    emptied,
    free_ports,
    holds,
    started,
    until,
)

CONFIGURATION = (ROOT / "docs" / "server.conf").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
STREAMS = ("orders_stream", "orders_unprocessed", "orders_failures")
NATSCLI = ("nats", "--inbox-prefix=_INBOX.manage_orders_stream")


@dataclass
class Guarded:
    """A server with the configuration that a user copies."""

    server: Server

    def url(self, user: str) -> str:
        return f"nats://{user}:secret-of-{user}@127.0.0.1:{self.server.port}"

    async def run(self, user: str, *command: str) -> Script:
        return await self.server.run(*command, NATS_URL=self.url(user))

    def violations(self) -> list[str]:
        return re.findall(r".*Violation.*", (self.server.directory / "log").read_text())


@pytest.fixture
async def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guarded]:
    for user, variable in re.findall(r"user: ([\w-]+), password: \$(\w+)", CONFIGURATION):
        monkeypatch.setenv(variable, f"secret-of-{user}")
    config = CONFIGURATION.replace('"nats-data"', f'"{tmp_path / "store"}"')
    server = Server(tmp_path / "server", config, jetstream=False)
    await server.start()
    try:
        yield Guarded(server)
    finally:
        await server.stop()


@pytest.fixture
async def queue(guarded: Guarded) -> Guarded:
    """The same with all three streams."""
    for stream in STREAMS:
        created = await guarded.run("admin", f"scripts/create_{stream}.sh")
        assert created.process.returncode == 0, created.lines
    return guarded


async def test_each_role_can_do_its_work_as_its_own_user(queue: Guarded) -> None:
    server, sequences = queue.server, []
    published = await queue.run("publisher", *PUBLISHER, "--count", "3", "--interval", "0")
    assert published.process.returncode == 0, published.lines
    async with server.script(*CONSUMER, "--failure-rate", "1", NATS_URL=queue.url("consumer")) as consumer:
        await consumer.line("order-. will be processed via DLQ", 3)
        assert await consumer.stop() == 0
    admin = await nats.connect(queue.url("admin"))
    await until(lambda: holds(admin, "orders_failures", 3))
    status = await queue.run("monitor", *MANAGE, "status")
    assert "dead           3" in status.lines
    listed = await queue.run("operator", *MANAGE, "list")
    assert listed.lines[0].split()[-2:] == ["REASON", "PAYLOAD"]
    sequences = [line.split()[0] for line in listed.lines[1:]]
    assert len(sequences) == 3
    for command in ("retry", "discard"):
        done = await queue.run("operator", *MANAGE, command, sequences.pop())
        assert done.process.returncode == 0, done.lines
    assert await holds(admin, "orders_failures", 1)
    async with server.script(*CONSUMER, "--failure-rate", "0", NATS_URL=queue.url("consumer")) as consumer:
        await consumer.line("received order-. .*")
        async with server.script(*DLQ, NATS_URL=queue.url("dlq-processor")) as dlq:
            await dlq.line("reprocessing order order-.")
            await emptied(admin, "orders_stream", "orders_unprocessed")
            assert await consumer.stop() == await dlq.stop() == 0
    await admin.close()
    assert not queue.violations()


async def test_natscli_works_as_the_operator_and_the_monitor(queue: Guarded) -> None:
    assert f"{shlex.join(NATSCLI)} stream get orders_stream 7" in CONFIGURATION
    await queue.run("publisher", *PUBLISHER, "--count", "1")
    async with queue.server.script(*CONSUMER, "--failure-rate", "1", NATS_URL=queue.url("consumer")) as consumer:
        await consumer.line("error processing order-0")
        assert await consumer.stop() == 0
    for user, command, line in (
        ("operator", "stream get orders_stream 1", "order-0"),
        ("monitor", "stream report", ".*orders_unprocessed.*"),
        ("monitor", "consumer report orders_stream", ".*processor.*"),
    ):
        ran = await queue.run(user, *NATSCLI, *command.split())
        assert ran.process.returncode == 0, ran.lines
        assert ran.found(line)
    assert not queue.violations()
    without_prefix = await queue.run("operator", "nats", "--timeout=1s", "stream", "get", "orders_stream", "1")
    assert without_prefix.process.returncode == 1
    edit = ("nats", "stream", "edit", "orders_stream", "--max-age=1h")
    assert [(await queue.run("admin", *edit, *force)).process.returncode for force in ((), ("-f",))] == [1, 0]


async def test_a_role_can_do_nothing_else(queue: Guarded) -> None:
    """The publisher may not consume, the consumer not publish, and the monitor not read an order."""
    await queue.run("publisher", *PUBLISHER, "--count", "1")
    consumer = await queue.run("publisher", *CONSUMER)
    assert consumer.process.returncode == 1
    assert "ermissions violation" in consumer.lines[-1]
    publisher = await queue.run("consumer", *PUBLISHER, "--count", "1")
    assert publisher.process.returncode == 1
    listed = await queue.run("monitor", *MANAGE, "list")
    assert listed.process.returncode == 1
    pull, read = "$JS.API.CONSUMER.MSG.NEXT.orders_stream.processor", "$JS.API.STREAM.MSG.GET.orders_stream"
    create = "$JS.API.CONSUMER.CREATE.orders_stream.mine"
    for user, forbidden in {
        "publisher": [
            pull,
            read,
            create,
            "$JS.API.DIRECT.GET.orders_stream",
            "$JS.ACK.orders_stream.processor.1.1.1.1.0",
        ],
        "consumer": ["orders.new", create, "$JS.API.STREAM.DELETE.orders_stream"],
        "monitor": ["orders.new", pull, read, create, "$JS.API.STREAM.PURGE.orders_stream"],
    }.items():
        refused = await _refused(queue, user, forbidden)
        assert len(refused) == len(forbidden) + 2, refused


async def _refused(queue: Guarded, user: str, subjects: list[str]) -> list[str]:
    """Publish to the subjects, and listen to orders and to inboxes; return what was refused."""
    refused: list[str] = []

    async def see(error: Exception) -> None:
        refused.append(str(error))

    async def are_seen() -> bool:
        return len(refused) >= len(subjects) + 2

    nc: Client = await nats.connect(queue.url(user), error_cb=see)
    for subject in ("orders.*", "_INBOX.>"):
        await nc.subscribe(subject)
    for subject in subjects:
        await nc.publish(subject, b"{}")
    await nc.flush()
    await until(are_seen)
    await nc.close()
    return refused


async def test_the_server_does_not_start_without_passwords(tmp_path: Path) -> None:
    config = tmp_path / "server.conf"
    config.write_text(CONFIGURATION)
    async with started(NATS_SERVER, "--config", config, "-t") as checked:
        assert await checked.status() == 1
    assert "ADMIN_PASSWORD" in checked.lines[0]
    assert re.findall(r"^listen: \"([\d.]+):", CONFIGURATION, re.M) == ["127.0.0.1"]


def _service(name: str) -> dict[str, Any]:
    service: dict[str, Any] = COMPOSE["services"][name]
    return service


def test_compose_opens_the_server_to_this_machine_only_and_keeps_its_data() -> None:
    assert [port.rpartition(":")[0] for port in _service("nats")["ports"]] == ["127.0.0.1:4222"]
    assert not [name for name in ("consumer", "dlq-processor") if "ports" in _service(name)]
    ((volume, directory),) = (volume.split(":") for volume in _service("nats")["volumes"])
    assert volume in COMPOSE["volumes"]
    command = _service("nats")["command"]
    assert command[command.index("--store_dir") + 1] == directory


async def test_the_services_of_compose_work_and_are_healthy(tmp_path: Path) -> None:
    """Their commands, on this machine: ports, paths and the server's name are others here."""
    client_port, monitoring_port = free_ports(2)
    here = {"/data": str(tmp_path / "data"), "8222": str(monitoring_port)}
    command = [here.get(part, part) for part in _service("nats")["command"]]
    health = _service("nats")["healthcheck"]["test"][-1].replace("8222", str(monitoring_port))
    url = f"nats://127.0.0.1:{client_port}"

    async def is_healthy(test: list[str], alive: Path) -> bool:
        assert test[0] == "CMD-SHELL"
        probe = test[1].replace("$$", "$").replace("/tmp/alive", str(alive))
        async with started("sh", "-c", probe) as probing:
            return await probing.status() == 0

    async with started(NATS_SERVER, *command, "--addr", "127.0.0.1", "--port", str(client_port)) as server:
        await server.line(r".*Server is ready")
        fetch = f"import urllib.request; urllib.request.urlopen({health!r})"
        async with started(sys.executable, "-c", fetch) as fetched:
            assert await fetched.status() == 0, fetched.lines
        for stream in STREAMS[:2]:
            async with started(f"scripts/create_{stream}.sh", NATS_URL=url) as created:
                assert await created.status() == 0, created.lines
        for name in ("consumer", "dlq-processor"):
            service, alive = _service(name), tmp_path / name
            assert service["environment"] == {"NATS_URL": "nats://nats:4222", "LIVENESS_FILE": "/tmp/alive"}
            assert service["depends_on"] == {"nats": {"condition": "service_healthy"}}
            python, *arguments = service["command"]
            assert (python, service["build"]) == ("python", ".")
            limit = float(arguments[arguments.index("--time-limit") + 1])
            assert float(service["stop_grace_period"].removesuffix("s")) >= 2 * limit + SHUTDOWN_CONFIRM_TIME + 5
            test = service["healthcheck"]["test"]
            assert not await is_healthy(test, alive)
            async with started(sys.executable, *arguments, NATS_URL=url, LIVENESS_FILE=str(alive)) as running:
                await until(lambda test=test, alive=alive: is_healthy(test, alive))  # type: ignore[misc]
                assert await running.stop() in (0, -signal.SIGTERM)  # it may still be connecting
            os.utime(alive, (time.time() - 300,) * 2)
            assert not await is_healthy(test, alive)


def test_an_image_has_no_data_no_credentials_and_no_environment_of_this_machine() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    untracked = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    assert "nats-data" in untracked
    for name in [*untracked, ".git", "app.creds", "publisher/__pycache__"]:
        name = name.replace("*", "x")
        assert any(
            fnmatch.fnmatch(name, line.removeprefix("**/")) or fnmatch.fnmatch(name, line) for line in ignored
        ), name
    kept = ("docs/package.md", "pyproject.toml", "LICENSE", "jobqueue/worker/worker.py", "consumer/consumer.py")
    assert not [name for name in kept if any(fnmatch.fnmatch(name, line) for line in ignored)]
