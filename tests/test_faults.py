"""Break everything that can break, and account for every order: `pytest -m faults [--seed N] [--soak TIMES]`."""

import asyncio
import hashlib
import json
import random
import signal
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path

import hypothesis
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nats.aio.client import Client

from tests.harness import (
    ADVISORIES,
    CONSUMER,
    DLQ,
    PUBLISHER,
    Server,
    clustered,
    dead_letters,
    durable_info,
    emptied,
    holds,
    messages,
    publish,
    request,
    state,
    until,
    with_body,
)
from tests.process_group import begun, process_group, settled
from tests.proxy import proxied

pytestmark = pytest.mark.faults

LOAD = ("--concurrency", "4", "--work-time", "0.02", "--failure-rate", "0.1")


def names(count: int) -> list[str]:
    return [f"order-{i}" for i in range(count)]


async def test_consumers_killed(server: Server, nc: Client, rng: random.Random, soak: int) -> None:
    kills = 20 * soak
    published = names(kills * 100)
    async with process_group(server, 4, *LOAD) as group:
        await publish(nc, *(name.encode() for name in published))
        for _ in range(kills):
            await asyncio.sleep(rng.uniform(0.1, 0.5))
            group.kill(rng)
        print(await settled(nc, group, published))


async def test_dlq_processors_killed(server: Server, nc: Client, rng: random.Random, soak: int, tmp_path: Path) -> None:
    kills = 10 * soak
    published = names(kills * 10)
    await dead_letters(nc, *(name.encode() for name in published))
    slow = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(0.1)", tmp_path)
    async with process_group(server, 0, dlq=(slow, *DLQ[1:])) as group:
        for _ in range(kills):
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            group.kill(rng)
        print(await settled(nc, group, published))


async def test_server_killed(server: Server, rng: random.Random, soak: int) -> None:
    kills = 5 * soak
    published = names(kills * 400)
    publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.002")
    async with process_group(server, 2, *LOAD) as group, server.script(*publisher) as publishing:
        await publishing.line("published .*", 100)
        for _ in range(kills):
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            group.expose(2)  # a server without replicas may forget acks of its last moments
            await server.restart(signal.SIGKILL)
            group.expose(1)  # and what was on its way then
        assert await publishing.status() == 0
        async with server.client() as nc:
            print(await settled(nc, group, published))


async def test_server_in_lame_duck_mode(server: Server, soak: int) -> None:
    published = names(1000 * soak)
    publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.001")
    async with process_group(server, 2, *LOAD) as group, server.script(*publisher) as publishing:
        await publishing.line("published .*", 200)
        await server.restart(signal.SIGUSR2)
        assert await publishing.status() == 0
        async with server.client() as nc:
            print(await settled(nc, group, published))


async def test_leaders_killed(tmp_path: Path, rng: random.Random, soak: int) -> None:
    """No new leader redelivers what was acked; what was in flight it may redeliver, or not know of.

    Every other leader is killed as soon as it is there, before all acks have been repeated. A dead letter that had no
    advisory may have been acknowledged: nats-server has been seen to keep such orders in their stream. And it has been
    seen to remove a dead letter, in 2 of some 100 runs: its advisory came, and the order was gone.
    """
    async with clustered(tmp_path) as (cluster, nc):
        published = names(3000 * soak)
        publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.002")
        many = ("--concurrency", "40", "--work-time", "0.3", "--failure-rate", "0.1")
        async with process_group(cluster, 3, *many) as group, cluster.script(*publisher) as publishing:
            await publishing.line("published .*", 100)
            for kill in range(4 * soak):
                await asyncio.sleep(0 if kill % 2 else rng.uniform(0.5, 2))
                leader = await cluster.leader(nc, "orders_stream")
                group.expose(0.55)  # an order is processed for 0.3 s
                await leader.stop(signal.SIGKILL)
                group.expose(0.25)  # and what was on its way then
                await leader.start()
                await until(cluster.is_healthy)
            assert await publishing.status() == 0
            kept = r"dead letter # (\d+) in orders_stream had no advisory: published one"
            removed = r"nothing to reprocess: stream sequence # (\d+) in orders_stream is gone"

            def orders(pattern: str) -> Iterator[str]:
                return (f"order-{int(sequence) - 1}" for script in group.all for sequence in script.found(pattern))

            print(await settled(nc, group, published, orders(kept), orders(removed)))


