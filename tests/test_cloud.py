"""The queue on a server like Synadia Cloud's, and what goes wrong there."""

import json
import re
import shlex
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from jobqueue.jetstream.streams import subjects_overlap
from tests.cloud import Cloud
from tests.harness import (
    ACKS_OF_VERSION_2,
    ADVISORIES,
    CONSUMER,
    DLQ,
    DOCS,
    MANAGE,
    PUBLISHER,
    ROOT,
    advisory,
    dead_letters,
    emptied,
    holds,
    knows_acks_of_version_2,
    messages,
    publish,
    request,
    started,
    until,
    waiting,
    with_body,
)

SCRIPTS = [PUBLISHER, CONSUMER, DLQ]
STREAM_SCRIPTS = ["scripts/create_orders_stream.sh", "scripts/create_orders_unprocessed.sh"]
WHO = "(are the credentials wrong, expired or revoked?)"


@asynccontextmanager
async def clouded(directory: Path, *, flags: str = "") -> AsyncIterator[Cloud]:
    server = Cloud(directory, flags=flags)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[Cloud]:
    async with clouded(tmp_path) as server:
        yield server


@pytest.fixture
async def cloud_with_acks_of_version_2(tmp_path: Path) -> AsyncIterator[Cloud]:
    if not knows_acks_of_version_2():
        pytest.skip("this nats-server doesn't know them")
    async with clouded(tmp_path, flags=ACKS_OF_VERSION_2) as server:
        yield server


async def test_the_walk_through(cloud: Cloud, tmp_path: Path) -> None:
    """With the article's command for the context, and the same .creds file for everything."""
    app = cloud.user("app.creds")
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "SSL_CERT_FILE": app["SSL_CERT_FILE"]}
    (command,) = re.findall(r"nats context save .*NGS.*", DOCS)
    save = command.replace("tls://connect.ngs.global", cloud.url).replace(
        "ABSOLUTE_PATH_TO_CREDS_FILE", app["NATS_CREDENTIALS_FILE_PATH"]
    )
    for natscli in (shlex.split(save), ["nats", "account", "info"]):
        async with started(*natscli, **home) as running:
            assert await running.status() == 0
    assert running.found(r" *Maximum Payload: 1\.0 MiB") and running.found(r"JetStream Account Information:")
    await cloud.create_streams(**app)
    async with cloud.script(*CONSUMER, "--failure-rate", "1", **app), cloud.script(*DLQ, **app) as dlq:
        publisher = await cloud.run(*PUBLISHER, "--count", "3", "--interval", "0", **app)
        assert publisher.messages == [f"published order no. {i}" for i in range(3)]
        await dlq.line("reprocessing order order-[012]", 3)
        async with cloud.client() as nc:
            await emptied(nc, "orders_stream", "orders_unprocessed")


async def test_an_order_may_have_a_mebibyte_with_its_header(cloud: Cloud, tmp_path: Path) -> None:
    app = cloud.user("app.creds")
    await cloud.create_streams(**app)
    header = len("NATS/1.0\r\nNats-Msg-Id: ") + 32 + len("-0\r\n\r\n")
    orders = tmp_path / "orders.txt"
    orders.write_bytes(b"x" * (2**20 - header) + b"\n" + b"x" * (2**20 - header + 1))
    publisher = await cloud.run(*PUBLISHER, "--interval", "0", "--input", str(orders), **app)
    assert sorted(publisher.messages) == [
        "1 of 2 orders are not published",
        "order no. 1 is not published: maximum payload exceeded",
        "published order no. 0",
    ]


async def test_credentials_that_are_no_good(cloud: Cloud, tmp_path: Path) -> None:
    cloud.user("app.creds")
    good = (tmp_path / "app.creds").read_text()
    (tmp_path / "no.seed").write_text(good[: good.index("-----BEGIN USER NKEY")])
    for name, line in {
        "missing": f"cannot read the credentials file {tmp_path}/missing: No such file or directory",
        "no.seed": f"{tmp_path}/no.seed is not a credentials file: it needs a user JWT and its seed",
    }.items():
        script = await cloud.run(*PUBLISHER, NATS_CREDENTIALS_FILE_PATH=str(tmp_path / name))
        assert (script.process.returncode, script.messages) == (1, [line])


