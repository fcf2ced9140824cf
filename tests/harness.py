"""The real parts that the tests run: nats-server, the project's scripts, natscli."""

import ast
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import nats
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import BadRequestError

ROOT = Path(__file__).parent.parent
DOCS = "\n".join(file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
BIN = Path(sys.executable).parent
NATS_SERVER = os.environ.get("NATS_SERVER", str(BIN / "nats-server"))  # another version may be named there
PATIENCE = 60.0  # seconds until an event that a test waits for counts as one that doesn't come

# Ack subjects of version 2, which nats-server knows from 2.14 on.
ACKS_OF_VERSION_2 = "feature_flags { js_ack_fc_v2: true }"

ADVISORIES = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.orders_stream"
CONSUMER = ("consumer/consumer.py", "orders_stream", "orders.*")
DLQ = ("dlq/consumer.py", "orders_unprocessed", "orders_stream")
MANAGE = ("dlq/manage.py", *DLQ[1:])
PUBLISHER = ("publisher/publisher.py", "orders.new")


def example(text: str) -> str:
    """Return the example with some text in it, from the README or the docs."""
    (found,) = (block for block in re.findall(r"^```\w+\n(.*?)^```", DOCS, re.M | re.S) if text in block)
    return str(found)


def environment(**env: str) -> dict[str, str]:
    """Return the environment of a test's processes, without the developer's own settings."""
    own = ("NATS_", "PYTHONUNBUFFERED")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**inherited, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **env}


class Script:
    """A running process and the lines that it has written so far."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.times: list[float] = []  # when each line was read, by the loop's clock
        self._changed = asyncio.Condition()
        self._ended = False
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            async with self._changed:
                self.lines.append(line.decode().rstrip("\n"))
                self.times.append(asyncio.get_running_loop().time())
                self._changed.notify_all()
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    def found(self, pattern: str) -> list[str]:
        """Return the first group, or all but the time stamp, of each line that matches."""
        matches = (re.fullmatch(rf"(?:[\d/]+ [\d:]+ )?({pattern})", line) for line in self.lines)
        return [match[min(2, match.re.groups)] for match in matches if match]

    async def line(self, pattern: str, count: int = 1) -> str:
        """Wait for the count-th line that matches, and return it."""
        try:
            async with asyncio.timeout(PATIENCE), self._changed:
                while len(self.found(pattern)) < count and not self._ended:
                    await self._changed.wait()
        except TimeoutError:
            pass
        assert len(self.found(pattern)) >= count, f"no {pattern!r} in:\n" + "\n".join(self.lines)
        return self.found(pattern)[count - 1]

    async def ended(self) -> int:
        """Wait until the process has ended, however long that takes, and return its exit status."""
        await self._reading
        return await self.process.wait()

    async def status(self) -> int:
        """Wait until the process has ended and return its exit status."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self.ended()
        except TimeoutError:
            raise AssertionError("it doesn't end:\n" + "\n".join(self.lines)) from None

    async def stop(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(signum)
        return await self.status()

    @property
    def messages(self) -> list[str]:
        """The lines without their time stamps."""
        return self.found(r"(.*)")


@asynccontextmanager
async def started(
    *command: str | Path, stdin: Any = asyncio.subprocess.DEVNULL, cwd: str | Path = ROOT, **env: str
) -> AsyncIterator[Script]:
    """Run a process, which doesn't outlive the test."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=PIPE,
        stderr=STDOUT,
        cwd=cwd,
        env=environment(**env),
        limit=2**24,  # bytes of the longest line
    )
    try:
        script = Script(process)
        yield script
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def unread(server: "Server", *command: str, stderr: int = PIPE) -> AsyncIterator[tuple[Process, BinaryIO]]:
    """Run a Python script whose output nobody reads, until the test does; the process doesn't outlive it."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 0) as pipe:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *command), cwd=ROOT, env=environment(NATS_URL=server.url), stdout=writing, stderr=stderr
        )
        os.close(writing)
        try:
            yield process, pipe
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """Listen and say nothing; the block gets the URL."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1")
    async with server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def advisory(stream_seq: object = 1, **fields: object) -> bytes:
    """Return the part of a server's advisory that is read, of a dead letter in orders_stream."""
    good = {"stream": "orders_stream", "consumer": "processor", "stream_seq": stream_seq, "deliveries": 2}
    return json.dumps(good | fields).encode()