async def test_rolling_restart(tmp_path: Path, rng: random.Random, soak: int) -> None:
    async with clustered(tmp_path) as (cluster, nc):
        published = names(1500 * soak)
        publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.003")
        async with process_group(cluster, 3, *LOAD) as group, cluster.script(*publisher) as publishing:
            await publishing.line("published .*", 100)
            for _ in range(soak):
                for server in rng.sample(list(cluster.servers.values()), 3):
                    await server.restart(signal.SIGTERM)
                    await until(cluster.is_healthy)
            assert await publishing.status() == 0
            print(await settled(nc, group, published))


async def test_network_cut_for_short(server: Server, nc: Client, rng: random.Random, soak: int) -> None:
    """Shorter than the ack wait: nothing is done twice."""
    published = names(1500 * soak)
    publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.002")
    async with (
        proxied(server.port) as proxy,
        process_group(server, 2, *LOAD, url=proxy.url) as group,
        server.script(*publisher, NATS_URL=proxy.url) as publishing,
    ):
        await publishing.line("published .*", 100)
        for _ in range(5 * soak):
            await asyncio.sleep(rng.uniform(0.2, 1))
            rng.choice([proxy.cut, proxy.stall])()
            await asyncio.sleep(rng.uniform(0.1, 1.5))
            proxy.restore()
            await until(group.is_connected)  # two cuts in a row would be a long one
        assert await publishing.status() == 0
        print(await settled(nc, group, published))


async def test_network_cut_for_long(server: Server, nc: Client, rng: random.Random, soak: int) -> None:
    """Longer than the ack wait: what was in flight may be done twice."""
    published = names(1500 * soak)
    publisher = (*PUBLISHER, "--count", str(len(published)), "--interval", "0.002")
    async with (
        proxied(server.port) as proxy,
        process_group(server, 2, *LOAD, url=proxy.url) as group,
        server.script(*publisher, NATS_URL=proxy.url) as publishing,
    ):
        await publishing.line("published .*", 100)
        for cut in [proxy.cut, proxy.stall] * soak:
            await asyncio.sleep(rng.uniform(0.2, 1))
            cut()
            group.expose(0.5)
            await asyncio.sleep(rng.uniform(6, 8))
            group.expose(8)
            proxy.restore()
        assert await publishing.status() == 0
        print(await settled(nc, group, published))


@pytest.mark.parametrize(
    "middle", [b"HPUB orders.new", b'"seq":', b"order-7", b"MSG.NEXT", b"+ACK", b"STREAM.MSG.GET", b'"message":{']
)
async def test_network_cut_in_the_middle(server: Server, nc: Client, middle: bytes) -> None:
    """The connection goes just when a request, or an answer, is on its way."""
    published = names(20)
    work = ("--failure-rate", "0.5", "--work-time", "0")
    async with proxied(server.port) as proxy, process_group(server, 1, *work, url=proxy.url) as group:
        cut = proxy.cut_instead_of(middle)
        await server.run(*PUBLISHER, "--interval", "0", NATS_URL=proxy.url)
        account = await settled(nc, group, published)
        assert cut.is_set(), "it was not cut at all"
        print(account)


async def test_slow_network(server: Server, nc: Client, soak: int) -> None:
    published = names(300 * soak)
    async with proxied(server.port) as proxy:
        proxy.delay = 0.1  # seconds, each way
        async with process_group(server, 2, *LOAD, url=proxy.url) as group:
            await publish(nc, *(name.encode() for name in published[3:]))
            await server.run(*PUBLISHER, "--count", "3", "--interval", "0", NATS_URL=proxy.url)
            print(await settled(nc, group, published))


