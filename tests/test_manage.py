"""dlq/manage.py: dead letters are listed, sent back and discarded."""

import asyncio
import json
import os
import random
import select
import shlex
import signal
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import (
    ADVISORIES,
    CONSUMER,
    DLQ,
    MANAGE,
    Script,
    Server,
    dead_letters,
    emptied,
    holds,
    messages,
    publish,
    pull,
    request,
    unread,
    until,
    waiting,
    with_body,
)
from tests.proxy import proxied

BOTH = ("orders_stream", "orders_unprocessed")


async def manage(server: Server, *command: str, status: int = 0, **env: str) -> Script:
    """Run a command of dlq/manage.py to its end."""
    script = await server.run(*MANAGE, *command, **env)
    assert script.process.returncode == status, script.lines
    return script


async def listed(server: Server, *, without_advisory: bool = False) -> list[dict[str, object]]:
    """Return what `list --json` shows."""
    lines = (await manage(server, "list", "--json")).lines
    return [json.loads(line) for line in lines if line.startswith("{")]


async def order(nc: Client, sequence: int) -> dict[str, str]:
    """Return an order from the stream."""
    found: dict[str, str] = (await request(nc, "STREAM.MSG.GET.orders_stream", {"seq": sequence}))["message"]
    return found


async def test_all_dead_letters_are_listed_and_nothing_is_changed(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"lost-0", b"lost-1")
    await request(nc, "STREAM.PURGE.orders_unprocessed")
    await dead_letters(nc, "Größe\n\x1b[2J".encode(), b"\xff\xfe", b"x" * 300)
    await publish(nc, b"alive")
    before = [await request(nc, f"STREAM.INFO.{stream}") for stream in BOTH]
    table = (await manage(server, "list")).lines
    assert table[0].split() == ["SEQUENCE", "SUBJECT", "PUBLISHED", "DIED", "DELIVERIES", "ID", "PAYLOAD"]
    assert [line.split()[0] for line in table[1:]] == ["1", "2", "3", "4", "5"]
    assert [line.count("without advisory") for line in table[1:]] == [1, 1, 0, 0, 0]
    assert table[3].endswith(r"Größe\n\x1b[2J") and table[4].endswith(r"\xff\xfe") and len(table[5]) < 250
    found = await listed(server)
    assert [one["sequence"] for one in found] == [1, 2, 3, 4, 5]
    assert [one.get("payload") for one in found] == ["lost-0", "lost-1", "Größe\n\x1b[2J", None, "x" * 300]
    assert found[3]["payload_base64"] == "//4="
    assert [one["died"] is None for one in found] == [True, True, False, False, False]
    assert {one["subject"] for one in found} == {"orders.new"} and {one["deliveries"] for one in found} == {2}
    after = [await request(nc, f"STREAM.INFO.{stream}") for stream in BOTH]
    assert [info["state"] for info in before] == [info["state"] for info in after]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_many_dead_letters_are_listed_in_flat_memory(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"x" * 6000 for _ in range(8000)))
    code = "import runpy, sys; sys.argv = sys.argv[1:]\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print(*[line for line in open('/proc/self/status') if 'VmHWM' in line], file=sys.stderr)"
    command = (sys.executable, "-c", code, *MANAGE, "list", "--json")
    script = await server.run(*command, PYTHONPATH=".", COVERAGE_PROCESS_CONFIG="")
    (peak,) = script.found(r"VmHWM:\s+(\d+) kB")
    assert int(peak) < 60_000  # they have 48,000
    assert len([line for line in script.lines if line.startswith("{")]) == 8000


async def test_a_dead_letter_is_redriven_with_a_fresh_id_and_its_own_headers(server: Server, nc: Client) -> None:
    headers = {"Nats-Msg-Id": "mine", "Nats-Expected-Last-Sequence": "0", "traceparent": "00-1"}
    await dead_letters(nc, b"order-0", headers=headers)
    assert (await manage(server, "retry", "1")).messages == [
        "redriven order-0: # 1 in orders_stream is # 2 now",
        "1 dead letters redriven, 0 skipped",
    ]
    raw = await nc.jetstream().get_msg("orders_stream", 2)
    assert (raw.data, raw.subject) == (b"order-0", "orders.new")
    assert {**(raw.headers or {})} == {
        "Nats-Msg-Id": "mine.retry-1",
        "Nats-Expected-Stream": "orders_stream",
        "traceparent": "00-1",
    }
    assert [await messages(nc, stream) for stream in BOTH] == [1, 0]
    async with server.script(*CONSUMER, "--failure-rate", "0") as consumer:
        await consumer.line("received order-0 .*")