class Server:
    """A nats-server with its own directory and port, both kept over a restart."""

    def __init__(self, directory: Path, config: str = "", jetstream: bool = True, port: int = -1) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.port = port
        self.monitoring = ""
        self.process: Process | None = None
        self._config = directory / "server.conf"
        self._store = f"jetstream {{ store_dir: {json.dumps(str(directory / 'store'))} }}" if jetstream else ""
        self.configure(config)

    def configure(self, config: str) -> None:
        """Write the configuration, and let a running server reload it."""
        self._config.write_text(f"{config}\n{self._store}\n")
        if self.process:
            self.process.send_signal(signal.SIGHUP)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start the server and wait until it takes connections."""
        for file in self.directory.glob("*.ports"):
            file.unlink()
        self.process = await asyncio.create_subprocess_exec(
            *(
                NATS_SERVER,
                "--config",
                self._config,
                "--addr",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--http_port",
                "-1",
            ),
            *("--ports_file_dir", self.directory, "--log", self.directory / "log"),
            stderr=PIPE,
        )
        async with asyncio.timeout(PATIENCE):
            while not any(file.read_text() for file in self.directory.glob("*.ports")):
                assert self.process.returncode is None, (self.directory / "log").read_text()
                await asyncio.sleep(0.02)
        (file,) = self.directory.glob("*.ports")
        ports = json.loads(file.read_text())
        self.port = int(re.findall(r":(\d+)", ports["nats"][0])[0])
        self.monitoring = ports["monitoring"][0]

    async def stop(self, signum: int = signal.SIGTERM) -> None:
        """End the server by a signal; SIGKILL is a crash."""
        if self.process and self.process.returncode is None:
            self.process.send_signal(signum)
        if self.process:
            await self.process.wait()

    async def restart(self, signum: int = signal.SIGKILL) -> None:
        """End the server by a signal and start it again."""
        await self.stop(signum)
        await self.start()

    @asynccontextmanager
    async def script(self, *command: str, stdin: Any = asyncio.subprocess.DEVNULL, **env: str) -> AsyncIterator[Script]:
        """Run one of the project's Python scripts on this server."""
        async with started(sys.executable, *command, stdin=stdin, **{"NATS_URL": self.url, **env}) as script:
            yield script

    async def run(self, *command: str | Path, **env: str) -> Script:
        """Run a command on this server until it ends; a .py file is run by Python."""
        program = (sys.executable,) if str(command[0]).endswith(".py") else ()
        async with started(*program, *command, **{"NATS_URL": self.url, **env}) as script:
            await script.status()
            return script

    async def create_streams(self, **env: str) -> None:
        """Create both streams with the project's shell scripts."""
        for stream in ("orders_stream", "orders_unprocessed"):
            created = await self.run(f"scripts/create_{stream}.sh", **env)
            assert created.process.returncode == 0, created.lines

    async def connection_names(self) -> set[str]:
        """Return the names of the connections, as the server's monitoring tells them."""
        answer = await asyncio.to_thread(urllib.request.urlopen, f"{self.monitoring}/connz")
        return {connection.get("name", "") for connection in json.load(answer)["connections"]}

    async def is_healthy(self) -> bool:
        """Return whether the server takes connections and has all of its streams and consumers."""
        try:
            answer = await asyncio.to_thread(urllib.request.urlopen, f"{self.monitoring}/healthz")
        except OSError:
            return False
        healthy: bool = json.load(answer)["status"] == "ok"
        return healthy

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """Connect to this server."""
        nc = await nats.connect(self.url)
        try:
            yield nc
        finally:
            await nc.close()