async def test_stops_at_random_moments(server: Server, nc: Client, rng: random.Random, soak: int) -> None:
    stops = 20 * soak
    published = names(stops * 150)
    await publish(nc, *(name.encode() for name in published))
    work = ("--concurrency", "4", "--work-time", "0.02", "--failure-rate", "0")
    async with process_group(server, 3, *work) as group:
        for _ in range(stops):
            await asyncio.sleep(rng.uniform(0.1, 0.6))
            script = rng.choice([script for script in group.running if begun(script)] or group.running)
            if begun(script):  # before that, a signal ends it at once
                assert await script.stop(rng.choice([signal.SIGTERM, signal.SIGINT])) == 0
        print(await settled(nc, group, published))
    info = await durable_info(nc, "orders_stream", "processor")
    assert (info["num_redelivered"], info["delivered"]["consumer_seq"]) == (0, len(published))


async def test_durable_deleted(server: Server, nc: Client, rng: random.Random, soak: int) -> None:
    published = names(1500 * soak)
    await publish(nc, *(name.encode() for name in published))
    async with process_group(server, 3, *LOAD) as group:
        for _ in range(3 * soak):
            await asyncio.sleep(rng.uniform(0.5, 1))
            await request(nc, "CONSUMER.DELETE.orders_stream.processor")
            group.expose()
            await durable_info(nc, "orders_stream", "processor")
            group.expose(1)  # lines come a little late
        print(await settled(nc, group, published))
        complaints = {line for script in group.all for line in script.found("orders_stream: (.*); trying again")}
        assert complaints <= {"409 Consumer Deleted", "503 no responders", "a pull request timed out"}


async def test_advisories_lost_on_a_queue_that_is_never_idle(
    server: Server, nc: Client, rng: random.Random, soak: int
) -> None:
    published = names(1200 * soak)
    config = (await request(nc, "STREAM.INFO.orders_unprocessed"))["config"]
    async with process_group(server, 3, *LOAD[:-1], "0.4") as group:
        for first in range(0, len(published), 40):
            await publish(nc, *(name.encode() for name in published[first : first + 40]))
            keeps = config if rng.random() < 0.6 else config | {"subjects": [f"{ADVISORIES}.nobody"]}
            await request(nc, "STREAM.UPDATE.orders_unprocessed", keeps)
            await asyncio.sleep(rng.uniform(0.5, 1.5))
        await request(nc, "STREAM.UPDATE.orders_unprocessed", config)
        account = await settled(nc, group, published)
        lost = [line for script in group.all for line in script.found("dead letter .* had no advisory: published one")]
        print(f"{len(lost)} advisories lost; {account}")
    assert lost


async def test_what_all_work_depends_on_is_away(
    server: Server, nc: Client, rng: random.Random, soak: int, tmp_path: Path
) -> None:
    """For 40 s `process` and `reprocess` fail; two minutes later all is done, although orders keep coming."""
    away = tmp_path / "away"
    away.touch()
    body = f"""from pathlib import Path
    if Path({str(away)!r}).exists():
        raise ConnectionError
    log.info("done with %s", order.data.decode())"""
    consumer = (with_body("consumer/consumer.py", "process", body, tmp_path), *CONSUMER[1:], "--concurrency", "4")
    dlq = (with_body("dlq/consumer.py", "reprocess", body, tmp_path), *DLQ[1:], "--concurrency", "4")
    async with server.script(*consumer) as working, server.script(*dlq) as reprocessing:

        def done() -> list[str]:
            return working.found("done with (.*)") + reprocessing.found("done with (.*)")

        async def traffic(numbers: Iterable[int]) -> None:
            for number in numbers:
                await publish(nc, b"order-%d" % number)
                await asyncio.sleep(0.1)

        before = 400 * soak
        await traffic(range(before))
        away.unlink()
        died = len(reprocessing.found("order-.* stays in .*"))
        coming = asyncio.create_task(traffic(count(before)))
        async with asyncio.timeout(120):
            while not set(names(before)) <= set(done()):
                await asyncio.sleep(0.5)
        coming.cancel()
        assert len(done()) == len(set(done()))
        print(f"{before} orders while it was away, {died} failed in reprocess: all done once")


