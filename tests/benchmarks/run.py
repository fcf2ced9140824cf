"""Measure the queue and its rivals in one run, and write RESULTS.md and results.svg beside this file.

Every round runs one after the other all that is compared; a figure is the median of the rounds.

Usage:
    ./scripts/benchmark.sh [--rounds 3] [SECTION ...]
"""

import argparse
import asyncio
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
from nats.aio.client import Client
from nats.errors import Error
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from tests.harness import BIN, CONSUMER, DLQ, PUBLISHER, ROOT, Server, clustered, environment, request, serving
from tests.proxy import proxied

HERE = Path(__file__).parent
QUEUE, QUEUE_ASYNCIO = "this queue, with uvloop", "this queue, with asyncio"
NATSIO = os.environ.get("NATSIO_PYTHON", "")  # a Python that has natsio, which needs 3.13 or later
EMPTY, TEN_MS, HUNDRED_MS = 0.0, 0.01, 0.1
EMPTY_ORDERS = "20,000 empty orders, one process, concurrency 64: orders/s"
TEN_MS_ORDERS = "orders of 10 ms, one process: orders/s"
PUBLISHED = "publishing 60,000 orders: orders/s"
FAR = "orders of 100 ms, through a slow network: share of what the work allows"
REPLICATED = "three replicas, all on this machine, one process: orders/s"
IDLE_PROCESSES = "10 idle processes of concurrency 100"
IDLE = ("--failure-rate", "0", "--work-time", "0")
SECTIONS = [
    *("empty", "ten_ms", "processes", "publishing", "latency"),
    *("growth", "growth_of_dead_letters", "round_trips", "replicas", "idle"),
]
# Runs a script without some modules: aiohttp is there for taskiq, and nats-py takes it up wherever it is.
WITHOUT = (
    "import sys, runpy; sys.modules.update(dict.fromkeys(sys.argv[1].split(','))); sys.argv = sys.argv[2:];"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


class Drain:
    """What one drain has shown, from a tenth of it on: orders a second, and the processes' peak MB and µs an order."""

    def __init__(self, rate: float, first: float, memory: float, cpu: float, twice: int) -> None:
        self.rate, self.first, self.memory, self.cpu, self.twice = rate, first, memory, cpu, twice


def script(*command: str, uvloop: bool = True) -> list[str]:
    """Return the command that runs one of the project's scripts as it is installed by default, or with uvloop."""
    return [sys.executable, "-c", WITHOUT, "aiohttp" if uvloop else "aiohttp,uvloop", *command]


def worker(who: str, concurrency: int, work_time: float) -> tuple[list[str], str, str]:
    """Return the command of a worker, and the stream and the durable that it takes."""
    ours = [*CONSUMER, "--failure-rate", "0", "--concurrency", str(concurrency), "--work-time", str(work_time)]
    if who == QUEUE:
        return script(*ours), "orders_stream", "processor"
    if who == QUEUE_ASYNCIO:
        return script(*ours, uvloop=False), "orders_stream", "processor"
    if who == "natsio":
        rival = [NATSIO, str(HERE / "natsio_rival.py"), "consume", str(concurrency), str(work_time)]
        return rival, "orders_stream", "processor"
    stream, durable = ("taskiq", "taskiq") if who == "taskiq-nats" else ("orders_stream", "processor")
    command = [sys.executable, "-m", "tests.benchmarks.rivals", who.removesuffix("-nats").lower()]
    return [*command, str(concurrency), str(work_time)], stream, durable


async def fill(nc: Client, count: int) -> None:
    """Put orders into orders_stream."""
    js = nc.jetstream()
    for first in range(0, count, 2000):
        last = min(first + 2000, count)
        await asyncio.gather(*[await js.publish_async("orders.new", b"order-%d" % i) for i in range(first, last)])


async def fill_for(who: str, server: Server, nc: Client, count: int) -> None:
    """Put orders where a worker takes them."""
    if who == "taskiq-nats":
        filled = await server.run(sys.executable, "-m", "tests.benchmarks.rivals", "enqueue", str(count))
        assert filled.process.returncode == 0, filled.lines
    else:
        await fill(nc, count)


@asynccontextmanager
async def running(
    command: list[str], url: str, count: int = 1, received: int = 0
) -> AsyncIterator[list[psutil.Process]]:
    """Run some of the same process, whose log goes to a file, and check that it has done what it is measured for."""
    with tempfile.TemporaryFile() as log:
        env = environment(NATS_URL=url, PYTHONPATH=str(ROOT))
        processes = [
            await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            for _ in range(count)
        ]
        try:
            yield [psutil.Process(one.pid) for one in processes]
        finally:
            for one in processes:
                with suppress(ProcessLookupError, psutil.NoSuchProcess):
                    children = psutil.Process(one.pid).children(recursive=True)
                    one.terminate()
                    try:
                        await asyncio.wait_for(one.wait(), 15)
                    except TimeoutError:
                        one.kill()
                    for child in children:
                        with suppress(psutil.NoSuchProcess):
                            child.kill()
                await one.wait()
        log.seek(0)
        assert log.read().count(b"received ") >= received, "not all of the work was done"


def used(processes: list[psutil.Process]) -> tuple[float, float]:
    """Return the memory (MB) and the CPU time (s) of processes and their children."""
    memory = cpu = 0.0
    for top in processes:
        with suppress(psutil.NoSuchProcess):
            for one in [top, *top.children(recursive=True)]:
                memory += one.memory_info().rss / 1e6
                cpu += sum(one.cpu_times()[:2])
    return memory, cpu


async def bench(server: Server, nc: Client, *arguments: str) -> float:
    """Return what natscli's own benchmark says of itself: messages a second."""
    options = ["--consumer=processor", "--filter=orders.*"]
    if "pub" in arguments:
        options = ["orders.new", "--size=10"]
    else:
        config = ConsumerConfig(durable_name="processor", filter_subject="orders.*", ack_policy=AckPolicy.EXPLICIT)
        await nc.jetstream().add_consumer("orders_stream", config)
    natscli = await server.run("nats", "bench", "js", *arguments, *options, "--stream=orders_stream", "--no-progress")
    (rate,) = re.findall(r"stats: ([\d,]+) msgs/sec", "\n".join(natscli.lines))
    return float(rate.replace(",", ""))


async def drain(
    nc: Client,
    url: str,
    who: str,
    waiting: int,
    concurrency: int,
    work_time: float,
    *,
    processes: int = 1,
    count: int | None = None,
) -> Drain:
    """Let workers take what is waiting, or the first `count` of it, and tell how they did."""
    command, stream, durable = worker(who, concurrency, work_time)
    if durable == "processor":
        await nc.jetstream().add_consumer(
            stream,
            ConsumerConfig(
                durable_name=durable,
                name=durable,
                filter_subject="orders.*",
                ack_policy=AckPolicy.EXPLICIT,
                **({} if who.startswith("this queue") else {"ack_wait": 30}),  # type: ignore[arg-type]
            ),
        )
    count = count or waiting
    began = time.perf_counter()
    first = done = 0
    begun = started = memory = cpu = cpu_at_first = 0.0
    async with running(command, url, processes, count) as workers:
        while done < count:
            await asyncio.sleep(0.01 if waiting < 5000 else 0.05)
            with suppress(NotFoundError, Error):
                info = await request(nc, f"CONSUMER.INFO.{stream}.{durable}")
                done = waiting - info["num_pending"] - info["num_ack_pending"]
                memory_now, cpu = used(workers)
                memory = max(memory, memory_now)
                begun = begun or (time.perf_counter() if done else 0.0)
                if done > count / 10 and not first:
                    first, started, cpu_at_first = done, time.perf_counter(), cpu
        ended = time.perf_counter()
    twice = info["num_redelivered"]
    await nc.jetstream().delete_consumer(stream, durable)
    await request(nc, f"STREAM.PURGE.{stream}")
    return Drain(
        (done - first) / (ended - started), begun - began, memory, (cpu - cpu_at_first) / (done - first) * 1e6, twice
    )


class Benchmark:
    """The sections, and what they have measured so far: by table, row and column, the values of each round."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.tables: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        self.twice = 0

    def note(self, table: str, row: str, column: str, value: float) -> None:
        """Keep a value, and show that it goes on."""
        self.tables[table][row][column].append(value)
        print(f"{table} | {row} | {column} | {value:.4g}", flush=True)

    def figure(self, table: str, row: str, column: str) -> float:
        """Return the median of the rounds."""
        return statistics.median(self.tables[table][row][column])

    def note_drain(self, table: str, row: str, column: str, found: Drain, *more: str) -> None:
        """Keep the rate of a drain, and what else is asked for."""
        self.note(table, row, column, found.rate)
        for what, value in {
            "MB": found.memory,
            "µs of CPU an order": found.cpu,
            "s to the first order": found.first,
        }.items():
            if what in more:
                self.note(table, row, what, value)
        if row.startswith("this queue"):
            self.twice += found.twice

    @asynccontextmanager
    async def queue(self) -> AsyncIterator[tuple[Server, Client]]:
        """Run a server with both streams."""
        with tempfile.TemporaryDirectory() as directory:
            async with serving(Path(directory)) as server:
                await server.create_streams()
                async with server.client() as nc:
                    yield server, nc

    async def empty(self) -> None:
        """20,000 empty orders, one process."""
        more = ("MB", "µs of CPU an order", "s to the first order")
        rivals = [QUEUE, QUEUE_ASYNCIO, *(["natsio"] if NATSIO else []), "nats-py", "taskiq-nats", "FastStream"]
        for _ in range(self.rounds):
            for who in rivals:
                async with self.queue() as (server, nc):
                    await fill_for(who, server, nc, 20_000)
                    found = await drain(nc, server.url, who, 20_000, 64, EMPTY)
                    self.note_drain(EMPTY_ORDERS, who, "orders/s", found, *more)
            for ack in ("--no-doubleack", "--doubleack"):
                async with self.queue() as (server, nc):
                    await fill(nc, 20_000)
                    rate = await bench(server, nc, "consume", "--msgs=20000", ack)
                    self.note(EMPTY_ORDERS, f"nats bench js consume {ack}", "orders/s", rate)

    async def ten_ms(self) -> None:
        """Orders of 10 ms at several concurrencies."""
        for _ in range(self.rounds):
            for concurrency, count in ((1, 500), (16, 4000), (128, 20_000)):
                for who in [QUEUE, QUEUE_ASYNCIO, "taskiq-nats"]:
                    async with self.queue() as (server, nc):
                        await fill_for(who, server, nc, count)
                        found = await drain(nc, server.url, who, count, concurrency, TEN_MS)
                        self.note_drain(TEN_MS_ORDERS, who, f"concurrency {concurrency}", found)
            async with self.queue() as (server, nc):
                await fill(nc, 500)
                rate = await bench(server, nc, "consume", "--msgs=500", "--sleep=10ms", "--doubleack")
                self.note(TEN_MS_ORDERS, "nats bench js consume", "concurrency 1", rate)
            sleeps = await asyncio.to_thread(subprocess.check_output, [sys.executable, "-c", SLEEPS])
            for concurrency in (1, 16, 128):
                row = "the limit: sleeps of 10 ms, without a queue"
                self.note(TEN_MS_ORDERS, row, f"concurrency {concurrency}", concurrency * float(sleeps))

    async def processes(self) -> None:
        """One, two and four processes."""
        table = "orders of 10 ms, concurrency 1: orders/s"
        for _ in range(self.rounds):
            for count in (1, 2, 4):
                async with self.queue() as (server, nc):
                    await fill(nc, 800 * count)
                    found = await drain(nc, server.url, QUEUE, 800 * count, 1, TEN_MS, processes=count)
                    self.note_drain(table, QUEUE, f"processes: {count}", found)

    async def publishing(self) -> None:
        """60,000 orders to publish."""
        count = 60_000
        ours = [*PUBLISHER, "--count", str(count), "--interval"]
        ways = {
            f"{QUEUE}, pipelined": script(*ours, "0"),
            f"{QUEUE_ASYNCIO}, pipelined": script(*ours, "0", uvloop=False),
            f"{QUEUE}, one by one": script(*PUBLISHER, "--count", "10000", "--interval", "0.000001"),
        }
        if NATSIO:
            ways["natsio's publish_async"] = [NATSIO, str(HERE / "natsio_rival.py"), "publish", str(count)]
        for _ in range(self.rounds):
            for who, command in ways.items():
                wanted = 10_000 if "one by one" in who else count
                async with self.queue() as (server, nc):
                    first = last = 0.0
                    stored = 0
                    async with running(command, server.url):
                        while stored < wanted:
                            await asyncio.sleep(0.02)
                            stored = (await nc.jetstream().stream_info("orders_stream")).state.messages
                            last = time.perf_counter()
                            if stored and not first:
                                first, at_first = last, stored
                    self.note(PUBLISHED, who, "orders/s", (stored - at_first) / (last - first))
            for how in ("sync", "async"):
                async with self.queue() as (server, nc):
                    rate = await bench(server, nc, "pub", how, f"--msgs={count if how == 'async' else count // 3}")
                    self.note(PUBLISHED, f"nats bench js pub {how}", "orders/s", rate)

    async def latency(self) -> None:
        """From publish to received."""
        table = "time from publish to received: ms"
        for rate, count in ((1, 15), (200, 1000)):
            async with self.queue() as (server, nc), server.script(*CONSUMER, *IDLE) as consumer:
                await asyncio.sleep(1)
                sent = []
                for i in range(count):
                    sent.append(asyncio.get_running_loop().time())
                    await nc.jetstream().publish("orders.new", b"order-%d" % i)
                    await asyncio.sleep(max(0, sent[0] + (i + 1) / rate - asyncio.get_running_loop().time()))
                await consumer.line("received .*", count)
                times = sorted(1000 * (at - when) for at, when in zip(consumer.times, sent, strict=True))
                self.note(table, f"{rate} orders/s", "median", statistics.median(times))
                self.note(table, f"{rate} orders/s", "99th percentile", times[int(0.99 * (len(times) - 1))])

    async def growth(self) -> None:
        """How it grows with the backlog."""
        table = "waiting orders, empty, concurrency 64"
        for waiting in (1000, 10_000, 100_000, 1_000_000):
            for _ in range(self.rounds if waiting < 1_000_000 else 1):
                async with self.queue() as (server, nc):
                    await fill(nc, waiting)
                    for _ in range(5 if waiting == 1000 else 1):
                        if waiting == 1000:
                            await request(nc, "STREAM.PURGE.orders_stream")
                            await fill(nc, waiting)
                        found = await drain(nc, server.url, QUEUE, waiting, 64, EMPTY, count=min(waiting, 50_000))
                        self.note_drain(table, f"{waiting:,}", "orders/s", found, "MB", "s to the first order")

    async def growth_of_dead_letters(self) -> None:
        """How the DLQ processor grows with the dead letters."""
        table = "dead letters, the first 1,000 of them"
        for dead in (1000, 10_000, 100_000):
            async with self.queue() as (server, nc):
                await fill(nc, dead)
                js = nc.jetstream()
                config = ConsumerConfig(
                    durable_name="processor",
                    ack_policy=AckPolicy.EXPLICIT,
                    ack_wait=1,
                    max_deliver=1,
                    max_ack_pending=-1,
                )
                await js.add_consumer("orders_stream", config)
                subscription = await js.pull_subscribe("", "processor", "orders_stream")
                for _ in range(dead // 500):
                    await subscription.fetch(500)
                # The server notices that they are dead when it would deliver them once more.
                while (await js.stream_info("orders_unprocessed")).state.messages < dead:
                    with suppress(TimeoutError):
                        await subscription.fetch(1, timeout=1)
                began = time.perf_counter()
                async with running(script(*DLQ), server.url) as dlq:
                    left, first_at, memory, left_at_first = dead, 0.0, 0.0, dead
                    while left > dead - 1000:
                        await asyncio.sleep(0.01)
                        left = (await js.stream_info("orders_stream")).state.messages
                        memory = max(memory, used(dlq)[0])
                        if left < dead and not first_at:
                            first_at, left_at_first = time.perf_counter(), left
                    rate = (left_at_first - left) / (time.perf_counter() - first_at)
                self.note(table, f"{dead:,}", "orders/s", rate)
                self.note(table, f"{dead:,}", "MB", memory)
                self.note(table, f"{dead:,}", "s to the first order", first_at - began)

    async def round_trips(self) -> None:
        """Through a proxy that is slow."""
        for _ in range(self.rounds):
            for milliseconds in (20, 100):
                for concurrency in (1, 16, 128, 200):
                    async with self.queue() as (server, nc), proxied(server.port) as proxy:
                        proxy.delay = milliseconds / 2000
                        await fill(nc, 50 * concurrency)
                        found = await drain(nc, proxy.url, QUEUE, 50 * concurrency, concurrency, HUNDRED_MS)
                        found.rate *= HUNDRED_MS / concurrency
                        self.note_drain(FAR, f"concurrency {concurrency}", f"{milliseconds} ms of round trip", found)

    async def replicas(self) -> None:
        """On three replicas."""
        for _ in range(self.rounds):
            for who in (QUEUE, "nats-py"):
                with tempfile.TemporaryDirectory() as directory:
                    async with clustered(Path(directory)) as (cluster, nc):
                        await fill(nc, 10_000)
                        found = await drain(nc, cluster.url, who, 10_000, 64, EMPTY)
                        self.note_drain(REPLICATED, who, "empty, concurrency 64", found)
                        if who == QUEUE:
                            await fill(nc, 300)
                            found = await drain(nc, cluster.url, who, 300, 1, TEN_MS)
                            self.note_drain(REPLICATED, who, "10 ms, concurrency 1", found)

    async def idle(self) -> None:
        """Ten processes that wait for orders."""
        async with self.queue() as (server, nc):
            command = script(*CONSUMER, *IDLE, "--concurrency", "100")
            async with running(command, server.url, 10) as workers:
                await asyncio.sleep(5)
                before = used(workers)[1]
                await asyncio.sleep(20)
                self.note(IDLE_PROCESSES, QUEUE, "% of a core each", (used(workers)[1] - before) / 20 / 10 * 100)
                info = await request(nc, "CONSUMER.INFO.orders_stream.processor")
                self.note(IDLE_PROCESSES, QUEUE, "pull requests at the server, of 512", info["num_waiting"])


SLEEPS = """
import asyncio, time
async def measure():
    began = time.perf_counter()
    for _ in range(300): await asyncio.sleep(0.01)
    print(300 / (time.perf_counter() - began))
asyncio.run(measure())
"""


def ratios(found: Benchmark) -> list[tuple[str, float, str]]:
    """Return what must hold: what, the figure, and what it is to be."""
    limit = "the limit: sleeps of 10 ms, without a queue"
    grown = "waiting orders, empty, concurrency 64"
    many = "orders of 10 ms, concurrency 1: orders/s"
    pipelined, bench_row = f"{QUEUE}, pipelined", "nats bench js pub {}"

    def ratio(table: str, row: str, other: str, column: str = "orders/s") -> float:
        return found.figure(table, row, column) / found.figure(table, other, column)

    figures = [
        ("empty orders, against nats-py by itself", ratio(EMPTY_ORDERS, QUEUE, "nats-py"), "1.9"),
        ("empty orders, against taskiq-nats", ratio(EMPTY_ORDERS, QUEUE, "taskiq-nats"), "3.0"),
        (
            "empty orders on three replicas, against nats-py by itself",
            ratio(REPLICATED, QUEUE, "nats-py", "empty, concurrency 64"),
            "1.6",
        ),
        *(
            (f"10 ms, concurrency {c}, of the limit", ratio(TEN_MS_ORDERS, QUEUE, limit, f"concurrency {c}"), wanted)
            for c, wanted in ((1, "0.97"), (16, "0.97"), (128, "0.92"))
        ),
        *(
            (
                f"100 ms, concurrency {c}, through 100 ms of round trip, of the limit",
                found.figure(FAR, f"concurrency {c}", "100 ms of round trip"),
                "0.9",
            )
            for c in (1, 16, 128, 200)
        ),
        *(
            (
                f"publishing, against `nats bench js pub {how}`",
                ratio(PUBLISHED, pipelined, bench_row.format(how)),
                wanted,
            )
            for how, wanted in (("sync", "4.0"), ("async", "0.28"))
        ),
        (
            "four processes against one",
            found.figure(many, QUEUE, "processes: 4") / found.figure(many, QUEUE, "processes: 1"),
            "3.9",
        ),
        (
            "rate at 1,000,000 waiting against 1,000",
            found.figure(grown, "1,000,000", "orders/s") / found.figure(grown, "1,000", "orders/s"),
            "0.9",
        ),
        ("peak memory at 1,000,000 waiting, MB", found.figure(grown, "1,000,000", "MB"), "at most 35"),
        ("CPU of an idle process, % of a core", found.figure(IDLE_PROCESSES, QUEUE, "% of a core each"), "below 1"),
        ("orders of this queue delivered twice, in all of it", found.twice, "0"),
    ]
    if NATSIO:
        figures.insert(1, ("empty orders, against natsio", ratio(EMPTY_ORDERS, QUEUE, "natsio"), "1.3"))
    return figures


def number(value: float) -> str:
    """Return a figure with about three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def report(found: Benchmark, minutes: float) -> str:
    """Return the results as Markdown."""
    nats_server = subprocess.run([BIN / "nats-server", "--version"], capture_output=True, text=True, check=True).stdout
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    text = [
        "# What the benchmark found",
        "",
        f"`./scripts/benchmark.sh`, {minutes:.0f} minutes, medians of {found.rounds} rounds."
        f" {os.cpu_count()} cores ({cpu[1] if cpu else platform.processor()}),"
        f" {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()} {platform.release()},"
        f" Python {platform.python_version()}, {nats_server.strip()};"
        " everything on this one machine. Figures of two runs differ, the ratios hardly do.",
    ]
    text += ["", "| what | ratio or figure | wanted |", "|---|---|---|"]
    text += [f"| {what} | {value:.3g} | {wanted} |" for what, value, wanted in ratios(found)]
    for table, rows in found.tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        text += [
            "",
            f"## {table[0].upper()}{table[1:]}",
            "",
            "| | " + " | ".join(columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row, values in rows.items():
            cells = (number(statistics.median(values[column])) if values[column] else "" for column in columns)
            text.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def chart(found: Benchmark, file: Path) -> None:
    """Draw what does the same: acks confirmed or ids given, and a log line an order."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmark", "font.family": "sans-serif"})
    drawn = {
        EMPTY_ORDERS: (QUEUE, QUEUE_ASYNCIO, "natsio", "nats-py"),
        REPLICATED: (QUEUE, "nats-py"),
        PUBLISHED: (f"{QUEUE}, pipelined", f"{QUEUE_ASYNCIO}, pipelined", "natsio's publish_async"),
    }
    figure, plots = plt.subplots(len(drawn), figsize=(9, 6.5), layout="constrained", height_ratios=[4, 2, 3])
    for plot, (table, wanted) in zip(plots, drawn.items(), strict=True):
        rows = [row for row in reversed(wanted) if row in found.tables[table]]
        column = "empty, concurrency 64" if table == REPLICATED else "orders/s"
        rates = [found.figure(table, row, column) for row in rows]
        colors = ["#27aae1" if row.startswith("this queue") else "#b0b7bf" for row in rows]
        plot.bar_label(plot.barh(rows, rates, color=colors), fmt="{:,.0f}", padding=3)
        plot.set_title(table, loc="left", fontsize=11)
        plot.set_xlim(0, 1.12 * max(rates))
        plot.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description="Measure the queue and its rivals.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("sections", nargs="*", default=SECTIONS, help="nothing is written unless all of them are run")
    options = parser.parse_args()
    if not NATSIO:
        print("natsio is left out: it needs Python 3.13 or later", flush=True)
    benchmark = Benchmark(options.rounds)
    began = time.monotonic()

    async def run() -> None:
        for section in options.sections:
            await getattr(benchmark, section)()

    asyncio.run(run())
    if options.sections == SECTIONS:
        (HERE / "RESULTS.md").write_text(report(benchmark, (time.monotonic() - began) / 60))
        chart(benchmark, HERE / "results.svg")


if __name__ == "__main__":
    main()