def knows_acks_of_version_2() -> bool:
    """Return whether the nats-server that is tested knows the feature flag."""
    answer = subprocess.run([NATS_SERVER, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.findall(r"v(\d+)\.(\d+)", answer)[0]
    return (int(major), int(minor)) >= (2, 14)


def edited(script: str, code: str, directory: Path) -> str:
    """Return a copy of a script into which a user has put some code: what has a name that is there replaces that."""
    lines = (ROOT / script).read_text().splitlines(keepends=True)
    places = {name: node for node in ast.parse("".join(lines)).body for name in _names(node)}
    added, replaced = [], []
    for node in ast.parse(code).body:
        place = next((places[name] for name in _names(node) if name in places), None)
        source = ast.get_source_segment(code, node) or ""
        replaced.append((place, source)) if place else added.append(source)
    for place, source in sorted(replaced, key=lambda one: -one[0].lineno):
        lines[place.lineno - 1 : place.end_lineno] = [source + "\n"]
    first = min(node.lineno for node in places.values())  # after the imports
    lines.insert(first - 1, "\n\n".join([*added, ""]))
    copy = directory / Path(script).name
    copy.write_text("".join(lines))
    return str(copy)


def _names(node: ast.stmt) -> list[str]:
    """Return what a statement at the top of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def with_body(script: str, function: str, body: str, directory: Path) -> str:
    """Return a copy of a script in which a function has another body."""
    (directory / function).mkdir(exist_ok=True)
    return edited(
        script, f"import asyncio\n\n\nasync def {function}(order: Msg) -> None:\n    {body}", directory / function
    )


def waiting(go: Path) -> str:
    """Return the code that waits until there is a file."""
    return f"while not __import__('pathlib').Path({str(go)!r}).exists():\n        await asyncio.sleep(0.05)"


async def request(nc: Client, subject: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what the JetStream API answers, as it is on the wire."""
    answer = await nc.request(f"$JS.API.{subject}", json.dumps(payload).encode() if payload else b"", timeout=5)
    decoded: dict[str, Any] = json.loads(answer.data)
    return decoded


async def state(nc: Client, stream: str) -> dict[str, int]:
    """Return the state of a stream."""
    found: dict[str, int] = (await request(nc, f"STREAM.INFO.{stream}"))["state"]
    return found


async def messages(nc: Client, stream: str) -> int:
    """Return how many messages are in a stream."""
    return (await state(nc, stream))["messages"]


async def has_pull_request(nc: Client, stream: str, durable: str) -> bool:
    """Return whether a durable is there and somebody asks it for messages."""
    return bool((await request(nc, f"CONSUMER.INFO.{stream}.{durable}")).get("num_waiting"))


async def holds(nc: Client, stream: str, count: int) -> bool:
    """Return whether a stream has so many messages."""
    return await messages(nc, stream) == count


@asynccontextmanager
async def serving(directory: Path, config: str = "", jetstream: bool = True) -> AsyncIterator[Server]:
    """Run a nats-server with a configuration of its own."""
    server = Server(directory, config, jetstream)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, and that the system gives nobody who asks for any port."""
    ports: list[int] = []
    for port in random.sample(range(10_000, 32_768), 1000):
        with socket.socket() as one, suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nats-server does
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("there are no free ports")


class Cluster(Server):
    """Three servers, seen as one: the scripts get all three URLs."""

    def __init__(self, directory: Path) -> None:
        ports = free_ports(6)
        routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports[:3])
        self.servers = {
            f"n{i}": Server(
                directory / f"n{i}",
                f"server_name: n{i}\ncluster {{ name: c, listen: 127.0.0.1:{ports[i]}, routes: [{routes}] }}",
                port=ports[3 + i],
            )
            for i in range(3)
        }

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers.values())

    async def start(self) -> None:
        for server in self.servers.values():  # all at once, 2.10 was seen to never have peers
            await server.start()
        await until(self.is_healthy)

    async def stop(self, signum: int = signal.SIGTERM) -> None:
        for server in self.servers.values():
            await server.stop(signum)

    async def is_healthy(self) -> bool:
        return all([await server.is_healthy() for server in self.servers.values()])

    async def leader(self, nc: Client, stream: str) -> Server:
        """Wait until a stream has a leader and return that server."""
        name = ""

        async def is_there() -> bool:
            nonlocal name
            name = (await request(nc, f"STREAM.INFO.{stream}")).get("cluster", {}).get("leader", "")
            return bool(name)

        await until(is_there)
        return self.servers[name]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        nc = await nats.connect(self.url.split(","), max_reconnect_attempts=-1, reconnect_time_wait=0.2)
        try:
            yield nc
        finally:
            await nc.close()


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """Wait until a condition holds; a server that doesn't answer is asked again."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with suppress(nats.errors.Error):
                answer = condition()
                if answer if isinstance(answer, bool) else await answer:
                    break
            await asyncio.sleep(0.05)


async def pull(nc: Client, stream: str, durable: str, batch: int) -> Subscription:
    """Have messages delivered to a subscription that acknowledges none."""
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox)
    request = json.dumps({"batch": batch, "expires": 30 * 10**9}).encode()
    await nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}", request, reply=inbox)
    return subscription


