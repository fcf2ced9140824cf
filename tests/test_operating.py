"""dlq/manage.py in whatever state the streams and the durables are."""

import asyncio
import base64
import json
import shlex
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from nats.aio.client import Client

from jobqueue.connection.connecting import connect
from jobqueue.dead_letters.advisories import publish_advisory
from jobqueue.jetstream.durables import Durables
from tests.harness import (
    ADVISORIES,
    CONSUMER,
    DLQ,
    MANAGE,
    Server,
    advisory,
    clustered,
    dead_letters,
    durable_info,
    emptied,
    holds,
    messages,
    publish,
    pull,
    request,
    serving,
    state,
    unread,
    until,
    with_body,
)
from tests.proxy import proxied
from tests.test_manage import BOTH, listed, manage

DLQ_DURABLE = "unprocessed_order_handler"


async def create_durable(nc: Client, **fields: object) -> None:
    """Create the DLQ's durable as an operator would."""
    config = {"durable_name": DLQ_DURABLE, "ack_policy": "explicit", **fields}
    made = {"stream_name": "orders_unprocessed", "config": config}
    assert "error" not in await request(nc, f"CONSUMER.DURABLE.CREATE.orders_unprocessed.{DLQ_DURABLE}", made)


async def test_limits_of_an_operator_hold_up_nothing(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(30)))
    await create_durable(nc, max_batch=3, max_ack_pending=5, max_expires=10**9)
    assert (await manage(server, "retry", "--all")).found("30 dead letters redriven, 0 skipped")
    assert [await messages(nc, stream) for stream in BOTH] == [30, 0]


async def test_a_durable_that_delivers_no_more_is_named(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(10)))
    await create_durable(nc, max_ack_pending=3)
    script = await manage(server, "retry", "9", status=1)
    assert script.messages == [
        "retry has not finished: unprocessed_order_handler has 3 pending advisories, and may not have more: run "
        "`nats consumer edit -f orders_unprocessed unprocessed_order_handler --max-pending 100000` first; run it again"
    ]
    edit = "consumer edit -f orders_unprocessed unprocessed_order_handler --max-pending 100000"
    assert (await server.run("nats", *edit.split())).process.returncode == 0
    await manage(server, "retry", "9")


