"""Break the whole queue at random, round after round, and account for every order.

Usage:
    python tests/nemesis.py [--seed N] [--rounds N | --minutes M] [--calm | --wild]

In a calm round all is done gracefully, and no order may be done twice. In a wild round anything happens. Each round has
a seed of its own, which repeats its environment and its faults: `--seed S --rounds 1`.
"""

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nats
from nats.aio.client import Client
from nats.errors import Error

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.account import Account
from tests.faults import MANAGE, Faults
from tests.harness import (
    CONSUMER,
    DLQ,
    PUBLISHER,
    Cluster,
    Server,
    clustered,
    messages,
    publish,
    serving,
    until,
    with_body,
)
from tests.process_group import STREAMS, process_group
from tests.proxy import linked

SECONDS = 30.0  # of faults in a round
DRAIN_TIME = 180.0  # seconds after the faults, in which all orders are settled
BACKLOG_AGE = 6.0  # seconds, more than the ack wait
RUN = 200  # orders of one run of a publisher

Scripts = tuple[tuple[str, ...], tuple[str, ...]]

FAILURE = 'random.choice([Retry(), Retry("busy", delay=1.0), Dead("no such customer")])'
WORK = """import random
    import time
    from jobqueue import Dead, Retry
    name = order.data.decode()
    log.info("begun %s at %f", name, time.monotonic())
    await asyncio.sleep(min(random.expovariate(1 / {work_time}), 8))
    if random.random() < {failure_rate}:
        log.info("failed %s at %f", name, time.monotonic())
        raise {error}
    log.info("done %s at %f", name, time.monotonic())"""


@dataclass(frozen=True)
class Environment:
    """What runs in a round."""

    is_calm: bool
    replicas: int
    consumers: int
    dlq_processors: int
    publishers: int
    concurrency: int
    work_time: float  # seconds, on average
    failure_rate: float
    orders: int
    backlog: int  # orders that wait for the consumers, and are part of them
    has_link_each: bool  # or all processes have the same one

    @classmethod
    def drawn(cls, rng: random.Random, kind: str, seconds: float) -> "Environment":
        drawn = rng.choice(["calm", "wild"])  # always, so that a kind of one's own changes nothing else
        is_calm = (kind or drawn) == "calm"
        replicas, consumers, concurrency = rng.choice([1, 3]), rng.randint(2, 4), rng.choice([1, 4, 16, 40])
        work_time = rng.uniform(0.02, 0.04 * concurrency)
        capacity = seconds * consumers * concurrency / (work_time + 0.02)  # orders
        orders = int(min(rng.uniform(400, 1200), 0.4 * capacity))
        backlog = int(min(2500, 0.4 * capacity))
        has_backlog = replicas == 3 and (is_calm or rng.random() < 0.5)
        return cls(
            is_calm=is_calm,
            replicas=replicas,
            consumers=consumers,
            dlq_processors=rng.randint(1, 2),
            publishers=rng.randint(1, 2),
            concurrency=concurrency,
            work_time=work_time,
            failure_rate=rng.choice([0, 0.1, rng.uniform(0, 0.2)]),
            orders=orders + (backlog if has_backlog else 0),
            backlog=backlog if has_backlog else 0,
            has_link_each=rng.random() < 0.7,
        )

    def __str__(self) -> str:
        return (
            f"{'calm' if self.is_calm else 'wild'}, {self.replicas} replicas, {self.consumers} consumers"
            f" x {self.concurrency}, work {self.work_time:.2f} s, {self.failure_rate:.0%} fail,"
            f" {self.dlq_processors} DLQ processors, {self.publishers} publishers, backlog {self.backlog},"
            f" {'a link each' if self.has_link_each else 'one link'}"
        )


