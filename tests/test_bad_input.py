# ruff: noqa: E501  a command and its line are read side by side
"""Bad input gets one clear line and its exit status: 2 for usage, 1 otherwise."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
import trustme
from nats.aio.client import Client

from tests.harness import CONSUMER, DLQ, PUBLISHER, Server, emptied, publish, request, serving, silent_server, started

UNKNOWN_HOST = (
    "Name or service not known" if sys.platform == "linux" else "nodename nor servname provided, or not known"
)
SCRIPTS = [PUBLISHER, CONSUMER, DLQ]
URLS = "NATS_URL must be URLs such as nats://localhost:4222, with commas between them"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("publisher/publisher.py", "the following arguments are required: subject"),
        ("publisher/publisher.py|orders.*", "argument subject: 'orders.*' is not a subject to publish to, such as orders.new"),
        ("publisher/publisher.py|orders.new|--count|0", "argument --count: '0' is not a whole number of 1 or more"),
        ("publisher/publisher.py|orders.new|--interval|-1", "argument --interval: '-1' is not a number of 0 or more"),
        ("consumer/consumer.py", "the following arguments are required: stream, subject_filter"),
        ("consumer/consumer.py|orders_stream|orders.>.x", "argument subject_filter: 'orders.>.x' is not a subject filter, such as orders.*"),
        ("consumer/consumer.py|orders_stream|orders.*|--concurrency|" + 5000 * "9", f"argument --concurrency: '{200 * '9'}... (5000 in all)' is not a whole number from 1 to 500"),
        ("consumer/consumer.py|orders_stream|orders.*|--failure-rate|1.1", "argument --failure-rate: '1.1' is not a number from 0 to 1"),
        ("dlq/consumer.py", "the following arguments are required: dlq_stream, original_stream"),
    ],
)  # fmt: skip
async def test_wrong_usage(command: str, line: str) -> None:
    async with started(sys.executable, *command.split("|"), NATS_URL="nats://127.0.0.1:1") as script:
        assert await script.status() == 2
    assert script.lines[0].startswith("usage: ")
    assert script.lines[-1] == f"{Path(command.split('|')[0]).name}: error: {line}"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ("publisher/publisher.py", "payments.new"),
            "no stream takes the subject payments.new: create one with `scripts/create_orders_stream.sh STREAM payments.new`",
        ),
        (
            ("consumer/consumer.py", "payments", "payments.*"),
            "there is no stream payments: create it with `scripts/create_orders_stream.sh payments 'payments.*'`",
        ),
        (
            ("consumer/consumer.py", "orders_stream", "payments.*"),
            "orders_stream has no subject that payments.* matches: its subjects are orders.*",
        ),
        (
            ("dlq/consumer.py", "dead_payments", "orders_stream"),
            "there is no stream dead_payments: create it with `scripts/create_orders_unprocessed.sh dead_payments orders_stream`",
        ),
        (
            ("dlq/consumer.py", "orders_unprocessed", "payments"),
            "there is no stream payments: create it with `scripts/create_orders_stream.sh payments SUBJECTS`",
        ),
        (
            ("dlq/consumer.py", "orders_stream", "orders_unprocessed"),
            "orders_stream has no subject that $JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.orders_unprocessed.* matches: its subjects are orders.*",
        ),
        (
            ("dlq/consumer.py", "orders_unprocessed", "orders_unprocessed"),
            "orders_unprocessed has no subject that $JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.orders_unprocessed.* matches: its subjects are $JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.orders_stream.*",
        ),
    ],
)
async def test_what_is_not_there(server: Server, command: tuple[str, ...], line: str) -> None:
    script = await server.run(*command)
    assert (script.process.returncode, script.messages) == (1, [line])


async def test_another_filter_than_the_durables_is_refused(server: Server, nc: Client) -> None:
    """The server would skip what doesn't match, for good."""
    await publish(nc, b"order-0", subject="orders.urgent")
    await publish(nc, b"order-1")
    async with server.script(*CONSUMER[:2], "orders.new", "--failure-rate", "0") as first:
        await first.line("received order-1 .*")
        second = await server.run(*CONSUMER)
        assert (second.process.returncode, second.messages) == (
            1,
            [
                "the durable processor on orders_stream takes orders.new, not orders.*; all its processes share that. "
                "To change it, stop them, run `nats consumer rm -f orders_stream processor`, and start again: what was "
                "skipped is then delivered, and so are the dead letters"
            ],
        )
        await first.stop()
    removed = await server.run(*second.messages[0].split("`")[1].split())
    assert removed.process.returncode == 0
    async with server.script(*CONSUMER, "--failure-rate", "0"):
        await emptied(nc, "orders_stream")


async def test_a_filter_that_only_a_source_or_a_transform_can_match_is_taken(bare_server: Server, nc: Client) -> None:
    transform = {"src": "orders.new", "dest": "done.new"}
    config = {"name": "orders_stream", "subjects": ["orders.*"], "retention": "workqueue"}
    await request(nc, "STREAM.CREATE.orders_stream", config | {"subject_transform": transform})
    await bare_server.run("scripts/create_orders_unprocessed.sh")
    async with bare_server.script(*CONSUMER[:2], "done.*", "--failure-rate", "0") as consumer:
        await consumer.line(".* has no subject that done.* matches: .*, and those that it gets by its sources .*")
        await publish(nc, b"order-0")
        await consumer.line("received order-0 .*")