async def test_durable_deleted_while_dead_letters_wait(
    server: Server, nc: Client, rng: random.Random, soak: int, tmp_path: Path
) -> None:
    """They are delivered again, and none is taken for dead meanwhile."""
    published = names(300 * soak)
    orders = [name.encode() for name in published]
    await dead_letters(nc, *orders)
    failing = with_body("dlq/consumer.py", "reprocess", "raise ConnectionError", tmp_path)
    async with server.script(failing, *DLQ[1:], "--concurrency", "16") as dlq:
        await dlq.line("order-.* stays in .*", rng.randrange(1, len(orders)))
        await request(nc, "CONSUMER.DELETE.orders_stream.processor")
        slow = (*CONSUMER, "--failure-rate", "0", "--work-time", "6", "--concurrency", "64")
        async with server.script(*slow) as consumer:
            await emptied(nc, "orders_stream", "orders_unprocessed")
            assert sorted(consumer.found("received (.*) from .*")) == sorted(published)
        reprocessed = len(dlq.found("nothing to reprocess: .* will be redelivered: .*"))
        print(f"{len(orders)} dead letters: all delivered again and done once, {reprocessed} advisories out of date")


async def test_stream_deleted_and_created_again(server: Server, nc: Client, rng: random.Random, soak: int) -> None:
    """The orders of the old stream are gone, and those of the new one are done."""
    old, new = [f"order-{i}" for i in range(10_000, 11_000)], names(1000 * soak)
    await publish(nc, *(name.encode() for name in old))
    async with process_group(server, 3, *LOAD) as group:
        await asyncio.sleep(rng.uniform(0.5, 1))
        await request(nc, "STREAM.DELETE.orders_stream")
        await asyncio.sleep(rng.uniform(0, 3))
        await server.create_streams()
        await publish(nc, *(name.encode() for name in new))
        print(await settled(nc, group, new, may_repeat=old))


async def test_hostile_advisories(server: Server, nc: Client, rng: random.Random, soak: int) -> None:
    good = [name.encode() for name in names(200)]
    await request(nc, "STREAM.CREATE.other", {"name": "other", "subjects": ["other"], "storage": "memory"})
    await publish(nc, *good, subject="other")
    before = await state(nc, "other")
    await dead_letters(nc, *good)
    await publish(nc, *(b"live" for _ in good))
    payloads = hostile(2000 * soak, rng.randrange(10**9))
    config = (await request(nc, "STREAM.INFO.orders_unprocessed"))["config"]
    await request(nc, "STREAM.UPDATE.orders_unprocessed", config | {"max_bytes": -1})
    for payload in payloads:
        await nc.jetstream().publish(f"{ADVISORIES}.processor", payload)
    async with server.script(*DLQ) as dlq:
        await emptied(nc, "orders_unprocessed")
        assert await dlq.stop() == 0
    assert sorted(dlq.found("reprocessing order (.*)")) == sorted(name.decode() for name in good)
    bad = dlq.found("(?:deleted, for it is no advisory of orders_stream|nothing to reprocess): .*")
    assert len(bad) == len(payloads)
    assert len(dlq.lines) == len(payloads) + len(good) + 2  # and those of the stop
    assert all(line.isprintable() and len(line) < 500 for line in dlq.lines)
    assert await state(nc, "other") == before
    assert await messages(nc, "orders_stream") == len(good)  # those that nobody has worked on


KINDS = [
    (b"", "orders.new", {}),
    (b"x" * (1024 * 1024 - 100), "orders.big", {}),  # the subject counts too
    (bytes(range(256)), "orders.binary", {}),
    (b"headers", "orders.new", {"Kind": "urgent", "X-Empty": "", "Traceparent": "00-0af7-b7ad-01"}),
    *(
        (b"subject", f"orders.{token}", {})
        for token in ("A", "a-b_c", "$x", "\u00fc\u4e2d", "a/b", "x" * 200, "%s", "a=b;c")
    ),
]


