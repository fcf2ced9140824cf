"""Work that says how it failed: later, never, and why, which stays with the dead letter."""

import asyncio
import json
import signal
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import (
    CONSUMER,
    DLQ,
    Script,
    Server,
    dead_letters,
    durable_info,
    edited,
    emptied,
    holds,
    messages,
    publish,
    request,
    until,
    with_body,
)

MANAGE = ("dlq/manage.py", "orders_unprocessed", "orders_stream")
RETRY = "from jobqueue import Dead, Retry\n    "


def raising(error: str, directory: Path, script: str = CONSUMER[0]) -> str:
    """Return a copy of a script whose work raises an error."""
    function = "process" if script == CONSUMER[0] else "reprocess"
    return with_body(script, function, f'{RETRY}log.info("begun")\n    raise {error}', directory)


def times(script: Script) -> list[float]:
    """Return when each attempt was begun."""
    return [when for when, line in zip(script.times, script.lines, strict=True) if line.endswith("begun")]


async def keep_reasons(nc: Client) -> None:
    config = {
        "name": "orders_failures",
        "subjects": ["failures.orders_stream.*"],
        "max_msgs_per_subject": 1,
        "discard": "old",
        "max_age": 3600 * 10**9,
    }
    await request(nc, "STREAM.CREATE.orders_failures", config)


async def test_a_retry_has_one_line_and_no_traceback(server: Server, nc: Client, tmp_path: Path) -> None:
    await publish(nc, b"order-0")
    async with server.script(raising('Retry("busy")', tmp_path), *CONSUMER[1:]) as consumer:
        await consumer.line("order-0 will be processed via DLQ")
        assert await consumer.stop() == 0
    assert consumer.messages[:5] == [
        "begun",
        "error processing order-0: busy (attempt 1 of 2, stream sequence # 1)",
        "begun",
        "error processing order-0: busy (attempt 2 of 2, stream sequence # 1)",
        "order-0 will be processed via DLQ",
    ]