@pytest.mark.parametrize("command", [*SCRIPTS, *[(script,) for script in STREAM_SCRIPTS]])
async def test_a_user_whom_the_server_does_not_let_in(cloud: Cloud, command: tuple[str, ...]) -> None:
    users = {
        "expired": cloud.user("expired.creds", expires=time.time() - 1),
        "revoked": cloud.user("revoked.creds"),
        "by a password": {"NATS_URL": cloud.url.replace("//", "//me:secret@"), "SSL_CERT_FILE": str(cloud.authority)},
    }
    await _change(cloud, revoked=["revoked.creds"])
    failed = f"cannot connect to {cloud.url}" if command in SCRIPTS else f"{_stream(command[0])} was not created"
    for user in users.values():
        script = await cloud.run(*command, **user)
        assert (script.process.returncode, script.messages) == (1, [f"{failed}: Authorization Violation {WHO}"])


async def test_a_certificate_of_another_host(cloud: Cloud) -> None:
    url = cloud.url.replace("127.0.0.1", "localhost")
    script = await cloud.run(*PUBLISHER, **cloud.user("app.creds"), NATS_URL=url)
    assert script.process.returncode == 1
    assert script.messages == [
        f"cannot connect to {url}: its certificate is not trusted: Hostname mismatch,"
        " certificate is not valid for 'localhost'."
    ]


async def test_a_certificate_that_nobody_trusts(cloud: Cloud) -> None:
    app = cloud.user("app.creds") | {"SSL_CERT_FILE": "/dev/null"}
    for command in SCRIPTS:
        script = await cloud.run(*command, **app)
        assert script.process.returncode == 1
        assert script.messages == [
            f"cannot connect to {cloud.url}: its certificate is not trusted: unable to get local issuer certificate"
            " (NATS_CA may name its authority)"
        ]
    for stream_script in STREAM_SCRIPTS:
        script = await cloud.run(stream_script, **app)
        assert script.process.returncode == 1
        assert len(script.lines) == 1
        assert "was not created" in script.lines[0] and "certificate" in script.lines[0]


@pytest.mark.parametrize("end", ["expired", "revoked"])
async def test_a_consumer_whose_credentials_end_uses_the_renewed_file(cloud: Cloud, end: str) -> None:
    await cloud.create_streams(**cloud.user("app.creds"))
    worker = cloud.user("worker.creds", expires=time.time() + 3 if end == "expired" else None)
    async with cloud.script(*CONSUMER, "--failure-rate", "0", **worker) as consumer, cloud.client() as nc:
        await publish(nc, b"order-0")
        await consumer.line("received order-0 .*")
        if end == "revoked":
            cloud.change(revoked=["worker.creds"])
        await consumer.line(rf"the server refused the connection: 'user authentication {end}'")
        await consumer.line("the server refused the connection: 'Authorization Violation'")
        Path(worker["NATS_CREDENTIALS_FILE_PATH"]).write_text("about to be replaced")
        cloud.user("worker.creds")
        await consumer.line("connected again")
        await publish(nc, b"order-1")
        await consumer.line("received order-1 .*")
        assert await consumer.stop() == 0