@asynccontextmanager
async def clustered(directory: Path) -> AsyncIterator[tuple[Cluster, Client]]:
    """Run three nats-servers with both streams on three replicas, whose leaders take orders."""
    cluster = Cluster(directory)

    async def has_peers() -> bool:
        """A healthy server may not know of the other two yet, and then finds no place for a stream's replicas."""
        created = await cluster.run("scripts/create_orders_stream.sh", REPLICAS="3")
        return created.process.returncode == 0

    async def takes_orders() -> bool:
        with suppress(BadRequestError):  # a leader refuses this one; without one there is no answer
            await nc.jetstream().publish("orders.new", stream="another")
            return False
        return True

    try:
        await cluster.start()
        await until(has_peers)
        await cluster.create_streams(REPLICAS="3")
        async with cluster.client() as nc:
            await until(takes_orders)
            yield cluster, nc
    finally:
        await cluster.stop()


async def durable_info(nc: Client, stream: str, durable: str) -> dict[str, Any]:
    """Wait until the durable is there and return what the server says of it."""
    info: dict[str, Any] = {}

    async def is_there() -> bool:
        nonlocal info
        info = await request(nc, f"CONSUMER.INFO.{stream}.{durable}")
        return "error" not in info

    await until(is_there)
    return info


async def has_in_flight(nc: Client, count: int) -> bool:
    """Return whether so many orders are in flight or wait for a retry."""
    in_flight: int = (await durable_info(nc, "orders_stream", "processor"))["num_ack_pending"]
    return in_flight == count


async def emptied(nc: Client, *streams: str) -> None:
    """Wait until the streams are empty."""

    async def are_empty() -> bool:
        return not any([await messages(nc, stream) for stream in streams])

    await until(are_empty)


async def publish(nc: Client, *orders: bytes, subject: str = "orders.new", **headers: str) -> None:
    """Publish orders with nats-py alone."""
    js = nc.jetstream()
    pending = [await js.publish_async(subject, order, headers=headers or None) for order in orders]
    await asyncio.gather(*pending)


async def dead_letters(
    nc: Client,
    *orders: bytes,
    durable: str = "processor",
    backoff: float = 0.1,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Publish orders and let each be delivered twice without an ack, by a durable of the article's kind."""
    js = nc.jetstream()
    before = (await state(nc, "orders_unprocessed"))["last_seq"]
    await publish(nc, *orders, **(headers or {}))
    config = ConsumerConfig(
        name=durable,
        durable_name=durable,
        backoff=[backoff],
        max_deliver=2,
        filter_subject="orders.*",
        ack_policy=AckPolicy.EXPLICIT,
    )
    await js.add_consumer("orders_stream", config)
    # The server notices that an order is dead when it would deliver it to a pull request once more.
    subscription = await pull(nc, "orders_stream", durable, 2 * len(orders) + 1)

    async def are_dead() -> bool:
        return (await state(nc, "orders_unprocessed"))["last_seq"] >= before + len(orders)

    await until(are_dead)
    await subscription.unsubscribe()
