"""The streams and the durables are the article's."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import trustme
from nats.aio.client import Client

from tests.harness import (
    CONSUMER,
    DLQ,
    PUBLISHER,
    ROOT,
    Script,
    Server,
    durable_info,
    messages,
    request,
    serving,
    started,
)

ARTICLE = {
    "subjects": ["orders.*"],
    "retention": "workqueue",
    "max_consumers": -1,
    "max_msgs": -1,
    "max_msgs_per_subject": -1,
    "max_bytes": 256 * 1024 * 1024,
    "max_age": 0,
    "max_msg_size": 1024 * 1024,
    "storage": "file",
    "discard": "new",
    "num_replicas": 1,
    "duplicate_window": 120 * 10**9,
    "sealed": False,
    "deny_delete": True,
    "deny_purge": False,
    "allow_rollup_hdrs": False,
    "allow_direct": True,
    "mirror_direct": False,
}
SERVERS_OWN = {"name", "metadata", "compression", "consumer_limits", "persist_mode"}


FAILURES = {
    "subjects": ["failures.orders_stream.*"],
    "retention": "limits",
    "max_msgs_per_subject": 1,
    "max_bytes": 64 * 1024 * 1024,
    "max_age": 30 * 24 * 3600 * 10**9,
    "max_msg_size": -1,
    "discard": "old",
    "deny_delete": False,
}


@pytest.mark.parametrize(
    ("stream", "config"),
    [
        ("orders_stream", ARTICLE),
        (
            "orders_unprocessed",
            ARTICLE | {"subjects": ["$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.orders_stream.*"], "max_msg_size": -1},
        ),
        ("orders_failures", ARTICLE | FAILURES),
    ],
)
async def test_a_stream_has_the_articles_configuration(
    bare_server: Server, nc: Client, stream: str, config: dict[str, Any]
) -> None:
    """The stream of the reasons is no part of the article."""
    created = await bare_server.run(f"scripts/create_{stream}.sh")
    assert created.lines[0] == f"Stream {stream} was created"
    found = (await request(nc, f"STREAM.INFO.{stream}"))["config"]
    # A newer server has more to say, but nothing of that may be switched on.
    assert {key: value for key, value in found.items() if key in config or value} == config | {
        key: found[key] for key in SERVERS_OWN if found.get(key)
    }


@pytest.mark.parametrize(
    ("script", "stream", "config"),
    [
        (
            CONSUMER,
            "orders_stream",
            {
                "name": "processor",
                "durable_name": "processor",
                "description": "Orders processor",
                "filter_subject": "orders.*",
            },
        ),
        (
            DLQ,
            "orders_unprocessed",
            {
                "name": "unprocessed_order_handler",
                "durable_name": "unprocessed_order_handler",
                "description": "handle unprocessed jobs",
            },
        ),
    ],
)
async def test_a_durable_has_the_articles_configuration(
    server: Server, nc: Client, script: tuple[str, ...], stream: str, config: dict[str, Any]
) -> None:
    async with server.script(*script) as running:
        found = (await durable_info(nc, stream, config["name"]))["config"]
        assert await running.stop() == 0
    found.pop("metadata", None)
    found.pop("pause_until", None)
    assert found == config | {
        "ack_policy": "explicit",
        "ack_wait": 5 * 10**9,
        "backoff": [5 * 10**9],
        "max_deliver": 2 if stream == "orders_stream" else -1,
        "deliver_policy": "all",
        "replay_policy": "instant",
        "max_ack_pending": 100_000,
        "max_waiting": 512,
        "num_replicas": 0,
    }


async def run(*command: str | Path, **env: str) -> Script:
    """Run a command that needs no server until it ends."""
    async with started(*command, **env) as script:
        await script.status()
        return script


NAMES = r"a stream needs a name without spaces, control characters and . * > / \, and without - or @ before it"
SCRIPTS = [
    "scripts/create_orders_stream.sh",
    "scripts/create_orders_unprocessed.sh",
    "scripts/create_orders_failures.sh",
]


@pytest.mark.parametrize("script", SCRIPTS)
async def test_a_stream_script_may_be_run_again(bare_server: Server, script: str) -> None:
    for _ in range(2):
        created = await bare_server.run(script)
        assert created.process.returncode == 0, created.lines


async def test_the_stream_of_the_reasons_may_have_another_name(bare_server: Server, nc: Client) -> None:
    """It then keeps the last reason of each message of another stream."""
    created = await bare_server.run(SCRIPTS[2], "emails_failures", "emails_stream")
    assert created.process.returncode == 0, created.lines
    js = nc.jetstream()
    for subject, reason in (("1", b"first"), ("2", b"other"), ("1", b"last")):
        await js.publish(f"failures.emails_stream.{subject}", reason)
    assert await messages(nc, "emails_failures") == 2
    assert (await js.get_last_msg("emails_failures", "failures.emails_stream.1")).data == b"last"


async def test_a_stream_with_another_configuration_is_left_as_it_is(bare_server: Server, nc: Client) -> None:
    await request(
        nc,
        "STREAM.CREATE.orders_stream",
        {"name": "orders_stream", "subjects": ["orders.*"], "retention": "workqueue", "max_bytes": 1024},
    )
    before = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    script = await bare_server.run("scripts/create_orders_stream.sh")
    assert script.process.returncode == 1
    assert script.lines == [
        "orders_stream exists with another configuration, and was not changed: max_bytes is 1024 instead of"
        " 268435456; max_msg_size is -1 instead of 1048576; discard is"
        ' "old" instead of "new"; deny_delete is false instead of true; allow_direct is false instead of true'
    ]
    assert (await request(nc, "STREAM.INFO.orders_stream"))["config"] == before


async def test_a_stream_script_may_be_run_by_a_symbolic_link(bare_server: Server, tmp_path: Path) -> None:
    (tmp_path / "create").symlink_to(ROOT / SCRIPTS[0])
    created = await bare_server.run(tmp_path / "create")
    assert created.process.returncode == 0, created.lines


async def test_a_user_in_one_of_several_urls_is_the_user_of_all(tmp_path: Path) -> None:
    async with serving(tmp_path, 'authorization { user: me, password: "p@ss" }') as server:
        urls = f"nats://me:p%40ss@127.0.0.1:1,127.0.0.1:1,nats://127.0.0.1:{server.port}/"
        created = await server.run(SCRIPTS[0], NATS_URL=urls)
        assert created.process.returncode == 0, created.lines
        publisher = await server.run(*PUBLISHER, "--count", "1", NATS_URL=urls)
        assert publisher.process.returncode == 0, publisher.lines


@pytest.mark.parametrize("script", SCRIPTS)
async def test_replicas_are_what_the_variable_says(bare_server: Server, script: str) -> None:
    three = await bare_server.run(script, REPLICAS="3")
    assert three.process.returncode == 1
    assert three.lines[0].endswith("was not created: replicas > 1 not supported in non-clustered mode (10074)")
    many = await bare_server.run(script, REPLICAS="many")
    assert (many.process.returncode, many.lines) == (2, ["REPLICAS must be a number from 1 to 5"])


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        (SCRIPTS[0], ["a"], f"usage: {SCRIPTS[0]} [STREAM SUBJECTS]"),
        (SCRIPTS[1], ["a", "b", "c"], f"usage: {SCRIPTS[1]} [DLQ_STREAM ORIGINAL_STREAM]"),
        *(
            (SCRIPTS[0], [name, "a.*"], NAMES)
            for name in ("", "-a", "@a", "a b", "a\nb", "a.b", "a*", ">", "a/b", "a\\b")
        ),
        (SCRIPTS[2], ["a"], f"usage: {SCRIPTS[2]} [FAILURES_STREAM STREAM]"),
        *((script, ["a", "b c"], NAMES) for script in SCRIPTS[1:]),
        *(
            (SCRIPTS[0], ["a", subjects], "SUBJECTS must be a subject such as orders.*")
            for subjects in ("", "a b", "a,b")
        ),
    ],
)
async def test_wrong_usage_of_a_stream_script(script: str, arguments: list[str], line: str) -> None:
    wrong = await run(script, *arguments)
    assert (wrong.process.returncode, wrong.lines) == (2, [line])


@pytest.mark.parametrize("script", SCRIPTS)
async def test_a_stream_script_without_natscli_says_how_to_get_it(tmp_path: Path, script: str) -> None:
    # The script as it is, where no .venv is beside it and no nats is on the PATH.
    (tmp_path / "scripts").mkdir()
    for file in ("natscli.sh", "help.sh", Path(script).name):
        shutil.copy(ROOT / "scripts" / file, tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "readlink"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    missing = await run(tmp_path / script, PATH=str(tools))
    assert missing.process.returncode == 1
    assert missing.lines == [
        "natscli (the command nats) is missing: run scripts/setup.sh, or see https://github.com/nats-io/natscli"
    ]


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("nats://me:secret@127.0.0.1:1", "no servers available for connection"),
        ("nats://me:secret@127.0.0.1:port", "NATS_URL must be URLs such as nats://localhost:4222, with commas"),
        ("nats://me:12@secret,x@127.0.0.1:1", "NATS_URL must be URLs such as nats://localhost:4222, with commas"),
        (
            "nats://me:1@127.0.0.1:1,nats://you:secret@127.0.0.1:1",
            "NATS_URL has two users in it: one is for all servers",
        ),
    ],
)
async def test_a_stream_script_tells_no_password(url: str, line: str) -> None:
    script = await run(SCRIPTS[0], NATS_URL=url)
    assert script.process.returncode == 1
    assert len(script.lines) == 1
    assert line in script.lines[0]
    assert "secret" not in script.lines[0]


async def test_the_stream_scripts_go_where_the_python_scripts_go(bare_server: Server, tmp_path: Path) -> None:
    """Whatever context is selected, and whatever natscli's other variables say."""
    home = {"HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "home")}
    elsewhere = "nats://127.0.0.1:1"
    saved = await bare_server.run("nats", "context", "save", "elsewhere", "--server", elsewhere, "--select", **home)
    assert saved.process.returncode == 0
    others = {"NATS_CONTEXT": "elsewhere", "NATS_USER": "somebody", "NATS_CREDS": "/nowhere"}
    await bare_server.create_streams(**home, **others)
    published = await bare_server.run(*PUBLISHER, "--count", "1", **home, **others)
    assert published.process.returncode == 0


@pytest.mark.parametrize("authority", ["NATS_CA", "SSL_CERT_FILE"])
async def test_a_stream_script_shows_its_client_certificate(tmp_path: Path, authority: str) -> None:
    ca, files = trustme.CA(), {name: str(tmp_path / f"{name}.pem") for name in ("authority", "server", "client", "key")}
    ca.cert_pem.write_to_path(files["authority"])
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(files["server"])
    client = ca.issue_cert("client@example.com")
    client.cert_chain_pems[0].write_to_path(files["client"])
    client.private_key_pem.write_to_path(files["key"])
    tls = f'cert_file: "{files["server"]}", key_file: "{files["server"]}", ca_file: "{files["authority"]}"'
    async with serving(tmp_path / "server", f"tls {{ {tls}, verify: true }}") as server:
        env = {"NATS_URL": f"tls://127.0.0.1:{server.port}", authority: files["authority"]}
        refused = await server.run(SCRIPTS[0], **env)
        assert refused.process.returncode == 1
        created = await server.run(SCRIPTS[0], NATS_CERT=files["client"], NATS_KEY=files["key"], **env)
        assert created.process.returncode == 0, created.lines