@pytest.mark.parametrize(
    ("command", "denied", "refused"),
    [
        (PUBLISHER, "orders.*", "orders.new"),
        (PUBLISHER, "$JS.API.INFO", "$js.api.info"),
        (CONSUMER, "$JS.API.CONSUMER.CREATE.>", "$js.api.consumer.create.orders_stream.processor.orders.*"),
        (CONSUMER, "$JS.API.CONSUMER.MSG.NEXT.>", "$js.api.consumer.msg.next.orders_stream.processor"),
        (CONSUMER, "$JS.ACK.>", "$js.ack.orders_stream.processor.1.0.0.0.0"),
        (DLQ, "$JS.API.CONSUMER.CREATE.>", "$js.api.consumer.create.orders_unprocessed.unprocessed_order_handler"),
        (DLQ, "$JS.ACK.orders_unprocessed.>", "$js.ack.orders_unprocessed.unprocessed_order_handler.1.0.0.0.0"),
        (DLQ, "$JS.ACK.orders_stream.>", "$js.ack.orders_stream.processor.1.0.0.0.0"),
        (DLQ, "$JS.API.CONSUMER.LIST.>", "$js.api.consumer.list.orders_stream"),
    ],
)
async def test_a_subject_that_the_user_may_not_publish_to(
    cloud: Cloud, command: tuple[str, ...], denied: str, refused: str
) -> None:
    """Nothing is worked on that could not be acknowledged then."""
    await cloud.create_streams(**cloud.user("app.creds"))
    async with cloud.client() as nc:
        if command != PUBLISHER:
            await publish(nc, b"order-0")
        if command == DLQ:
            await publish(nc, advisory(), subject=f"{ADVISORIES}.processor")
        for more in (("--count", "3"), ("--interval", "0")) if command == PUBLISHER else ((),):
            script = await cloud.run(*command, *more, **cloud.user("some.creds", publish={"deny": [denied]}))
            assert script.process.returncode == 1
            why = f'permissions violation for publish to "{refused}"'
            if command == PUBLISHER and denied == "orders.*":
                count = 3 if "--count" in more else 20
                lost = [f"order no. {number} is not published: {why}" for number in range(count)]
                lost += [f"the server refused: {why}"] * ("--interval" in more)
                assert sorted(script.messages) == sorted([*lost, f"{count} of {count} orders are not published"])
            elif command == PUBLISHER and "STREAM.NAMES" in denied:
                assert script.messages == [f"cannot tell whether a stream takes orders.new: {why}"]
            else:
                lines = [f'the server refused: {why} (in lower case; see "Permissions" in docs/deployment.md)']
                assert script.messages == lines
        assert await messages(nc, "orders_stream") == (command != PUBLISHER)


async def test_a_consumer_that_may_not_ask_for_streams_works_without_reasons(cloud: Cloud) -> None:
    await cloud.create_streams(**cloud.user("app.creds"))
    async with cloud.client() as nc:
        await publish(nc, b"order-0")
        user = cloud.user("some.creds", publish={"deny": ["$JS.API.STREAM.NAMES"]})
        async with cloud.script(*CONSUMER, "--failure-rate", "0", **user) as consumer:
            await consumer.line("cannot tell whether a stream keeps the advisories .*: permissions violation .*")
            await emptied(nc, "orders_stream")


async def test_an_operator_who_may_not_use_reasons_works_without(cloud: Cloud) -> None:
    await cloud.create_streams(**cloud.user("app.creds"))
    async with cloud.client() as nc:
        await cloud.run("scripts/create_orders_failures.sh", **cloud.user("app.creds"))
        await dead_letters(nc, *(b"order-%d" % number for number in range(20)))
        denied = [f"$JS.API.STREAM.{what}.orders_failures" for what in ("MSG.GET", "PURGE")]
        user = cloud.user("some.creds", publish={"deny": denied})
        listed = await cloud.run(*MANAGE, "list", **user)
        assert (listed.process.returncode, len(listed.lines)) == (0, 21)
        redriven = await cloud.run(*MANAGE, "retry", "--all", **user)
        assert redriven.found("20 dead letters redriven, 0 skipped")
        assert redriven.process.returncode == 0


async def test_a_user_who_may_not_look_at_streams(cloud: Cloud) -> None:
    await cloud.create_streams(**cloud.user("app.creds"))
    user = cloud.user("some.creds", publish={"deny": ["$JS.API.STREAM.INFO.*"]})
    script = await cloud.run(STREAM_SCRIPTS[0], "orders_stream", "orders.x.*", **user)
    assert script.process.returncode == 1
    assert script.lines == [
        "orders_stream exists with another configuration, and was not changed:"
        " could not request Stream info: context deadline exceeded"
    ]