async def test_a_filter_that_overlaps_another_durables(server: Server, nc: Client) -> None:
    other = {"durable_name": "other", "ack_policy": "explicit", "filter_subject": "orders.new"}
    await request(
        nc, "CONSUMER.CREATE.orders_stream.other.orders.new", {"stream_name": "orders_stream", "config": other}
    )
    script = await server.run(*CONSUMER)
    assert (script.process.returncode, script.messages) == (
        1,
        [
            "cannot create the durable processor on orders_stream: "
            "filtered consumer not unique on workqueue stream (10100)"
        ],
    )


@pytest.mark.parametrize(
    ("command", "url", "line"),
    [
        *((one, "nats://127.0.0.1:1", "cannot connect to nats://127.0.0.1:1: Connection refused") for one in SCRIPTS),
        (
            PUBLISHER,
            "nats://me:secret@127.0.0.1:1,127.0.0.1:2",
            "cannot connect to nats://127.0.0.1:1, nats://127.0.0.1:2: Connection refused",
        ),
        (PUBLISHER, "nats://me:secret@a.invalid", f"cannot connect to nats://a.invalid:4222: {UNKNOWN_HOST}"),
        (CONSUMER, "nats://me:12#secret@127.0.0.1:1", URLS),
    ],
)
async def test_no_server(command: tuple[str, ...], url: str, line: str) -> None:
    async with asyncio.timeout(10), started(sys.executable, *command, NATS_URL=url) as script:
        assert await script.status() == 1
    assert script.messages == [line]


async def test_servers_that_do_not_answer() -> None:
    async with silent_server() as url, asyncio.timeout(12):
        urls = [url] * 5  # together they would take longer than the first connect may
        async with started(sys.executable, *PUBLISHER, NATS_URL=",".join(urls)) as script:
            assert await script.status() == 1
    assert script.messages == [f"cannot connect to {', '.join(urls)}: timed out"]


async def test_a_server_without_jetstream(tmp_path: Path) -> None:
    async with serving(tmp_path, jetstream=False) as server:
        for command in SCRIPTS:
            script = await server.run(*command)
            assert (script.process.returncode, script.messages) == (
                1,
                [f"{server.url} has no JetStream, or none for this account"],
            )


@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_tls_is_wanted_and_the_server_has_none(server: Server, tmp_path: Path, scheme: str) -> None:
    """What would go to the server in clear doesn't go there."""
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    env = {"NATS_CA": str(tmp_path / "ca.pem")} if scheme == "nats" else {}
    script = await server.run(*PUBLISHER, NATS_URL=f"{scheme}://me:secret@127.0.0.1:{server.port}", **env)
    assert (script.process.returncode, script.messages) == (
        1,
        [f"cannot connect to {scheme}://127.0.0.1:{server.port}: secure connection not available"],
    )


async def test_a_user_without_the_right_password(tmp_path: Path) -> None:
    async with serving(tmp_path, 'authorization { user: me, password: "p@ss/w:rd" }') as server:
        wrong = f"nats://me:secret@127.0.0.1:{server.port}"
        script = await server.run(*CONSUMER, NATS_URL=wrong)
        assert (script.process.returncode, script.messages) == (
            1,
            [
                f"cannot connect to {server.url}: Authorization Violation (are the credentials wrong, expired or revoked?)"
            ],
        )
        right = f"nats://me:p%40ss%2Fw%3Ard@127.0.0.1:{server.port}"
        await server.create_streams(NATS_URL=right)
        script = await server.run(*PUBLISHER, "--count", "1", NATS_URL=right)
        assert (script.process.returncode, script.messages) == (0, ["published order no. 0"])


async def test_payloads_stay_one_harmless_line(server: Server, nc: Client) -> None:
    payloads = {
        b"\x1b[31mred\x07": r"\x1b[31mred\x07",
        b"\xff\xfe": r"\xff\xfe",
        b"": "",
        b"x" * 1_000_000: "x" * 200 + r"\.\.\. \(1000000 in all\)",
    }
    escaped = [text if text.startswith("x") else re.escape(text) for text in payloads.values()]
    await publish(nc, *payloads)
    async with server.script(*CONSUMER, "--failure-rate", "0") as consumer:
        for line in escaped:
            await consumer.line(f"received {line} from stream sequence # .*")
        await emptied(nc, "orders_stream")
        assert len(consumer.lines) == len(payloads)
    await publish(nc, *payloads)
    async with server.script(*CONSUMER, "--failure-rate", "1") as consumer, server.script(*DLQ) as dlq:
        for line in escaped:
            await dlq.line(f"reprocessing order {line}")
            assert consumer.found(f"{line} will be processed via DLQ")
        assert len(dlq.lines) == len(payloads)
        assert len(consumer.lines) == 3 * len(payloads)
