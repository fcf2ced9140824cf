"""What the README and the docs show: their commands, examples, files and links."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import kubernetes_validate
import pytest
import yaml
from nats.aio.client import Client

from jobqueue.connection.connecting import CLOSE_TIMEOUT
from jobqueue.worker.pulling import PULL_EXPIRES
from jobqueue.worker.worker import SHUTDOWN_CONFIRM_TIME
from tests.harness import (
    BIN,
    CONSUMER,
    DLQ,
    DOCS,
    ROOT,
    Server,
    edited,
    emptied,
    example,
    has_in_flight,
    messages,
    publish,
    request,
    started,
    until,
    with_body,
)

MARKDOWN = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def anchors(file: Path) -> set[str]:
    """Return the anchors of a file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", file.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def as_pattern(line: str) -> str:
    """Return the pattern of the lines that differ from one in the README in their numbers only."""
    return re.sub(r"\d+", r"\\d+", re.escape(line.removeprefix(line[:20])))


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: file.name)
def test_every_link_leads_somewhere(file: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_every_script_that_is_named_is_there() -> None:
    named = set(re.findall(r"(?<![\w./-])[\w./]*\b\w+/[\w/]+\.(?:py|sh)\b", re.sub(r"https://[^)\s]+", "", DOCS)))
    named = {path.removeprefix("../") for path in named if not path.startswith(("emails/", "/"))}
    assert {"publisher/publisher.py", "consumer/consumer.py", "dlq/consumer.py", "./scripts/demo.sh"} <= named
    assert not [path for path in named if not (ROOT / path).is_file()]


def test_every_flag_of_the_streams_is_explained() -> None:
    for script, count in {"stream": 14, "unprocessed": 14, "failures": 13}.items():
        file = ROOT / "scripts" / f"create_orders_{script}.sh"
        flags = re.findall(r"^    (--[\w-]+)", file.read_text(), re.MULTILINE)
        assert len(flags) == count
        assert not [flag for flag in flags if f"| `{flag}" not in DOCS]


async def test_the_readmes_walk_through(bare_server: Server, nc: Client) -> None:
    """Its commands, and lines that differ from its outputs in their numbers only."""
    readme = (ROOT / "README.md").read_text().partition("## Your own work")[0]
    steps = re.findall(r"\*\*\d\. .*?```shell\n(.*?)```\n(?:\n```\n(.*?)```)?", readme, re.S)
    commands = [step[0].splitlines() for step in steps]
    assert [len(lines) for lines in commands] == [1, 2, 1, 1, 1, 1]
    assert commands[0][0].startswith("nats-server ")
    for line, output in zip(commands[1], ("Stream orders_stream", "Stream orders_unprocessed"), strict=True):
        created = await bare_server.run(*shlex.split(line))
        assert created.lines[0] == f"{output} was created"
    publisher, consumer, manage, dlq = ([sys.executable, *shlex.split(lines[0])[1:]] for lines in commands[2:])
    published = await bare_server.run(*publisher)
    for line in steps[2][1].splitlines():
        assert line == "..." or published.found(as_pattern(line))
    async with started(*consumer, NATS_URL=bare_server.url) as consuming:
        for line in steps[3][1].splitlines():
            assert line == "..." or await consuming.line(as_pattern(line))
        listed = await bare_server.run(*manage)
        head, row = steps[4][1].splitlines()
        assert listed.lines[0] == head
        assert re.fullmatch(r" +\d+ +orders.new +[\d-]+ [\d:]+ +[\d-]+ [\d:]+ +\d +\w+-\d+ +order-\d+", row)
        assert re.fullmatch(r" +\d+ +orders.new +[\d-]+ [\d:]+ +[\d-]+ [\d:]+ +\d +\w+-\d+ +order-\d+", listed.lines[1])
        async with started(*dlq, NATS_URL=bare_server.url) as reprocessing:
            await reprocessing.line(as_pattern(steps[5][1].splitlines()[0]))
            await emptied(nc, "orders_stream", "orders_unprocessed")
            assert await reprocessing.stop() == await consuming.stop() == 0
    shutting_down, stopped = re.findall(r"^\d.*(?:shutting down|stopped): .*$", readme, re.M)
    assert consuming.found(as_pattern(shutting_down))
    assert consuming.found(as_pattern(stopped))


async def test_the_readmes_own_work(server: Server, nc: Client, tmp_path: Path) -> None:
    consumer = edited(CONSUMER[0], example("sending an e-mail"), tmp_path)
    await publish(nc, b'{"to": "ann\\n", "text": "Welcome"}')
    async with server.script(consumer, *CONSUMER[1:]) as running:
        await running.line(r"sending an e-mail to ann\\n")
        await emptied(nc, "orders_stream")


@pytest.mark.parametrize("name", ["web shop", "caf\u00e9", "a..b.>", "*"])
async def test_a_connection_may_have_any_name(server: Server, tmp_path: Path, name: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(example("def welcome").replace("emails.new", "orders.new").replace('"shop"', repr(name)))
    published = await server.run(str(program))
    assert (published.process.returncode, published.lines) == (0, [])


async def test_publishing_from_a_program(server: Server, nc: Client, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(example("def welcome").replace("emails.new", "orders.new"))
    for _ in range(2):
        assert (await server.run(str(program))).process.returncode == 0
    assert await messages(nc, "orders_stream") == 1
    config = (await request(nc, "STREAM.INFO.orders_stream"))["config"]
    await request(nc, "STREAM.DELETE.orders_stream")
    await request(nc, "STREAM.CREATE.orders_stream", config | {"max_msg_size": 1})
    failed = await server.run(str(program))
    assert (failed.process.returncode, failed.lines[-1]) == (1, "not stored")


async def test_a_fastapi_application_publishes(server: Server, nc: Client, tmp_path: Path) -> None:
    code = example("FastAPI(").replace("emails.new", "orders.new")
    (tmp_path / "app.py").write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uvicorn = (sys.executable, "-m", "uvicorn", "app:app", "--port", str(port))
    email = {"to": "ann", "text": "Welcome"}
    async with (
        started(*uvicorn, cwd=tmp_path, NATS_URL=server.url) as app,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as web,
    ):
        await app.line(r"INFO: +Uvicorn running on .*")
        assert set((await web.post("/emails", json=email)).json()) == {"id"}
        for _ in range(2):
            answer = await web.post("/emails", json=email, headers={"Idempotency-Key": "welcome-ann"})
            assert (answer.status_code, answer.json()) == (202, {"id": "welcome-ann"})
        assert await messages(nc, "orders_stream") == 2
        await server.stop()
        assert (await web.post("/emails", json=email)).status_code == 503
        await server.start()
        assert (await web.post("/emails", json=email)).status_code == 202
        await app.stop()
        assert app.found("INFO: +Application shutdown complete.")


async def test_an_order_for_later(bare_server: Server, nc: Client) -> None:
    later, *_ = example("--allow-schedules").splitlines()
    created = await bare_server.run(*shlex.split(later))
    if created.process.returncode:
        pytest.skip("this nats-server knows no message schedules")
    at = datetime.now(UTC) + timedelta(seconds=2)
    command = re.sub(r"@at [^\"]+", f"@at {at:%Y-%m-%dT%H:%M:%SZ}", example("Nats-Schedule:"))
    for order in ("order-42", "order-43"):
        published = await bare_server.run(*shlex.split(command.replace("order-42", order)))
        assert published.process.returncode == 0, published.lines
    async with bare_server.script(CONSUMER[0], "later_stream", "later.due", "--failure-rate", "0") as consumer:
        await consumer.line("received order-43 .*")
        assert datetime.now(UTC) >= at.replace(microsecond=0)
        await emptied(nc, "later_stream")
        assert not consumer.found("received order-42 .*")


async def test_the_services_run_and_have_the_time_to_stop(server: Server, nc: Client, tmp_path: Path) -> None:
    (start,) = re.findall(r"ExecStart=\S+ (.*)", DOCS)
    (command,) = re.findall(r'command: \["python", (.*)\]', DOCS)
    assert shlex.split(start) == json.loads(f"[{command}]")
    script, *arguments = shlex.split(start)
    longest = float(arguments[arguments.index("--time-limit") + 1])
    for seconds in re.findall(r"(?:TimeoutStopSec=|terminationGracePeriodSeconds: )(\d+)", DOCS):
        assert float(seconds) >= 2 * longest + max(SHUTDOWN_CONFIRM_TIME, PULL_EXPIRES) + CLOSE_TIMEOUT
    await publish(nc, b"order-0")
    consumer = with_body(script, "process", "log.info('began')\n    await asyncio.sleep(4)", tmp_path)
    async with server.script(consumer, *arguments) as running:
        await running.line("began")
        assert await running.stop() == 0
    assert running.messages[-1] == "stopped: 1 orders processed, 0 deliveries failed"


async def test_the_systemd_unit_is_valid(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd")
    unit = example("[Service]").replace("/opt/nats-job-queue/.venv", sys.prefix)
    unit = unit.replace("/opt/nats-job-queue", str(ROOT)).replace("User=orders", "User=root")
    (tmp_path / "orders-consumer@.service").write_text(unit)
    async with started("systemd-analyze", "verify", tmp_path / "orders-consumer@.service") as verified:
        assert await verified.status() == 0
    assert not verified.lines


async def test_the_kubernetes_manifest_is_valid_and_its_probe_tells_a_blocked_event_loop(
    server: Server, nc: Client, tmp_path: Path
) -> None:
    manifest = yaml.safe_load(example("livenessProbe"))
    kubernetes_validate.validate(manifest, "1.30", strict=True)
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    (variable,) = (one["value"] for one in container["env"] if one["name"] == "LIVENESS_FILE")
    alive = tmp_path / "alive"
    probe = [part.replace(variable, str(alive)) for part in container["livenessProbe"]["exec"]["command"]]

    async def status() -> int:
        async with started(*probe) as probing:
            return await probing.status()

    async def age() -> None:
        os.utime(alive, (time.time() - 300,) * 2)

    assert await status() == 1
    blocking = edited(CONSUMER[0], "import time\nasync def process(order: Msg) -> None:\n    time.sleep(600)", tmp_path)
    async with server.script(blocking, *CONSUMER[1:], LIVENESS_FILE=str(alive)) as running:
        await until(alive.exists)
        await age()
        await until(lambda: time.time() - alive.stat().st_mtime < 60)
        assert await status() == 0
        await publish(nc, b"order-0")
        await until(lambda: has_in_flight(nc, 1))
        await age()
        await asyncio.sleep(7)  # more than the interval, in which it is not touched
        assert await status() == 1
        running.process.kill()


async def test_a_liveness_file_that_cannot_be_touched_is_reported(server: Server, tmp_path: Path) -> None:
    async with server.script(*CONSUMER, LIVENESS_FILE=str(tmp_path / "missing" / "alive")) as running:
        await running.line("cannot touch the liveness file .*/missing/alive: No such file or directory")


async def test_the_dockerfile_is_valid_and_runs_what_is_there() -> None:
    if not (BIN / "hadolint").exists():
        pytest.skip("there is no hadolint for this machine")
    async with started("hadolint", "Dockerfile") as linted:
        assert await linted.status() == 0, linted.lines
    (command,) = re.findall(r"^CMD (.*)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert json.loads(command) == ["python", *CONSUMER]


async def test_the_alert_rules_are_valid_and_fire() -> None:
    if not shutil.which("promtool"):
        pytest.skip("there is no promtool (Debian's package prometheus)")
    for command in ("check rules docs/alerts.yml", "test rules docs/alerts_test.yml"):
        async with started("promtool", *command.split()) as checked:
            assert await checked.status() == 0, checked.lines
    rules = yaml.safe_load((ROOT / "docs" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert not [rule["alert"] for rule in rules if f"| `{rule['alert']}` |" not in DOCS]


async def test_the_commands_that_show_what_goes_on(server: Server, nc: Client) -> None:
    await publish(nc, *(b"order-%d" % i for i in range(4)))
    (watching,) = example("nats events").splitlines()
    async with started(*shlex.split(watching), NATS_URL=server.url) as events:
        await events.line("Listening for advisories on .*")
        async with server.script(*CONSUMER, "--failure-rate", "1"):
            await events.line(r".*\[JS Max Deliveries\] orders_stream \(4\) > processor: 2 deliveries")
    for line in [*example("nats stream report\nnats consumer report").splitlines(), "nats stream get orders_stream 4"]:
        assert line in DOCS
        async with started(*shlex.split(line), NATS_URL=server.url) as natscli:
            assert await natscli.status() == 0, natscli.lines
    assert "order-3" in natscli.lines


async def test_the_runbooks_commands(server: Server, nc: Client, tmp_path: Path) -> None:
    lines = re.findall(r"^python dlq/manage.py .*$", (ROOT / "docs" / "dead-letters.md").read_text(), re.M)
    status, listing, retry, retry_all, discard, discard_all = lines
    await publish(nc, *(b"order-%d" % i for i in range(20)))
    async with server.script(*CONSUMER, "--failure-rate", "1") as running:
        await running.line(".* will be processed via DLQ", 20)
        assert await running.stop() == 0
    where = f"cd {shlex.quote(str(ROOT))} && PATH={BIN}:$PATH &&"
    for line in (status, listing, retry, discard, retry_all, discard_all):
        command = line.replace("discarded.jsonl", shlex.quote(str(tmp_path / "discarded.jsonl")))
        done = await server.run("bash", "-c", f"{where} {command}")
        assert done.process.returncode == 0, done.lines
        if line == retry_all:  # all die again
            async with server.script(*CONSUMER, "--failure-rate", "1") as running:
                await running.line(".* will be processed via DLQ", 19)
                assert await running.stop() == 0
    assert await messages(nc, "orders_stream") == 0
    assert len((tmp_path / "discarded.jsonl").read_text().splitlines()) == 20


async def test_json_logs(server: Server, nc: Client, tmp_path: Path) -> None:
    consumer = edited(CONSUMER[0], example("class JsonFormatter"), tmp_path)
    await publish(nc, b'order-"1"')
    async with server.script(consumer, *CONSUMER[1:], "--failure-rate", "0") as running:
        await running.line(".*received.*")
        assert await running.stop() == 0
    logged = [json.loads(line) for line in running.lines]
    assert logged[0]["message"] == 'received order-"1" from stream sequence # 1'
    assert {line["level"] for line in logged} == {"INFO"}


async def test_an_http_api_that_fails_for_a_while(server: Server, nc: Client, tmp_path: Path) -> None:
    """The first request of order-0 has an answer of 500, and that of order-1 one of 429. All of order-2 have 400."""
    requests: list[bytes] = []
    statuses = {b"order-0": b"500 Failed", b"order-1": b"429 Busy\r\nRetry-After: 1", b"order-2": b"400 Wrong"}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
            requests.append(await reader.readexactly(int(length)))
            is_done = requests.count(requests[-1]) > 1 and requests[-1] != b"order-2"
            status = b"200 OK" if is_done else statuses[requests[-1]]
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nbusy")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()

    api = await asyncio.start_server(serve, "127.0.0.1", 0)
    code = example("global http").replace(":8080", f":{api.sockets[0].getsockname()[1]}")
    consumer = edited(CONSUMER[0], code, tmp_path)
    await publish(nc, b"order-0", b"order-1", b"order-2")
    async with server.script(consumer, *CONSUMER[1:]) as running, server.script(*DLQ):
        await running.line("error processing order-0: HTTPStatusError: Server error '500 Failed' .*")
        await emptied(nc, "orders_stream")
        assert await running.stop() == 0
    assert sorted(requests) == [b"order-0", b"order-0", b"order-1", b"order-1", b"order-2"]
    assert running.found(r"error processing order-1: busy \(attempt 1 of 2, stream sequence # 2\)")
    assert running.messages[-1] == "stopped: 2 orders processed, 4 deliveries failed"
    assert not any("site-packages" in line for line in running.lines)
    api.close()