async def test_a_user_who_may_not_create_streams(cloud: Cloud) -> None:
    user = cloud.user("some.creds", publish={"deny": ["$JS.API.STREAM.CREATE.*"]})
    script = await cloud.run(STREAM_SCRIPTS[0], **user)
    assert (script.process.returncode, script.lines) == (
        1,
        ["orders_stream was not created: timed out; may this user create streams?"],
    )


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"streams": 1}, "maximum number of streams reached (10027)"),
        ({"disk_storage": 255 * 2**20}, "insufficient storage resources available (10047)"),
        ({"disk_max_stream_bytes": 2**20}, "stream max bytes exceeds account limit max stream bytes (10122)"),
        ({"max_bytes_required": True}, ""),
    ],
)
async def test_what_the_account_limits_of_streams(cloud: Cloud, limits: dict[str, int], line: str) -> None:
    async with cloud.client() as nc:
        await request(nc, "STREAM.CREATE.other", {"name": "other", "storage": "file", "max_bytes": 2**20})
    await _change(cloud, **limits)
    for stream_script in STREAM_SCRIPTS:
        script = await cloud.run(stream_script, **cloud.user("app.creds"))
        if line:
            assert (script.process.returncode, script.lines) == (
                1,
                [f"{_stream(stream_script)} was not created: {line}"],
            )
        else:
            assert script.process.returncode == 0


async def test_what_the_account_limits_of_durables_and_storage(cloud: Cloud, tmp_path: Path) -> None:
    app = cloud.user("app.creds")
    await cloud.create_streams(**app)
    await _change(cloud, consumer=1, disk_storage=2**20)
    async with cloud.client() as nc:
        other = ConsumerConfig(name="other", ack_policy=AckPolicy.EXPLICIT, filter_subject="orders.other")
        await nc.jetstream().add_consumer("orders_stream", other)
    consumer = await cloud.run(*CONSUMER, **app)
    assert (consumer.process.returncode, consumer.messages) == (
        1,
        ["cannot create the durable processor on orders_stream: maximum consumers limit reached (10026)"],
    )
    orders = tmp_path / "orders.txt"
    orders.write_bytes(b"\n".join([b"x" * 400_000] * 4))
    publisher = await cloud.run(*PUBLISHER, "--interval", "0", "--input", str(orders), **app)
    assert publisher.process.returncode == 1
    assert publisher.messages == [
        *(f"published order no. {i}" for i in range(2)),
        *(f"order no. {i} is not published: resource limits exceeded for account (10002)" for i in range(2, 4)),
        "2 of 4 orders are not published",
    ]


async def test_an_account_may_limit_max_ack_pending(cloud: Cloud) -> None:
    app = cloud.user("app.creds")
    await cloud.create_streams(**app)
    await _change(cloud, max_ack_pending=500)
    async with cloud.client() as nc, cloud.script(*CONSUMER, "--failure-rate", "0", **app) as consumer:
        await publish(nc, b"order-0")
        await consumer.line("received order-0 .*")
        assert consumer.messages[0] == (
            "consumer max ack pending exceeds system limit of 500 (10121); "
            "orders that wait for a retry may block others"
        )
        assert await consumer.stop() == 0


ROLES = {
    name: [re.findall(r'"([^"]+)"', subjects) for subjects in re.findall(r"allow: \[(.*?)\]", permissions, re.S)]
    for name, permissions in re.findall(
        r"^      user: ([\w-]+),(.*?)^    \}$", (ROOT / "docs" / "server.conf").read_text(), re.M | re.S
    )
    if name != "admin"
}
SCRIPTED = [role for role in ROLES if role != "monitor"]


def _user(cloud: Cloud, role: str) -> dict[str, str]:
    """Make a user with just the permissions that docs/server.conf gives it."""
    may_publish, may_subscribe = ROLES[role]
    return cloud.user(role, publish={"allow": may_publish}, subscribe={"allow": may_subscribe})


async def test_the_permissions_in_the_docs_are_enough(cloud: Cloud, tmp_path: Path) -> None:
    await _work_with_the_permissions_of_the_readme(cloud, tmp_path)


async def test_the_permissions_in_the_docs_are_what_is_needed(
    cloud_with_acks_of_version_2: Cloud, tmp_path: Path
) -> None:
    """All of them, and no more: whatever they allow is made use of, and what a reconnect needs in the test below."""
    allowed = {subject for role in SCRIPTED for cell in ROLES[role] for subject in cell if "DIRECT.GET" not in subject}
    seen = await _work_with_the_permissions_of_the_readme(cloud_with_acks_of_version_2, tmp_path)
    assert {one for one in allowed if not any(subjects_overlap(one, other) for other in seen)} == set()