async def test_a_delay_survives_a_restart_of_the_consumer_and_of_the_server(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """Nine seconds are more than the back-off; a search for dead letters runs beside it, and finds one more."""
    await dead_letters(nc, b"order-0")
    await nc.jetstream().purge_stream("orders_unprocessed")
    await publish(nc, b"order-1")
    late = raising('Retry("busy", delay=9)', tmp_path)
    async with server.script(*DLQ) as dlq:
        async with server.script(late, *CONSUMER[1:]) as consumer:
            await consumer.line("error processing order-1: busy .*")
            assert await consumer.stop() == 0
        (begun,) = times(consumer)
        await server.restart(signal.SIGTERM)
        async with server.script(late, *CONSUMER[1:]) as again:
            await again.line("order-1 will be processed via DLQ")
            await dlq.line("reprocessing order order-1")
            assert await again.stop() == 0
        await dlq.line("reprocessing order order-0")
        assert await dlq.stop() == 0
    (later,) = times(again)
    assert later - begun > 8  # the server keeps whole seconds
    assert (await durable_info(nc, "orders_stream", "processor"))["config"]["metadata"][
        "nats_job_queue.longest_delay"
    ] == "16"


async def test_what_is_dead_is_not_processed_again(server: Server, nc: Client, tmp_path: Path) -> None:
    await keep_reasons(nc)
    await publish(nc, b"order-0", b"order-1")
    async with server.script(raising('Dead("no such customer")', tmp_path), *CONSUMER[1:]) as consumer:
        await consumer.line("order-1 will be processed via DLQ")
        assert await consumer.stop() == 0
    for number in range(2):
        line = f"error processing order-{number}: no such customer (attempt 1 of 2, stream sequence # {number + 1})"
        assert consumer.messages.count(line) == 1
    assert consumer.messages.count("begun") == 2
    assert await holds(nc, "orders_unprocessed", 2)
    listed = (await server.run(*MANAGE, "list", "--json")).lines
    assert [json.loads(line)["reason"] for line in listed] == ["no such customer"] * 2


async def test_dead_is_no_end_where_an_operator_has_set_no_limit(server: Server, nc: Client, tmp_path: Path) -> None:
    """It is retried after the back-off then, and not at once for ever."""
    await publish(nc, b"order-0")
    async with server.script(raising('Dead("no such customer")', tmp_path), *CONSUMER[1:]) as consumer:
        await consumer.line("order-0 will be processed via DLQ")
        config = (await durable_info(nc, "orders_stream", "processor"))["config"] | {"max_deliver": -1}
        change = {"stream_name": "orders_stream", "config": config}
        await request(nc, "CONSUMER.CREATE.orders_stream.processor.orders.*", change)
        await asyncio.sleep(0.6)  # what the consumer knows of the durable is half a second old at most
        await publish(nc, b"order-1")
        await consumer.line("error processing order-1: .*attempt 2 .*")
        assert await consumer.stop() == 0
    before, after = times(consumer)[-2:]
    assert after - before > 4


async def test_without_a_limit_a_failure_waits_for_the_back_off(server: Server, nc: Client, tmp_path: Path) -> None:
    code = "BACKOFF = [1.0]\nMAX_DELIVER = -1"
    await publish(nc, b"order-0")
    async with server.script(edited(CONSUMER[0], code, tmp_path), *CONSUMER[1:], "--failure-rate", "1") as consumer:
        await consumer.line("error processing order-0", 3)
        assert await consumer.stop() == 0
    first, *_, last = (
        when for when, line in zip(consumer.times, consumer.lines, strict=True) if "error processing" in line
    )
    assert last - first > 1
    assert not consumer.found(".*via DLQ")


async def test_a_dead_letter_that_stays_dead_is_discarded(server: Server, nc: Client, tmp_path: Path) -> None:
    await dead_letters(nc, b"order-0")
    async with server.script(raising('Dead("twice")', tmp_path, DLQ[0]), *DLQ[1:]) as dlq:
        await emptied(nc, "orders_stream", "orders_unprocessed")
        assert await dlq.stop() == 0
    (told,) = dlq.found("discarded: (.*)")
    assert (json.loads(told)["payload"], json.loads(told)["sequence"]) == ("order-0", 1)
    assert dlq.messages.count("begun") == 1


async def test_a_dead_letter_is_retried_after_its_delay(server: Server, nc: Client, tmp_path: Path) -> None:
    await dead_letters(nc, b"order-0")
    async with server.script(raising('Retry("busy", delay=1)', tmp_path, DLQ[0]), *DLQ[1:]) as dlq:
        await dlq.line("order-0 stays in orders_stream; next attempt in 1 s", 3)
        assert await dlq.stop() == 0
    first, second, third, *_ = times(dlq)
    assert 0.9 < second - first < 5 and 0.9 < third - second < 5


@pytest.mark.parametrize("command", ["retry", "discard"])
async def test_the_reason_stays_with_the_dead_letter_until_it_is_gone(
    server: Server, nc: Client, tmp_path: Path, command: str
) -> None:
    await keep_reasons(nc)
    await publish(nc, b"order-0", b"order-1")
    error = 'ValueError("no \\x1b address" + 60 * "." * (order.data == b"order-1"))'
    async with server.script(raising(error, tmp_path), *CONSUMER[1:]) as consumer:
        await consumer.line("order-1 will be processed via DLQ")
        assert await consumer.stop() == 0
    shown = (await server.run(*MANAGE, "list")).lines
    assert shown[0].endswith(f"{'REASON':<40}  PAYLOAD")
    assert rf"ValueError: no \x1b address{' ' * 13}  order-0" in shown[1]
    assert rf"ValueError: no \x1b address{'.' * 13}  order-1" in shown[2]
    first = json.loads((await server.run(*MANAGE, "list", "--json")).lines[0])
    assert (first["reason"], first["attempt"]) == (r"ValueError: no \x1b address", 2)
    assert await messages(nc, "orders_failures") == 2
    assert (await server.run(*MANAGE, command, "1")).process.returncode == 0
    assert await messages(nc, "orders_failures") == 1


async def test_a_reason_of_another_order_is_not_shown(server: Server, nc: Client) -> None:
    """Its sequence was that of an order of a stream that was deleted; and anybody may have written nonsense."""
    await keep_reasons(nc)
    await dead_letters(nc, b"order-0", b"order-1")
    old = {"reason": "old", "attempt": 2, "stored_at": 17}
    await nc.publish("failures.orders_stream.1", json.dumps(old).encode())
    await nc.publish("failures.orders_stream.2", b"[" * 100_000)
    await until(lambda: holds(nc, "orders_failures", 2))
    found = [json.loads(line) for line in (await server.run(*MANAGE, "list", "--json")).lines]
    assert [one.get("reason") for one in found] == [None, None]


async def test_the_stream_of_reasons_may_have_any_name(server: Server, nc: Client, tmp_path: Path) -> None:
    await nc.jetstream().add_stream(name="why%s", subjects=["failures.orders_stream.*"], allow_direct=True)
    await publish(nc, b"order-0")
    async with server.script(raising('Dead("no address")', tmp_path), *CONSUMER[1:]) as consumer:
        await consumer.line("order-0 will be processed via DLQ")
        assert await consumer.stop() == 0
    assert "no address" in (await server.run(*MANAGE, "list")).lines[1]