async def test_dead_letters_are_discarded_after_they_have_been_printed(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0", b"order-1", b"order-2")
    lines = (await manage(server, "discard", "2")).lines
    assert json.loads(lines[0])["payload"] == "order-1"
    assert lines[1].endswith("discarded order-1: # 2 in orders_stream")
    assert [one["sequence"] for one in await listed(server)] == [1, 3]
    refused = await manage(server, "discard", "--all", status=2)
    assert refused.lines[-1].endswith("error: --all requires --yes without a terminal")
    await manage(server, "discard", "--all", "--yes")
    assert [await messages(nc, stream) for stream in BOTH] == [0, 0]


@pytest.mark.parametrize(
    ("answer", "status"), [(b"y\n", 0), (b"n\n", 1), (b"\x04", 1), (signal.SIGINT, 128 + signal.SIGINT)]
)
async def test_a_terminal_is_asked_before_all_are_discarded(
    server: Server, nc: Client, answer: bytes | signal.Signals, status: int
) -> None:
    await dead_letters(nc, b"order-0")
    master, slave = os.openpty()
    async with server.script(*MANAGE, "discard", "--all", stdin=slave) as script:
        await script.line(r"discard all dead letters of orders_stream\? \[y/N\]")
        if isinstance(answer, bytes):
            os.write(master, answer)
        else:
            script.process.send_signal(answer)
        assert await script.status() == status
    os.close(master)
    os.close(slave)
    assert status != 1 or script.messages[1:] == ["nothing is discarded"]
    assert await messages(nc, "orders_stream") == (1 if status else 0)


async def test_what_is_no_dead_letter_is_refused(server: Server, nc: Client) -> None:
    """Sequence 1 is dead, 2 is gone, 3 is in flight, 4 is not delivered, 5 isn't there."""
    await dead_letters(nc, b"dead-0", b"gone-0")
    await manage(server, "discard", "2")
    await publish(nc, b"flying-0", b"waiting-0")
    subscription = await pull(nc, "orders_stream", "processor", 1)
    flying = await subscription.next_msg(5)
    beating = asyncio.create_task(beat(nc, flying.reply))
    refused = [
        "# 2 in orders_stream is skipped: it is gone",
        "# 3 in orders_stream is skipped: it is in flight or waits for a retry",
        "# 4 in orders_stream is skipped: it will be delivered: processor has not delivered it yet",
        "# 5 in orders_stream is skipped: it is gone",
    ]
    for command in ("retry", "discard"):
        script = await manage(server, command, "2", "3", "4", "5", status=1)
        assert sorted(line for line in script.messages if "is skipped" in line) == refused
    beating.cancel()
    assert [one["sequence"] for one in await listed(server)] == [1]
    assert await messages(nc, "orders_stream") == 3


async def beat(nc: Client, ack_subject: str) -> None:
    while True:
        await nc.publish(ack_subject, b"+WPI")
        await asyncio.sleep(0.02)


async def test_a_dead_letter_that_a_dlq_processor_has_in_flight_is_left_to_it(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    await dead_letters(nc, b"order-0")
    go = tmp_path / "go"
    slow = with_body("dlq/consumer.py", "reprocess", waiting(go), tmp_path)
    async with server.script(slow, *DLQ[1:]) as dlq:
        await dlq.line("reprocessing order order-0")
        for command in ("retry", "discard"):
            script = await manage(server, command, "1", status=1)
            assert (
                "# 1 in orders_stream is skipped: a DLQ processor or another operator has it in flight"
                in script.messages
            )
        go.touch()
        await emptied(nc, *BOTH)
        assert dlq.messages == ["reprocessing order order-0"]


async def test_a_dlq_processor_begins_nothing_that_an_operator_has_handled(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """It has the advisory in its queue, and is suspended until the dead letter is redriven."""
    await dead_letters(nc, b"order-0", b"order-1")
    slow = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(0.3)", tmp_path)
    async with server.script(slow, *DLQ[1:]) as dlq:
        await dlq.line("reprocessing order order-0")
        dlq.process.send_signal(signal.SIGSTOP)
        await manage(server, "retry", "2")
        dlq.process.send_signal(signal.SIGCONT)
        await dlq.line("nothing to reprocess: stream sequence # 2 in orders_stream is gone")
        assert dlq.found("reprocessing .*") == ["reprocessing order order-0"]


async def test_what_a_dlq_processor_has_begun_since_is_left_to_it(server: Server, nc: Client, tmp_path: Path) -> None:
    """The operator is suspended while it prints, for longer than the ack wait."""
    await dead_letters(nc, b"x" * 100_000, b"order-1")
    slow = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(3)", tmp_path)
    async with unread(server, *MANAGE, "discard", "1") as (discarding, pipe):
        await asyncio.to_thread(select.select, [pipe], [], [])  # the pipe takes 64 kB, so the printing blocks
        async with server.script(slow, *DLQ[1:]) as dlq:
            await dlq.line("reprocessing order x+.*")
            printed = await asyncio.to_thread(pipe.read)
            _, errors = await discarding.communicate()
            await emptied(nc, *BOTH)
        assert json.loads(printed)["sequence"] == 1
        assert b"is skipped: a DLQ processor or another operator has it in flight" in errors


async def test_it_is_safe_beside_dlq_processors_consumers_and_itself(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """Each dead letter is either reprocessed or sent back, once."""
    orders = [f"order-{i}" for i in range(200)]
    await dead_letters(nc, *(name.encode() for name in orders))
    slow = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(1)", tmp_path)
    dlq_command, consumer_command = (slow, *DLQ[1:], "--concurrency", "8"), (*CONSUMER, "--failure-rate", "0")
    async with server.script(*consumer_command) as consumer, server.script(*dlq_command) as dlq:
        await dlq.line("reprocessing .*", 10)
        runs = [await asyncio.gather(*(server.run(*MANAGE, "retry", "--all") for _ in range(2))) for _ in range(2)]
        await emptied(nc, *BOTH)
        sent = [line for run in runs for script in run for line in script.found("redriven (.*): .*")]
        done = Counter(dlq.found("reprocessing order (.*)") + consumer.found("received (.*) from .*"))
        assert done == Counter(orders)
        assert len(sent) > 50


@pytest.mark.faults
@pytest.mark.parametrize("command", [("retry", "--all"), ("discard", "--all", "--yes")])
async def test_it_may_be_killed_between_its_steps_and_run_again(
    server: Server, nc: Client, rng: random.Random, command: tuple[str, ...]
) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(300)))
    for _ in range(6):
        async with server.script(*MANAGE, *command) as script:
            with suppress(AssertionError):  # it had nothing left to do
                await script.line("redriven .*|discarded .*|looking for .*", rng.randrange(1, 60))
            await asyncio.sleep(rng.random() / 20)  # and the end of the block kills it
    await server.run(*MANAGE, *command)
    assert await messages(nc, "orders_unprocessed") == 0
    assert not await listed(server)
    async with server.script(*CONSUMER, "--failure-rate", "0", "--concurrency", "16") as consumer:
        await emptied(nc, "orders_stream")
        received = consumer.found("received (.*) from .*")
    assert sorted(received) == sorted(f"order-{i}" for i in range(300)) * (command[0] == "retry")


async def test_what_it_had_taken_when_it_was_killed_goes_to_a_dlq_processor(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    async with proxied(server.port) as proxy:
        has_cut = proxy.cut_instead_of(b"order-0\r\n")  # the publish
        async with server.script(*MANAGE, "retry", "1", NATS_URL=proxy.url):
            await has_cut.wait()
    async with server.script(*DLQ) as dlq:
        await emptied(nc, *BOTH)
        assert dlq.messages == ["reprocessing order order-0"]


async def test_a_redrive_whose_answer_is_lost_is_done_once(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    async with proxied(server.port) as proxy:
        is_published = False

        def is_answer(piece: bytes) -> bool:
            nonlocal is_published
            is_published |= b"HPUB orders.new" in piece
            if is_published and b'"stream":"orders_stream"' in piece:
                proxy.drops = lambda _: False
                return True
            return False

        proxy.drops = is_answer
        script = await manage(server, "retry", "1", NATS_URL=proxy.url)
    assert "redriven order-0: # 1 in orders_stream is # 2 now" in script.messages
    assert [await messages(nc, stream) for stream in BOTH] == [1, 0]


@pytest.mark.faults
async def test_all_that_is_rescheduled_is_redriven_or_named_whoever_is_killed(
    server: Server, nc: Client, rng: random.Random, tmp_path: Path
) -> None:
    """A slow network gives each step time to be the last one."""
    orders = [f"order-{i}" for i in range(200)]
    await dead_letters(nc, *(name.encode() for name in orders))
    failing = with_body("dlq/consumer.py", "reprocess", "raise ConnectionError", tmp_path)
    consumer_command = (*CONSUMER, "--failure-rate", "0", "--concurrency", "16")
    async with (
        server.script(failing, *DLQ[1:], "--concurrency", "16") as dlq,
        server.script(*consumer_command) as consumer,
        proxied(server.port) as proxy,
    ):
        await dlq.line("order-.* stays in orders_stream.*", 200)
        proxy.delay = 0.1
        kills = 0
        for _ in range(4):
            async with server.script(*MANAGE, "retry", "--all", NATS_URL=proxy.url) as script:
                with suppress(AssertionError):  # it had nothing left to do
                    await script.line("redriven .*", rng.randrange(1, 20))
                    kills += 1
        while await messages(nc, "orders_unprocessed"):
            dead = {str(one["sequence"]) for one in await listed(server)}
            script = await server.run(*MANAGE, "retry", "--all", NATS_URL=proxy.url)
            named = {line.split()[1] for line in script.found("# .* is skipped: .*")}
            redriven = {line.split(": #")[1].split()[0] for line in script.found("redriven .*")}
            assert dead <= named | redriven
        await emptied(nc, *BOTH)
        done = Counter(consumer.found("received (.*) from .*"))
        assert done.keys() == set(orders)
        assert sum(done.values()) - 200 <= 8 * kills  # published again and not removed at the kill


async def test_a_shutdown_finishes_the_dead_letters_in_hand(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(400)))
    async with proxied(server.port) as proxy:
        proxy.delay = 0.02
        async with server.script(*MANAGE, "retry", "--all", NATS_URL=proxy.url) as script:
            await script.line("redriven .*")
            assert await script.stop() == 1
            redriven = len(script.found("redriven .*"))
            assert script.found(f"{redriven} dead letters redriven, {400 - redriven} skipped")
    assert 0 < redriven < 400
    assert len(await listed(server)) == 400 - redriven


async def test_an_order_that_cannot_be_published_again_stays_a_dead_letter(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    await request(nc, "STREAM.UPDATE.orders_stream", config | {"max_msgs": 1})
    script = await manage(server, "retry", "1", status=1)
    assert "# 1 in orders_stream is skipped: maximum messages exceeded (10077)" in script.messages
    assert [one["sequence"] for one in await listed(server)] == [1]
    async with server.script(*DLQ) as dlq:  # as before, and not half a minute later
        await emptied(nc, *BOTH)
        assert dlq.messages == ["reprocessing order order-0"]


async def test_a_slow_network(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(12)))
    async with proxied(server.port) as proxy:
        proxy.delay = 0.1
        await manage(server, "discard", "3", NATS_URL=proxy.url)
        await manage(server, "retry", "5", NATS_URL=proxy.url)
        await manage(server, "retry", "--all", NATS_URL=proxy.url)
    assert [await messages(nc, stream) for stream in BOTH] == [11, 0]


async def test_an_out_of_date_advisory_is_no_dead_letter(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    await request(nc, "CONSUMER.DELETE.orders_stream.processor")
    config = {"durable_name": "processor", "ack_policy": "explicit", "filter_subject": "orders.*"}
    made = {"stream_name": "orders_stream", "config": config}
    await request(nc, "CONSUMER.CREATE.orders_stream.processor.orders.*", made)
    assert await listed(server) == []
    script = await manage(server, "retry", "1", status=1)
    assert script.messages[0].startswith("# 1 in orders_stream is skipped: it will be delivered: ")


async def test_malformed_advisories_are_passed_over(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    await publish(nc, b"junk", subject=f"{ADVISORIES}.processor")
    await until(lambda: holds(nc, "orders_unprocessed", 2))
    assert [one["sequence"] for one in await listed(server)] == [1]


async def test_a_list_that_nobody_reads_to_its_end(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"x" * 5000 for _ in range(100)))
    command = f"{sys.executable} {' '.join(MANAGE)} list --json | head -1"
    script = await server.run("bash", "-o", "pipefail", "-c", command)
    assert (script.process.returncode, len(script.lines)) == (0, 1)


async def test_wrong_usage(server: Server) -> None:
    for command in (("retry",), ("retry", "1", "--all"), ("discard", "0"), ("remove",), ()):
        assert "error: " in (await manage(server, *command, status=2)).lines[-1]


async def test_nothing_is_discarded_that_cannot_be_printed(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    script = f"{shlex.join([sys.executable, *MANAGE, 'discard', '--all', '--yes'])} >&-"
    discarded = await server.run("bash", "-c", script)
    assert (discarded.process.returncode, discarded.messages) == (
        1,
        ["standard output is closed, where the dead letters would be printed"],
    )
    assert await messages(nc, "orders_stream") == 1