class Round:
    """The parts of a round."""

    def __init__(self, seed: int, env: Environment, directory: Path, faults: Faults) -> None:
        self.seed = seed
        self.env = env
        self.directory = directory
        self.faults = faults
        self.nc = faults.nc
        self.group = faults.group

    async def play(self, stack: AsyncExitStack, scripts: Scripts, seconds: float) -> Account:
        """Publish, consume and break things at the same time, then repair all and make the account."""
        env, books = self.env, self.faults.books
        names = [f"order-{i}" for i in range(env.orders)]
        books.sent |= set(names)
        if env.backlog:
            await publish(self.nc, *(name.encode() for name in names[: env.backlog]))
            books.published |= set(names[: env.backlog])
            await asyncio.sleep(BACKLOG_AGE)
        consumer, dlq = scripts
        for _ in range(env.consumers):
            await self.group.start(*consumer, "--concurrency", str(env.concurrency), url=await self._url(stack))
        for _ in range(env.dlq_processors - 1):
            await self.group.start(*dlq, url=await self._url(stack))
        rest = names[env.backlog :]
        shares = [rest[i :: env.publishers] for i in range(env.publishers)]
        interval = 0.8 * seconds / max(map(len, shares))
        urls = [await self._url(stack) for _ in shares]
        async with asyncio.TaskGroup() as tasks:
            for url, share in zip(urls, shares, strict=True):
                tasks.create_task(self._publish(share, interval, url))
            tasks.create_task(self.faults.cause(self.seed, seconds))
        await self.faults.repair()
        stuck = await self._drained()
        await until(self._is_complete)
        await self.group.stop()
        account = books.account()
        account.problems += stuck
        return account

    async def _url(self, stack: AsyncExitStack) -> str:
        """Return the URL of a process's own link, or of the one of all of them."""
        if self.env.has_link_each:
            self.faults.links.append(await stack.enter_async_context(linked(*ports(self.faults.server))))
        return self.faults.links[-1].url

    async def _publish(self, names: Sequence[str], interval: float, url: str) -> None:
        """Publish the orders by one run after the other, and note what the publisher has logged."""
        file = self.directory / names[0]
        while names:
            run = names[:RUN]
            file.write_text("".join(f"{name}\n" for name in run))
            command = (*PUBLISHER, "--input", "-", "--interval", f"{interval:.4f}")
            with file.open() as lines:
                async with self.group.member(*command, url=url, stdin=lines) as script:
                    await script.ended()
            self.faults.books.published |= {run[int(number)] for number in script.found(r"published order no\. (\d+)")}
            if not script.found("cannot connect to .*"):
                names = names[RUN:]

    async def _is_complete(self) -> bool:
        return len(self.group.running) == self.env.consumers + self.env.dlq_processors

    async def _drained(self) -> list[str]:
        """Wait until both streams are empty, and return what is left if they don't get there."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIME):
                while True:
                    with suppress(Error, KeyError):  # without a leader there is no state
                        if not any([await messages(self.nc, stream) for stream in STREAMS]):
                            return []
                    await asyncio.sleep(0.1)
        told = [await self.faults.server.run(*MANAGE, command) for command in ("status", "list")]
        return ["\n".join(["stuck:", *(line for script in told for line in script.lines)])]


def ports(server: Server) -> list[int]:
    """Return the ports of one server or three."""
    return [one.port for one in server.servers.values()] if isinstance(server, Cluster) else [server.port]


def working(env: Environment, directory: Path) -> Scripts:
    """Return the commands of a consumer and of a DLQ processor that log what they do, and fail at times."""
    work = {"work_time": env.work_time, "failure_rate": env.failure_rate}
    consumer = with_body("consumer/consumer.py", "process", WORK.format(error=FAILURE, **work), directory)
    dlq = with_body("dlq/consumer.py", "reprocess", WORK.format(error="ConnectionError", **work), directory)
    return (consumer, *CONSUMER[1:]), (dlq, *DLQ[1:], "--concurrency", "4")


@asynccontextmanager
async def running(replicas: int, directory: Path) -> AsyncIterator[tuple[Server, Client]]:
    """Run one server or three, with both streams."""
    if replicas == 3:
        async with clustered(directory) as (cluster, nc):
            yield cluster, nc
        return
    async with serving(directory) as server:
        await server.create_streams()
        nc = await nats.connect(server.url, max_reconnect_attempts=-1, reconnect_time_wait=0.2)
        try:
            yield server, nc
        finally:
            await nc.close()


async def play(seed: int, kind: str = "", seconds: float = SECONDS) -> Account:
    """Play a round, calm or wild as its seed has it unless that is given, and print a line of it."""
    began = time.monotonic()
    env = Environment.drawn(random.Random(seed), kind, seconds)
    faults: Counter[str] = Counter()
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        consumer, dlq = working(env, directory)
        try:
            async with AsyncExitStack() as stack:
                server, nc = await stack.enter_async_context(running(env.replicas, directory))
                link = await stack.enter_async_context(linked(*ports(server)))
                group = await stack.enter_async_context(process_group(server, 0, dlq=dlq, url=link.url))
                causing = Faults(server, nc, group, [link], is_calm=env.is_calm)
                faults = causing.tally
                account = await Round(seed, env, directory, causing).play(stack, (consumer, dlq), seconds)
        except (Exception, ExceptionGroup) as error:
            account = Account(problems=[f"it ended with {error!r}"])
            logging.exception("seed %d", seed)
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(faults.items()))
    print(f"seed {seed}: {env}; {told}; {account} ({time.monotonic() - began:.0f} s)", flush=True)
    for problem in account.problems:
        print(problem, flush=True)
    return account


async def play_all(seed: int, rounds: int, minutes: float, kind: str) -> int:
    """Play rounds, print the account of all of them, and return the exit status."""
    ends_at = time.monotonic() + 60 * minutes
    total, failed, count = Account(), [], 0
    while count < rounds if rounds else time.monotonic() < ends_at:
        account = await play(seed + count, kind)
        total.orders += account.orders
        total.done += account.done
        total.reprocessed += account.reprocessed
        total.causes += account.causes
        total.problems += account.problems
        failed += [seed + count] if account.problems else []
        count += 1
    print(f"{count} rounds: {total}; failed seeds: {failed}")
    return 1 if failed else 0


def main() -> None:
    """Run the rounds that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the first round; the next has +1")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=int, default=0, help="how many")
    length.add_argument("--minutes", type=float, default=5, help="after which no new round begins (default: 5)")
    kinds = parser.add_mutually_exclusive_group()
    for kind in ("calm", "wild"):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, default="")
    options = parser.parse_args()
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # its connection is lost again and again
    sys.exit(asyncio.run(play_all(options.seed, options.rounds, options.minutes, options.kind)))


if __name__ == "__main__":
    main()