async def test_a_paused_durable_is_named(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0")
    await create_durable(nc)
    try:
        end = {"pause_until": f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"}
        await request(nc, f"CONSUMER.PAUSE.orders_unprocessed.{DLQ_DURABLE}", end)
    except TimeoutError:
        pytest.skip("this nats-server cannot pause a durable")
    script = await manage(server, "discard", "1", status=1)
    assert script.messages == [
        "discard has not finished: unprocessed_order_handler is paused: run "
        "`nats consumer resume -f orders_unprocessed unprocessed_order_handler` first; run it again"
    ]
    resume = "consumer resume -f orders_unprocessed unprocessed_order_handler"
    resumed = await server.run("nats", *resume.split())
    assert resumed.process.returncode == 0, resumed.lines
    await manage(server, "discard", "1")


async def test_two_operators_at_once(server: Server, nc: Client) -> None:
    """Each dead letter is redriven or discarded, and none is both."""
    await dead_letters(nc, *(b"order-%d" % i for i in range(300)))
    retrying, discarding = await asyncio.gather(
        server.run(*MANAGE, "retry", "--all"), server.run(*MANAGE, "discard", "--all", "--yes")
    )
    redriven = {line.split(":")[0] for line in retrying.found("redriven (.*)")}
    discarded = {line.split(":")[0] for line in discarding.found("discarded (.*)")}
    assert not redriven & discarded
    left = await listed(server)
    assert len(redriven) + len(discarded) + len(left) == 300
    assert await messages(nc, "orders_stream") == len(redriven) + len(left)


async def test_dead_letters_that_wait_for_a_retry_are_handled_at_once(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """Though a DLQ processor was at it, and is still running."""
    await dead_letters(nc, *(b"order-%d" % i for i in range(100)))
    failing = with_body("dlq/consumer.py", "reprocess", "raise ValueError", tmp_path)
    async with server.script(failing, *DLQ[1:], "--concurrency", "8") as dlq:
        await dlq.line("order-.* stays in orders_stream; next attempt in 10 s", 100)
        script = await server.run(*MANAGE, "retry", "--all")
        redriven, skipped = len(script.found("redriven .*")), len(script.found("# .* is skipped: .*"))
        assert redriven + skipped == 100
        assert await messages(nc, "orders_unprocessed") == skipped
        assert redriven > 50


async def test_large_dead_letters(tmp_path: Path) -> None:
    """The server ends a connection for which too much waits."""
    async with serving(tmp_path, "max_pending: 12MB") as server, server.client() as nc:
        await server.create_streams()
        for tens in range(4):
            await dead_letters(nc, *(b"%d" % (10 * tens + i) + b"x" * 1_000_000 for i in range(10)))
        assert [one["sequence"] for one in await listed(server)] == list(range(1, 41))
        await manage(server, "retry", "7")
        await manage(server, "discard", "--all", "--yes")
        assert [await messages(nc, stream) for stream in BOTH] == [1, 0]


async def test_one_that_does_not_fit_is_skipped_and_the_others_go_on(bare_server: Server) -> None:
    """`max_payload` is lowered, and the new id makes a message larger."""
    server = bare_server
    await server.create_streams()
    async with server.client() as nc:
        await dead_letters(nc, b"x" * 65_500, b"order-1", b"x" * 60_000)
        config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
        await request(nc, "STREAM.UPDATE.orders_stream", config | {"max_msg_size": 60_010})
    server.configure("max_payload: 65536")
    await server.restart(signal.SIGTERM)
    script = await manage(server, "retry", "--all", status=1)
    assert script.found("# 1 in orders_stream is skipped: maximum payload exceeded")
    assert script.found("# 3 in orders_stream is skipped: message size exceeds maximum allowed .*")
    assert script.found("1 dead letters redriven, 2 skipped")


async def test_headers_are_kept_as_they_are(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"dead-0")
    block = b"NATS/1.0\r\nb: 1\r\na: x\r\nb: 2\r\nfolded: one\r\n two\r\nlatin: \xe9\r\na/b c: ok\r\n"
    instruction = b"nats-expected-last-sequence: 0\r\nNats-Msg-Id: mine\r\n"
    total = len(block) + len(instruction) + 2
    line = b"HPUB orders.new %d %d\r\n" % (total, total + 7)
    await nc._send_command(line + block + instruction + b"\r\n" + b"order-0\r\n")
    await nc.flush()
    await pull(nc, "orders_stream", "processor", 3)
    await until(lambda: holds(nc, "orders_unprocessed", 2))
    _, found = await listed(server)
    assert found["headers"] == {
        **{"b": ["1", "2"], "a": "x", "folded": "one\r\n two", "latin": "\\xe9", "a/b c": "ok"},
        **{"nats-expected-last-sequence": "0", "Nats-Msg-Id": "mine"},
    }
    await manage(server, "retry", "2")
    stored = (await request(nc, "STREAM.MSG.GET.orders_stream", {"seq": 3}))["message"]
    added = b"Nats-Expected-Stream: orders_stream\r\nNats-Msg-Id: mine.retry-2\r\n"
    assert base64.b64decode(stored["hdrs"]) == block + added + b"\r\n"


async def test_each_dead_letter_is_listed_once_whatever_advisories_there_are(server: Server, nc: Client) -> None:
    """Some are out of date, repeated, or of another stream; and three dead letters have none."""
    await dead_letters(nc, *(b"dead-%d" % i for i in range(3)))
    await request(nc, "STREAM.PURGE.orders_unprocessed")
    await dead_letters(nc, b"dead-3", b"gone")
    await nc.request("$JS.ACK.orders_stream.processor.2.5.0.0.0", b"+ACK")
    config = (await request(nc, "STREAM.INFO.orders_unprocessed"))["config"]
    subjects = [*config["subjects"], config["subjects"][0].replace("orders_stream", "emails_stream")]
    await request(nc, "STREAM.UPDATE.orders_unprocessed", config | {"subjects": subjects})
    for sequence in (4, 4, 5, 5, 99):
        await publish(nc, advisory(sequence), subject=f"{ADVISORIES}.processor")
    for sequence in range(1, 6):
        other = advisory(sequence, stream="emails_stream")
        await publish(nc, other, subject=subjects[1].replace("*", "processor"))
    assert [one["sequence"] for one in await listed(server)] == [1, 2, 3, 4]
    await manage(server, "discard", "--all", "--yes")
    assert await listed(server) == []


async def test_a_request_that_fails_ends_in_one_line(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(200)))
    async with proxied(server.port) as proxy:

        def drops(piece: bytes) -> bool:
            if b"STREAM.MSG.GET.orders_stream" not in piece:
                return False
            proxy.cut()
            return True

        proxy.drops = drops
        script = await manage(server, "list", status=1, NATS_URL=proxy.url)
    assert "list has not finished: not connected to the server; run it again" in script.messages
    assert not [line for line in script.lines if "Traceback" in line]


async def test_an_order_that_dies_in_the_meantime_is_redriven_or_reprocessed(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    """It has the server's own advisory then, and perhaps one that the command has published."""
    slow = with_body("dlq/consumer.py", "reprocess", "await asyncio.sleep(1.5)", tmp_path)
    failing = (*CONSUMER, "--failure-rate", "1", "--concurrency", "50")
    async with (
        server.script(*failing) as consumer,
        server.script(slow, *DLQ[1:], "--concurrency", "100") as dlq,
        proxied(server.port) as proxy,
    ):
        proxy.delay = 0.01
        await publish(nc, *(b"order-%d" % i for i in range(300)))
        await consumer.line("order-.* will be processed via DLQ")
        retrying = await server.run(*MANAGE, "retry", "--all", NATS_URL=proxy.url)
        await consumer.stop()
        redriven = {line.split(":")[0] for line in retrying.found("redriven (.*: # [0-9]+ in .*)")}
        sequences = [line.split("# ")[1].split(" ")[0] for line in retrying.found("redriven (.*)")]
        await emptied(nc, "orders_unprocessed")
        begun = dlq.found("reprocessing order (.*)")
        assert len(sequences) == len(set(sequences)) >= len(redriven)
        # An order that was redriven may die again, and is reprocessed then, once.
        assert len(begun) <= 300 + len(sequences)
        for order in set(begun):
            assert begun.count(order) <= 1, "reprocessed twice"


async def test_a_dead_letter_whose_advisory_is_gone_is_named(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"x" * 3000 + b"%d" % i for i in range(100)))

    async def has_begun() -> bool:
        return await messages(nc, "orders_stream") < 99

    async with unread(server, *MANAGE, "discard", "--all", "--yes") as (discarding, pipe):
        await until(has_begun)
        await request(nc, "STREAM.PURGE.orders_unprocessed")
        printed = await asyncio.to_thread(pipe.read)
        _, errors = await discarding.communicate()
    named = errors.count(b"is skipped:") + errors.count(b"discarded x")
    assert named == 100 and len(printed.splitlines()) >= errors.count(b"discarded x")
    assert discarding.returncode == 1


async def test_what_was_purged_gets_an_advisory_again(
    server: Server, nc: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the duplicate window of the first one, too."""
    await dead_letters(nc, b"order-0")
    monkeypatch.setenv("NATS_URL", server.url)
    async with connect("test") as ours:
        durable = await Durables(ours, "orders_stream").find("processor")
        assert durable
        await publish_advisory(ours, "orders_stream", durable, 1)
    await request(nc, "STREAM.PURGE.orders_unprocessed")
    await manage(server, "retry", "1")
    stored = (await request(nc, "STREAM.MSG.GET.orders_stream", {"seq": 2}))["message"]
    assert b"Nats-Msg-Id: orders_stream.1.retry-1\r\n" in base64.b64decode(stored["hdrs"])


async def test_what_cannot_be_printed_is_named_and_stays(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"order-0", b"order-1")
    manage_py = shlex.join([sys.executable, *MANAGE, "discard", "--all", "--yes"])
    script = await server.run("bash", "-c", f"{manage_py} >/dev/full")
    assert script.process.returncode == 1
    assert len(script.found("# . in orders_stream is skipped: it could not be printed: No space left on device")) == 2
    assert await messages(nc, "orders_stream") == 2


async def test_advisories_that_expire_in_the_meantime_hang_nothing(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(10)))
    await create_durable(nc, filter_subject="$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.orders_stream.another")
    script = await server.run(*MANAGE, "retry", "3")
    assert script.found("redriven order-2: .*|# 3 in orders_stream is skipped: .*")


async def test_each_of_two_durables_has_its_own_dead_letters(server: Server, nc: Client) -> None:
    """Whatever durable an advisory names."""
    for name in ("a", "b"):
        config = {"durable_name": name, "filter_subject": f"orders.{name}", "ack_policy": "explicit", "max_deliver": 1}
        made = {"stream_name": "orders_stream", "config": config | {"ack_wait": 10**8}}
        assert "error" not in await request(nc, f"CONSUMER.CREATE.orders_stream.{name}.orders.{name}", made)
    await publish(nc, b"order-0", b"order-1", subject="orders.b")
    await pull(nc, "orders_stream", "b", 2)
    await until(lambda: holds(nc, "orders_unprocessed", 2))
    await request(nc, "STREAM.PURGE.orders_unprocessed")
    forged = advisory(consumer="a", deliveries=1, timestamp="0001-01-01T00:00:00Z")
    await publish(nc, forged, subject=f"{ADVISORIES}.a")
    assert [one["sequence"] for one in await listed(server)] == [1, 2]
    await manage(server, "list")
    await manage(server, "retry", "1")
    await manage(server, "discard", "2")
    assert [await messages(nc, stream) for stream in BOTH] == [1, 0]


async def test_on_replicas_all_commands_work(tmp_path: Path) -> None:
    async with clustered(tmp_path) as (cluster, nc):
        await dead_letters(nc, b"lost-0", b"lost-1")
        await request(nc, "STREAM.PURGE.orders_unprocessed")
        await dead_letters(nc, b"dead-2", b"dead-3")
        await publish(nc, b"alive")
        assert [one["sequence"] for one in await listed(cluster)] == [1, 2, 3, 4]
        await manage(cluster, "retry", "1")
        await manage(cluster, "retry", "3")
        await manage(cluster, "discard", "--all", "--yes")
        await until(lambda: holds(nc, "orders_stream", 3))
        await until(lambda: holds(nc, "orders_unprocessed", 0))


async def test_others_are_left_to_dlq_processors_at_once(server: Server, nc: Client) -> None:
    await dead_letters(nc, *(b"order-%d" % i for i in range(20)))
    await manage(server, "retry", "20")
    info = await durable_info(nc, "orders_unprocessed", DLQ_DURABLE)
    assert info["num_ack_pending"] == 19
    subscription = await pull(nc, "orders_unprocessed", DLQ_DURABLE, 19)
    for _ in range(19):
        await subscription.next_msg(5)


async def test_the_state_of_a_queue(server: Server, nc: Client) -> None:
    await dead_letters(nc, b"dead-0", b"dead-1", backoff=0.1)
    await publish(nc, b"order-2", b"order-3")
    assert json.loads((await manage(server, "status", "--json")).lines[0]) == {
        **{"waiting": 2, "pending": 0, "dead": 2, "untaken": 0, "pull_requests": 0, "paused": []},
        "oldest": (await state(nc, "orders_stream"))["first_ts"],
        "streams": {
            stream: {"messages": found["messages"], "bytes": found["bytes"], "full": pytest.approx(0, abs=0.001)}
            for stream in BOTH
            if (found := await state(nc, stream))
        },
    }
    lines = (await manage(server, "status")).lines
    assert lines[:2] == ["waiting        2", "pending        0"]
    assert lines[-1].startswith("orders_unprocessed: 2 messages, ")
    await request(nc, "CONSUMER.DELETE.orders_stream.processor")
    config = {"durable_name": "processor", "ack_policy": "explicit", "filter_subject": "orders.other"}
    made = {"stream_name": "orders_stream", "config": config}
    assert "error" not in await request(nc, "CONSUMER.CREATE.orders_stream.processor.orders.other", made)
    await publish(nc, b"order-4", subject="orders.other")
    status = json.loads((await manage(server, "status", "--json")).lines[0])
    assert [status[field] for field in ("waiting", "dead", "untaken")] == [1, 0, 4]
    await durable_info(nc, "orders_stream", "processor")
    await request(nc, "STREAM.PURGE.orders_stream")
    await emptied(nc, "orders_stream")
    assert json.loads((await manage(server, "status", "--json")).lines[0])["oldest"] is None