@pytest.mark.parametrize("failure_rate", ["0", "1"])
async def test_orders_of_every_kind(server: Server, nc: Client, tmp_path: Path, failure_rate: str) -> None:
    body = """import hashlib
    log.info("%s", json.dumps([hashlib.sha256(order.data).hexdigest(), order.subject, dict(order.headers or {})]))"""
    script, function = ("consumer/consumer.py", "process") if failure_rate == "0" else ("dlq/consumer.py", "reprocess")
    whole = Path(with_body(script, function, body, tmp_path))
    whole.write_text(whole.read_text().replace("import asyncio\n", "import asyncio\nimport json\n", 1))
    for payload, subject, headers in KINDS:
        await nc.jetstream().publish(subject, payload, headers=headers or None)
    if failure_rate == "1":
        async with server.script(*CONSUMER, "--failure-rate", "1") as consumer:
            await consumer.line(".* will be processed via DLQ", len(KINDS))
            await until(lambda: holds(nc, "orders_unprocessed", len(KINDS)))
    arguments = CONSUMER[1:] if failure_rate == "0" else DLQ[1:]
    async with server.script(str(whole), *arguments) as running:
        await emptied(nc, "orders_stream", "orders_unprocessed")
        found = [json.loads(line) for line in running.found(r"(\[.*)")]
    wanted = [[hashlib.sha256(payload).hexdigest(), subject, headers] for payload, subject, headers in KINDS]
    assert sorted(found, key=str) == sorted(wanted, key=str)


async def test_a_long_backlog_takes_no_memory(server: Server, nc: Client, soak: int) -> None:
    count = 100_000 * soak
    for first in range(0, count, 1000):
        await publish(nc, *(b"order-%d" % i for i in range(first, first + 1000)))
    work = (*CONSUMER, "--concurrency", "16", "--work-time", "0", "--failure-rate", "0")
    async with AsyncExitStack() as stack:
        scripts = [await stack.enter_async_context(server.script(*work)) for _ in range(4)]

        async def memory(left: float) -> list[int]:
            async with asyncio.timeout(60 + count / 1000):
                while await messages(nc, "orders_stream") > left:
                    await asyncio.sleep(0.1)
            return [psutil.Process(script.process.pid).memory_info().rss for script in scripts]

        at_first, at_last = await memory(0.9 * count), await memory(0)
    print(
        [f"{before / 1e6:.1f} MB, then {after / 1e6:.1f} MB" for before, after in zip(at_first, at_last, strict=True)]
    )
    assert all(after < 1.05 * before for before, after in zip(at_first, at_last, strict=True))
    info = await durable_info(nc, "orders_stream", "processor")
    assert (info["num_redelivered"], info["delivered"]["consumer_seq"]) == (0, count)


def hostile(count: int, seed: int) -> list[bytes]:
    """Return what may come on the subject of the advisories, and is none."""
    numbers = st.integers(10**6, 2**70) | st.integers(-(2**70), 0)
    anything = st.recursive(
        st.none() | st.booleans() | numbers | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )
    advisory = st.fixed_dictionaries(
        {
            "stream": st.sampled_from(["orders_stream", "other", "orders_unprocessed"]) | anything,
            "consumer": st.sampled_from(["processor", "a.b", "*", ">", "\x1b[2J", "x" * 300]) | anything,
            "stream_seq": numbers | anything,
            "deliveries": st.just(2) | anything,
        }
    )
    junk = st.builds(lambda piece, times: piece * times, st.binary(min_size=1, max_size=8), st.integers(1, 128 * 1024))
    payloads = st.one_of(
        advisory.map(lambda event: json.dumps(event).encode()),
        anything.map(lambda event: json.dumps(event).encode()),
        st.binary(),
        st.text().map(lambda escapes: f"\x1b]0;{escapes}\x07\r\n".encode("utf-8", "replace")),
        st.integers(0, 19).flatmap(lambda rng: junk if rng == 0 else st.just(b"")),
    )
    made: list[bytes] = []

    @hypothesis.seed(seed)
    @settings(max_examples=count, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(payloads)
    def collect(payload: bytes) -> None:
        made.append(payload)

    while len(made) < count:
        collect()
    return made[:count]