async def _work_with_the_permissions_of_the_readme(cloud: Cloud, tmp_path: Path) -> set[str]:
    """Do all that the scripts do, and return the subjects that were published to."""
    seen: set[str] = set()

    async def see(message: Msg) -> None:
        seen.add(message.subject)
        seen.add(message.reply)

    async def is_published() -> bool:
        return lost in seen

    lost = f"{ADVISORIES}.processor"
    admin = cloud.user("admin.creds")
    consumer = with_body(
        CONSUMER[0], "process", "await asyncio.sleep(0.6)\n    assert order.data != b'order-1'", tmp_path
    )
    dlq_script = with_body(DLQ[0], "reprocess", "await asyncio.sleep(0.6)", tmp_path)
    publisher, worker, dlq_processor, operator = (_user(cloud, role) for role in SCRIPTED)
    async with cloud.client("admin.creds") as nc:
        for subject in ("orders.*", "$JS.>", "failures.>"):
            await nc.subscribe(subject, cb=see)
        assert (await cloud.run("scripts/create_orders_failures.sh", **admin)).process.returncode == 0
        assert (await cloud.run(STREAM_SCRIPTS[0], **admin)).process.returncode == 0
        published = await cloud.run(*PUBLISHER, "--count", "2", "--interval", "0", **publisher)
        assert published.process.returncode == 0
        async with cloud.script(consumer, *CONSUMER[1:], **worker) as running:
            await running.line("order-1 will be processed via DLQ")
            # The server's advisory is lost. So the DLQ processor publishes one.
            await until(is_published)
            seen.remove(lost)
            assert (await cloud.run(STREAM_SCRIPTS[1], **admin)).process.returncode == 0
            await publish(nc, advisory(consumer="other"), subject=f"{ADVISORIES}.other")
            async with cloud.script(dlq_script, *DLQ[1:], **dlq_processor) as dlq:
                await dlq.line("reprocessing order order-1")
                await emptied(nc, "orders_stream", "orders_unprocessed")
                assert await dlq.stop() == 0
            await publish(nc, b"order-1", b"order-1", b"order-1")
            await running.line("order-1 will be processed via DLQ", 4)
            assert await running.stop() == 0
        await _manage_all(cloud, nc, operator)
    assert dlq.found("nothing to reprocess: .*") == [
        "nothing to reprocess: stream sequence # 1 in orders_stream is gone"
    ]
    assert len(dlq.lines) == 5, dlq.lines
    return seen


async def _manage_all(cloud: Cloud, nc: Client, operator: dict[str, str]) -> None:
    """Send back and discard three dead letters, one of which has no advisory."""
    await until(lambda: holds(nc, "orders_unprocessed", 3))
    await request(nc, "STREAM.PURGE.orders_unprocessed", {"keep": 2})
    await request(nc, "CONSUMER.DELETE.orders_unprocessed.unprocessed_order_handler")
    listed = await cloud.run(*MANAGE, "list", "--json", **operator)
    sequences = [str(json.loads(line)["sequence"]) for line in listed.lines if line.startswith("{")]
    assert len(sequences) == 3
    for command in (("retry", sequences[1]), ("retry", sequences[0]), ("discard", sequences[2])):
        assert (await cloud.run(*MANAGE, *command, **operator)).process.returncode == 0
    assert [await messages(nc, stream) for stream in ("orders_stream", "orders_unprocessed")] == [2, 0]


async def test_what_may_not_be_acked_by_the_servers_form_is_not_worked_on(
    cloud_with_acks_of_version_2: Cloud, tmp_path: Path
) -> None:
    """The user may ack by version 1 alone, as was enough before the server was changed."""
    cloud = cloud_with_acks_of_version_2
    await cloud.create_streams(**cloud.user("app.creds"))
    async with cloud.client() as nc:
        await publish(nc, *(b"order-%d" % i for i in range(50)))
        user = cloud.user("some.creds", publish={"deny": ["$JS.ACK.*.*.orders_stream.processor.>"]})
        consumer = await cloud.run(*CONSUMER, "--concurrency", "20", "--failure-rate", "0", **user)
        assert consumer.process.returncode == 1
        (line,) = consumer.messages
        assert re.match(r'the server refused: permissions violation for publish to "\$js\.ack\._\.\w+\.orders_', line)
        delivered = (await request(nc, "CONSUMER.INFO.orders_stream.processor"))["delivered"]["consumer_seq"]
        assert delivered == 1  # each delivery costs an order an attempt


