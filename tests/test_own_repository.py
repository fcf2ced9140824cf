"""What the pages for programs outside of a clone show: each file of theirs runs, in a directory of its own."""

import asyncio
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from nats.aio.client import Client

from tests.harness import (
    BIN,
    ROOT,
    Script,
    Server,
    emptied,
    has_pull_request,
    messages,
    publish,
    request,
    started,
    until,
)

PAGE = (ROOT / "docs" / "in-your-own-repository.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
STREAMS = ("mails_stream", "mails_unprocessed")
PREAMBLE = "import asyncio\nimport random\n\nfrom jobqueue import *\n\n\n"


def block(page: str, name: str) -> str:
    """Return the block of a page that has a name after its language, such as ```python worker.py."""
    (found,) = re.findall(rf"^```\w+ {re.escape(name)}\n(.*?)^```", page, re.M | re.S)
    return str(found)


def save(page: str, directory: Path, *names: str) -> None:
    """Save blocks of a page under their names."""
    for name in names:
        (directory / name).write_text(block(page, name))


async def shell(server: Server, commands: str, directory: Path) -> Script:
    """Run the commands of a block, as a newcomer does in the directory of the programs."""
    async with started("bash", "-euc", commands, cwd=directory, NATS_URL=server.url) as running:
        assert await running.status() == 0, running.lines
        return running


@asynccontextmanager
async def program(server: Server, name: str, directory: Path, **env: str) -> AsyncIterator[Script]:
    """Run a program of the page."""
    async with started(sys.executable, name, cwd=directory, NATS_URL=server.url, **env) as running:
        yield running


async def create_mails(server: Server, directory: Path) -> None:
    """Create the streams by the program of the page."""
    save(PAGE, directory, "create_streams.py")
    async with program(server, "create_streams.py", directory) as creating:
        assert await creating.status() == 0, creating.lines


async def configuration(nc: Client, stream: str) -> dict[str, Any]:
    """Return a stream's configuration, without what depends on the program that created it."""
    config: dict[str, Any] = (await request(nc, f"STREAM.INFO.{stream}"))["config"]
    return {field: value for field, value in config.items() if field not in ("name", "subjects", "metadata") and value}


async def test_the_streams_are_those_of_the_scripts(server: Server, nc: Client, tmp_path: Path) -> None:
    await shell(server, block(PAGE, "streams"), tmp_path)
    by_natscli = [await configuration(nc, stream) for stream in STREAMS]
    await create_mails(server, tmp_path)  # again, which changes nothing
    for stream in STREAMS:
        await request(nc, f"STREAM.DELETE.{stream}")
    await create_mails(server, tmp_path)
    await create_mails(server, tmp_path)
    by_nats_py = [await configuration(nc, stream) for stream in STREAMS]
    await shell(server, block(PAGE, "streams"), tmp_path)
    by_scripts = [await configuration(nc, stream) for stream in ("orders_stream", "orders_unprocessed")]
    assert by_scripts[0].pop("max_msg_size") == 2**20  # the largest message that the server takes, in any case
    assert by_natscli[0].pop("max_msg_size") == by_nats_py[0].pop("max_msg_size") == -1
    assert by_scripts == by_natscli == by_nats_py


async def test_the_stream_of_reasons_is_that_of_the_script(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    await bare_server.run("scripts/create_orders_failures.sh")
    await shell(bare_server, block(PAGE, "failures"), tmp_path)
    by_natscli = await configuration(nc, "mails_failures")
    await request(nc, "STREAM.DELETE.mails_failures")
    await create_with_failures(bare_server, tmp_path)
    assert by_natscli == await configuration(nc, "mails_failures") == await configuration(nc, "orders_failures")


async def create_with_failures(server: Server, directory: Path) -> None:
    """Create all three streams by the program of the page, to which a user has added the stream of reasons."""
    constant, statement = re.findall(r"^```python failures_by_python\n(.*)\n(.*)\n```", PAGE, re.M)[0]
    code = block(PAGE, "create_streams.py").replace("\n\n\nasync", f"\n{constant}\n\n\nasync")
    code = code.replace('\n\n\nif __name__ == "__main__"', f'\n        {statement}\n\n\nif __name__ == "__main__"')
    assert constant in code
    assert statement in code
    (directory / "with_failures.py").write_text(code)
    async with program(server, "with_failures.py", directory) as creating:
        assert await creating.status() == 0, creating.lines


def test_the_programs_have_so_few_lines() -> None:
    code = "".join(block(PAGE, name) for name in ("send.py", "worker.py", "dead_letters.py"))
    (promised,) = re.findall(r"(\d+) lines of your", PAGE)
    assert sum(bool(line.strip()) for line in code.splitlines()) == int(promised) <= 25
    assert max(map(len, code.splitlines())) <= 120


@asynccontextmanager
async def api(*answers: str) -> AsyncIterator[tuple[int, Counter[bytes]]]:
    """Run an HTTP API that gives each request the next answer, then the last one; yield its port and the requests."""
    requests = Counter[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
                answer = answers[min(requests.total(), len(answers) - 1)]
                requests[await reader.readexactly(int(length))] += 1
                writer.write(f"HTTP/1.1 {answer}\r\nContent-Length: 4\r\n\r\nbody".encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], requests
    finally:
        server.close()


async def test_a_queue_without_a_clone(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    await create_with_failures(bare_server, tmp_path)
    save(PAGE, tmp_path, "send.py", "dead_letters.py")
    list_, retry, discard = block(PAGE, "manage").splitlines()
    async with api("429 Busy\r\nRetry-After: 1", "503 Down", "200 OK", "400 Bad") as (port, requests):
        (tmp_path / "worker.py").write_text(block(PAGE, "worker.py").replace(":8080", f":{port}"))
        async with program(bare_server, "send.py", tmp_path) as sending:
            await sending.line("published welcome-ann")
            await sending.line("Outcome.STORED")
            assert await sending.status() == 0
        async with program(bare_server, "worker.py", tmp_path) as worker:
            await worker.line(r"error processing .*: busy \(attempt 1 of 8, .*")
            await worker.line(r"error processing .*: HTTPStatusError: .*503.* \(attempt 2 of 8, .*")
            await emptied(nc, "mails_stream")
            assert requests == {b'{"to": "ann"}': 3}
            await publish(nc, b'{"to": "bob"}', subject="mails.welcome")
            await publish(nc, b'{"to": "cid"}', subject="mails.welcome")
            await worker.line(".* will be processed via DLQ", 2)
            listed = await shell(bare_server, list_, tmp_path)
            assert re.search("SEQUENCE .* REASON +PAYLOAD", listed.lines[0])
            assert [line.split()[-3:] for line in listed.lines[1:]] == [
                ["body", '{"to":', f'"{n}"}}'] for n in ("bob", "cid")
            ]
            redriven = await shell(bare_server, retry.replace("7", "2"), tmp_path)
            assert redriven.found("1 dead letters redriven, 0 skipped")
            await worker.line(".* will be processed via DLQ", 3)
            assert await worker.stop() == 0
        async with program(bare_server, "dead_letters.py", tmp_path) as reprocessing:
            await emptied(nc, *STREAMS)
            assert await reprocessing.stop() == 0
    undelivered = (tmp_path / "undelivered.jsonl").read_text().splitlines()
    assert sorted(undelivered) == ['{"to": "bob"}', '{"to": "cid"}']
    discarded = await shell(bare_server, f"{discard} --yes", tmp_path)
    assert discarded.found("0 dead letters discarded, 0 skipped")


async def test_a_worker_without_its_streams_names_the_commands_that_create_them(
    bare_server: Server, nc: Client, tmp_path: Path
) -> None:
    save(PAGE, tmp_path, "worker.py", "dead_letters.py")
    for name in ("worker.py", "dead_letters.py"):
        async with program(bare_server, name, tmp_path) as refused:
            assert await refused.status() == 1
        (command,) = refused.found("there is no stream .*: create it with `(nats stream add .*)`")
        await shell(bare_server, command, tmp_path)
    async with program(bare_server, "worker.py", tmp_path) as worker:
        await until(lambda: has_pull_request(nc, "mails_stream", "processor"))
        assert not worker.lines
        assert await worker.stop() == 0


async def test_the_users_own_tests_pass(tmp_path: Path) -> None:
    save(PAGE, tmp_path, "create_streams.py", "worker.py", "test_worker.py")
    pytest_ = (sys.executable, "-m", "pytest", "--rootdir", tmp_path, "-p", "no:cacheprovider")
    async with started(*pytest_, cwd=tmp_path) as testing:
        assert await testing.status() == 0, testing.lines
    assert any("4 passed" in line for line in testing.lines)


def test_a_message_built_by_hand_has_metadata() -> None:
    from nats.aio.msg import Msg

    (reply,) = re.findall(r'reply="(.*?)"', PAGE)
    metadata = Msg(_client=None, reply=reply).metadata  # type: ignore[arg-type]
    assert (metadata.num_delivered, metadata.sequence.stream) == (1, 7)


async def test_the_image(tmp_path: Path) -> None:
    if not (BIN / "hadolint").exists():
        pytest.skip("there is no hadolint for this machine")
    save(PAGE, tmp_path, "Dockerfile")
    async with started("hadolint", tmp_path / "Dockerfile") as linted:
        assert await linted.status() == 0, linted.lines
    version = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert re.findall("nats_job_queue-(.*)-py3", block(PAGE, "requirements.txt")) == version


def of_deployment(language: str, text: str) -> str:
    """Return the block of docs/deployment.md that the page refers to."""
    deployment = (ROOT / "docs" / "deployment.md").read_text()
    blocks = re.findall(rf"^```{language}\n(.*?)^```", deployment, re.M | re.S)
    (found,) = (one for one in blocks if text in one)
    return str(found)


def test_the_deployment_fits_the_worker() -> None:
    deployment = yaml.safe_load(of_deployment("yaml", "livenessProbe"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    del container["command"]
    kubernetes_validate.validate(deployment, "1.30", strict=True)
    (limit,) = re.findall(r"time_limit\D+(\d+)", block(PAGE, "worker.py"))
    (grace,) = re.findall(r"grace period of (\d+)", PAGE)
    (unit,) = re.findall(r"TimeoutStopSec=(\d+)", of_deployment("ini", "[Service]"))
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == int(grace) == int(unit)
    assert int(grace) == 2 * int(limit) + 15


async def test_the_unit_is_valid(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd")
    own = block(PAGE, "mails-worker.service").replace("/opt/mails/.venv", sys.prefix).replace("/opt/mails", "/")
    unit = of_deployment("ini", "[Service]")
    for field, value in re.findall(r"^(User|WorkingDirectory|ExecStart) = (.*)$", own, re.M):
        unit, count = re.subn(rf"^{field}=.*$", f"{field} = {value}", unit, flags=re.M)
        assert count == 1
    added = re.sub(r"^(User|WorkingDirectory|ExecStart) .*\n", "", own, flags=re.M)
    unit = unit.replace("[Service]\n", f"[Service]\n{added}").replace("User = mails", "User = root")
    assert "RuntimeDirectory" in unit
    (tmp_path / "mails-worker.service").write_text(unit)
    async with started("systemd-analyze", "verify", tmp_path / "mails-worker.service") as verified:
        assert await verified.status() == 0
    assert not verified.lines


async def test_the_watchdog_tells_a_blocked_event_loop(tmp_path: Path) -> None:
    command = block(PAGE, "cron").partition(" root ")[2].replace("/run/mails-worker", str(tmp_path))
    (tmp_path / "systemctl").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "systemctl").chmod(0o755)
    for age, expected in ((0, []), (300, ["restart mails-worker.service"])):
        (tmp_path / "alive").touch()
        os.utime(tmp_path / "alive", (time.time() - age,) * 2)
        async with started("sh", "-c", command, PATH=f"{tmp_path}:{os.environ['PATH']}") as watching:
            assert await watching.status() == 0
        assert watching.lines == expected


def process_that(statement: str) -> str:
    """Return a program that runs a statement of the recipes for each mail."""
    return (
        f"{PREAMBLE}address = 'x'\n\n\n"
        f"async def process(mail):\n    {statement}\n\n\n"
        'run(consume("mails_stream", "mails.*", process, max_deliver=2))\n'
    )


@pytest.mark.parametrize("name", ["jitter", "exponential", "dead"])
async def test_raising_retry_and_dead(bare_server: Server, nc: Client, tmp_path: Path, name: str) -> None:
    await create_mails(bare_server, tmp_path)
    (tmp_path / "program.py").write_text(process_that(block(RECIPES, name).replace("20, 40", "0.2, 0.4")))
    await publish(nc, b"hello", subject="mails.welcome")
    reason = "the address 'x' is invalid" if name == "dead" else "busy"
    async with program(bare_server, "program.py", tmp_path) as running:
        await running.line(rf"error processing hello: {reason} \(attempt 1 of 2, .*")
        await running.line("hello will be processed via DLQ")
        assert len(running.found("error processing .*")) == (1 if name == "dead" else 2)
        assert await running.stop() == 0


@pytest.mark.parametrize("after", ["1", "a date"])
async def test_retrying_after_what_an_api_says(bare_server: Server, nc: Client, tmp_path: Path, after: str) -> None:
    await create_mails(bare_server, tmp_path)
    header = '"1"' if after == "1" else "format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)"
    (tmp_path / "program.py").write_text(
        "import time\nfrom datetime import UTC, datetime, timedelta\nfrom email.utils import *\nimport httpx\n"
        + process_that(
            f'answer = httpx.Response(429, headers={{"Retry-After": {header}}})\n'
            + textwrap.indent(block(RECIPES, "retry_after"), "    ")
        )
    )
    await publish(nc, b"hello", subject="mails.welcome")
    async with program(bare_server, "program.py", tmp_path) as running:
        await running.line(r"error processing hello: busy \(attempt 1 of 2, .*")
        await running.line("hello will be processed via DLQ")
        assert await running.stop() == 0


async def test_several_kinds_in_one_stream(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    await create_mails(bare_server, tmp_path)
    save(RECIPES, tmp_path, "kinds.py")
    for kind in ("welcome", "invoice", "odd"):
        await publish(nc, kind.encode(), subject=f"mails.{kind}")
    async with program(bare_server, "kinds.py", tmp_path, PYTHONUNBUFFERED="1") as running:
        await running.line("welcome b'welcome'")
        await running.line("invoice b'invoice'")
        await running.line(r"error processing odd: unknown subject mails.odd \(attempt 1 of 2, .*")
        await running.line("odd will be processed via DLQ")
        assert await running.stop() == 0


async def test_two_durables_in_one_program(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    await create_mails(bare_server, tmp_path)
    save(RECIPES, tmp_path, "kinds.py")
    save(PAGE, tmp_path, "dead_letters.py")
    functions = block(RECIPES, "kinds.py").partition("KINDS")[0].partition("import Dead, consume, run\n")[2]
    code = PREAMBLE + functions + block(RECIPES, "two_durables").replace("60", "0.1")
    (tmp_path / "program.py").write_text(code)
    for payload, subject in ((b"one", "mails.welcome"), (b"two", "mails.invoice"), (b"odd", "mails.odd")):
        await publish(nc, payload, subject=subject)
    async with program(bare_server, "kinds.py", tmp_path) as running:
        await running.line("odd will be processed via DLQ")
        await until(lambda: holds_one(nc))
        assert await running.stop() == 0
    async with program(bare_server, "program.py", tmp_path) as refused:
        assert await refused.status() == 1
    (why,) = re.findall('"(filtered consumer.*?)"', RECIPES)
    assert refused.found(f"cannot create the durable .*{why}.*")
    (command,) = re.findall("`(nats consumer rm .*?)`", RECIPES)
    await shell(bare_server, command, tmp_path)
    for payload, subject in ((b"one", "mails.welcome"), (b"two", "mails.invoice")):
        await publish(nc, payload, subject=subject)
    async with program(bare_server, "program.py", tmp_path, PYTHONUNBUFFERED="1") as running:
        await running.line("welcome b'one'")
        await running.line("invoice b'two'")
        assert await running.stop() == 0
    fails = code.replace('print("invoice", mail.data)', 'raise Dead("no")').replace(
        'print("welcome", mail.data)', 'raise Dead("no")'
    )
    (tmp_path / "failing.py").write_text(fails)
    for payload, subject in ((b"one", "mails.welcome"), (b"two", "mails.invoice")):
        await publish(nc, payload, subject=subject)
    async with program(bare_server, "failing.py", tmp_path) as failing:
        await failing.line(".* will be processed via DLQ", 2)
        async with program(bare_server, "dead_letters.py", tmp_path) as reprocessing:
            await until(lambda: holds_one(nc))
            assert await reprocessing.stop() == 0
    assert sorted((tmp_path / "undelivered.jsonl").read_text().split()) == ["one", "two"]


async def test_a_consumer_in_a_web_application(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    """Its server has the signals, and the consumer finishes what is in flight."""
    await create_mails(bare_server, tmp_path)
    save(RECIPES, tmp_path, "app.py")
    code = (tmp_path / "app.py").read_text()
    slow = code.replace("mail.data)", "mail.data)\n    await asyncio.sleep(1)\n    print('sent')")
    (tmp_path / "app.py").write_text(slow)
    await publish(nc, b"hello", subject="mails.welcome")
    uvicorn = (sys.executable, "-m", "uvicorn", "app:app", "--port", "0")
    async with started(*uvicorn, cwd=tmp_path, NATS_URL=bare_server.url, PYTHONUNBUFFERED="1") as app:
        await app.line("sending b'hello'")
        app.process.terminate()
        await app.line("sent")
        await app.line("INFO: +Application shutdown complete.")
        await app.status()
    assert await messages(nc, "mails_stream") == 0
    async with started(*uvicorn, cwd=tmp_path, NATS_URL="nats://127.0.0.1:1") as app:
        await app.line("jobqueue.errors.Failure: cannot connect to nats://127.0.0.1:1: Connection refused")
        await app.status()


async def holds_one(nc: Client) -> bool:
    """Return whether only one mail is left."""
    return await messages(nc, "mails_stream") == 1


async def test_cron(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    async with started("bash", "-euc", block(RECIPES, "cron"), NATS_URL=bare_server.url) as creating:
        created = await creating.status() == 0
    if not created or not (await configuration(nc, "cron_stream")).get("allow_msg_schedules"):
        pytest.skip("this nats-server knows no message schedules")
    await create_mails(bare_server, tmp_path)
    save(RECIPES, tmp_path, "cron_source.py")
    async with program(bare_server, "cron_source.py", tmp_path) as editing:
        assert await editing.status() == 0, editing.lines
    assert (await request(nc, "STREAM.INFO.mails_stream"))["config"]["discard"] == "new"
    schedule = block(RECIPES, "schedule")
    async with started("bash", "-euc", schedule, NATS_URL=bare_server.url) as scheduling:
        await scheduling.status()
    if await messages(nc, "cron_stream") == 0:
        pytest.skip("this nats-server knows no cron expressions")
    assert await messages(nc, "mails_stream") == 0
    await shell(bare_server, schedule.replace("0 0 8", "* * *"), tmp_path)  # each second, which replaces the other
    (tmp_path / "program.py").write_text(process_that("print(mail.subject, mail.data, 'Nats-Msg-Id' in mail.headers)"))
    async with program(bare_server, "program.py", tmp_path, PYTHONUNBUFFERED="1") as running:
        await running.line('mails.digest b\'{"to": "all"}\' False', 2)
        await shell(bare_server, block(RECIPES, "unschedule"), tmp_path)
        assert await running.stop() == 0
    published = (await request(nc, "STREAM.INFO.mails_stream"))["state"]["last_seq"]
    await asyncio.sleep(2.5)  # two would be due
    assert (await request(nc, "STREAM.INFO.mails_stream"))["state"]["last_seq"] <= published + 1


async def test_pausing(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    await create_mails(bare_server, tmp_path)
    save(RECIPES, tmp_path, "kinds.py")
    pause, resume = block(RECIPES, "pause").splitlines()
    async with program(bare_server, "kinds.py", tmp_path, PYTHONUNBUFFERED="1") as running:
        await publish(nc, b"first", subject="mails.welcome")
        await running.line("welcome b'first'")
        async with started(*shlex.split(pause), NATS_URL=bare_server.url) as pausing:
            if await pausing.status():
                pytest.skip("this nats-server can't pause a durable")
        await publish(nc, b"second", subject="mails.welcome")
        await asyncio.sleep(1)  # it would be processed
        assert not running.found("welcome b'second'")
        await shell(bare_server, resume, tmp_path)
        await running.line("welcome b'second'")
        assert await running.stop() == 0


async def test_a_larger_queue(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    await create_mails(bare_server, tmp_path)
    await shell(bare_server, block(RECIPES, "limit"), tmp_path)
    assert (await configuration(nc, "mails_stream"))["max_bytes"] == 2**30


async def test_tracing(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    """A trace goes from the publisher to both attempts."""
    await create_mails(bare_server, tmp_path)
    code = block(RECIPES, "tracing.py").replace("ConsoleSpanExporter()", "ConsoleSpanExporter(out=open('spans', 'a'))")
    work = f"{code}\n\nfrom jobqueue import *\n\n\nasync def process(mail):\n    raise Retry('busy', delay=0)\n\n\n"
    (tmp_path / "consumer.py").write_text(
        f'{work}run(consume("mails_stream", "mails.*", traced(process)))\nprovider.shutdown()\n'
    )
    (tmp_path / "publisher.py").write_text(
        f"{work}async def main():\n    async with connect('shop') as nc:\n"
        "        await publish_traced(nc, 'mails.welcome', b'hello', '1')\n\n\nrun(main())\nprovider.shutdown()\n"
    )
    async with program(bare_server, "publisher.py", tmp_path) as publishing:
        assert await publishing.status() == 0, publishing.lines
    async with program(bare_server, "consumer.py", tmp_path) as consuming:
        await consuming.line("hello will be processed via DLQ")
        assert await consuming.stop() == 0
    decoder, text, spans = json.JSONDecoder(), (tmp_path / "spans").read_text(), []
    while text := text.lstrip():
        span, end = decoder.raw_decode(text)
        spans.append(span)
        text = text[end:]
    published, *attempts = spans
    assert [span["name"] for span in spans] == ["publish mails.welcome", *["process mails.welcome"] * 2]
    assert {span["context"]["trace_id"] for span in spans} == {published["context"]["trace_id"]}
    assert {span["parent_id"] for span in attempts} == {published["context"]["span_id"]}
    assert [span["attributes"]["attempt"] for span in attempts] == [1, 2]
    assert attempts[0]["events"][0]["attributes"]["exception.message"] == "busy"


async def test_metrics(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    await create_mails(bare_server, tmp_path)
    (tmp_path / "program.py").write_text(
        block(RECIPES, "metrics.py")
        + "\n\nimport prometheus_client\nfrom jobqueue import *\n\n\nasync def process(mail):\n"
        + "    if mail.data == b'busy' and mail.metadata.num_delivered == 1:\n        raise Retry(delay=0)\n"
        + "    if mail.data == b'dead':\n        raise Dead('no')\n    assert mail.data != b'bad'\n\n\n"
        + 'run(consume("mails_stream", "mails.*", measured(process), backoff=[0.1]))\n'
        + "print(prometheus_client.generate_latest().decode())\n"
    )
    await publish(nc, b"good", b"busy", b"dead", b"bad", subject="mails.welcome")
    async with program(bare_server, "program.py", tmp_path) as running:
        await running.line(".* will be processed via DLQ", 2)
        assert await running.stop() == 0
    found = re.findall(r'attempts_total\{outcome="(\w+)",subject="mails.welcome"\} (\d+)', "\n".join(running.lines))
    assert dict(found) == {"done": "2", "Retry": "1", "Dead": "1", "AssertionError": "2"}
    assert 'process_seconds_count{subject="mails.welcome"} 6.0' in running.lines


async def test_structured_logs(bare_server: Server, nc: Client, tmp_path: Path) -> None:
    await create_mails(bare_server, tmp_path)
    save(RECIPES, tmp_path, "logs.py")
    await publish(nc, b"hello", subject="mails.welcome", **{"Nats-Msg-Id": "welcome-ann"})
    async with program(bare_server, "logs.py", tmp_path) as running:
        await emptied(nc, "mails_stream")
        assert await running.stop() == 0
    logged = [json.loads(line) for line in running.lines]
    del logged[0]["timestamp"]
    assert logged[0] == {"event": "sending", "id": "welcome-ann", "level": "info", "logger": "__main__"}
    assert logged[-1]["event"] == "stopped: 1 orders processed, 0 deliveries failed"