@pytest.mark.parametrize("role", ["consumer", "dlq-processor"])
@pytest.mark.parametrize("may_verify", [True, False])
async def test_a_worker_with_the_permissions_of_the_readme_verifies_after_a_reconnect(
    cloud: Cloud, tmp_path: Path, role: str, may_verify: bool
) -> None:
    await cloud.create_streams(**cloud.user("admin.creds"))
    go = tmp_path / "go"
    body = f'log.info("began")\n    {waiting(go)}'
    command = CONSUMER if role == "consumer" else DLQ
    script = with_body(command[0], "process" if role == "consumer" else "reprocess", body, tmp_path)
    may_publish, may_subscribe = ROLES[role]
    allowed = [subject for subject in may_publish if may_verify or "DIRECT.GET" not in subject]
    user = cloud.user("some.creds", publish={"allow": allowed}, subscribe={"allow": may_subscribe})
    async with cloud.client() as nc:
        await (publish if role == "consumer" else dead_letters)(nc, b"order-0")
    async with cloud.script(script, *command[1:], **user) as running:
        await running.line("began")
        await cloud.restart()
        await running.line("connected again")
        if may_verify:
            go.touch()
            async with cloud.client() as nc:
                await emptied(nc, "orders_stream", "orders_unprocessed")
            assert await running.stop() == 0
        else:
            await running.line("the server refused: .*")
            assert await running.status() == 1


async def test_the_permissions_in_the_docs_allow_nothing_else(cloud: Cloud) -> None:
    """No other stream can be read, none be changed or deleted, and nobody else's answers be listened to."""
    await cloud.create_streams(**cloud.user("app.creds"))
    for role in ROLES:
        _user(cloud, role)
        refused: list[str] = []

        async def see(error: Exception) -> None:
            refused.append(str(error))  # noqa: B023  each client is closed before the next one is made

        async def are_all_refused() -> bool:
            return len(refused) >= len(forbidden) + 5  # noqa: B023

        async with cloud.client(role, error_cb=see) as nc:
            streams = ["secrets"] + ([] if role in ("dlq-processor", "operator", "monitor") else ["orders_unprocessed"])
            forbidden = [
                *(f"$JS.API.STREAM.{what}.{stream}" for what in ("MSG.GET", "INFO") for stream in streams),
                *(f"$JS.API.DIRECT.GET.{stream}" for stream in streams),
                *(f"$JS.API.CONSUMER.CREATE.{stream}.mine" for stream in streams),
                *(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.mine" for stream in streams),
                *(
                    f"$JS.API.STREAM.{what}.{stream}"
                    for what in ("DELETE", "PURGE", "MSG.DELETE", "UPDATE", "CREATE")
                    for stream in ("orders_stream", "orders_unprocessed", "secrets")
                ),
                "$JS.API.STREAM.DELETE.orders_failures",
                *(f"$JS.API.STREAM.{what}.orders_failures" for what in ("MSG.GET", "PURGE") if role != "operator"),
                "$JS.API.CONSUMER.DELETE.orders_stream.processor",
                "secrets.new",
            ]
            for subject in forbidden:
                await nc.publish(subject, b"{}")
            await nc.flush()
            for subject in ("orders.*", "_INBOX.>", "_INBOX.somebody.*", "$JS.>", ">"):
                await nc.subscribe(subject)
            await nc.flush()
            await until(are_all_refused)


def _stream(script: str) -> str:
    return Path(script).stem.removeprefix("create_")


async def _change(cloud: Cloud, **what: Any) -> None:
    """Change the account, and wait until the server knows of it."""

    async def is_known() -> bool:
        return "Reloaded server configuration" in (cloud.directory / "log").read_text()

    cloud.change(**what)
    await until(is_known)
