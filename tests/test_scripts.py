"""The set-up, the demo, and what all the scripts have in common."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.harness import PUBLISHER, ROOT, Server, started


def left_behind(directory: Path) -> list[str]:
    """Return the processes that had this directory for their temporary files."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(directory):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


async def test_the_demo_accounts_for_every_order(tmp_path: Path) -> None:
    async with started(sys.executable, "scripts/demo.py", TMPDIR=str(tmp_path)) as demo:
        assert await demo.status() == 0
    tally = {
        what: int(count) for what, count in re.findall(r"demo \| ([a-z_ 12-]+?) +(\d+)$", "\n".join(demo.lines), re.M)
    }
    received = tally["received by consumer 1"] + tally["received by consumer 2"]
    assert tally["published"] == 20 == received + tally["reprocessed"]
    assert tally["dead-lettered"] == tally["reprocessed"]
    assert tally["left in orders_stream"] == tally["left in orders_unprocessed"] == 0
    assert all(" | " in line for line in demo.lines)
    assert not list(tmp_path.iterdir())
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, signum: int) -> None:
    async with started(sys.executable, "scripts/demo.py", TMPDIR=str(tmp_path)) as demo:
        await demo.line(r" *publisher \| .* published order no. 1")
        assert len(left_behind(tmp_path)) == 6
        assert await demo.stop(signum) == 130
    assert not [line for line in demo.lines if "Traceback" in line]
    assert not list(tmp_path.iterdir())
    assert not left_behind(tmp_path)


async def test_the_setup_says_when_python_is_too_old(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "help.sh", tmp_path / "scripts")
    setup = shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    python.chmod(0o755)
    async with started("bash", setup, PYTHON=str(python)) as script:
        assert await script.status() == 1
    assert script.lines == [f"Python 3.11 or later is needed, and {python} is Python 3.9.2"]


@pytest.mark.parametrize("script", ["publisher/publisher.py", "consumer/consumer.py", "dlq/consumer.py"])
async def test_every_script_has_help(script: str) -> None:
    async with started(sys.executable, script, "--help", COLUMNS="200") as running:
        assert await running.status() == 0
    assert running.lines[0].startswith("usage: ")
    assert any(line.strip().startswith(f"python {script} ") for line in running.lines)
    for variable in ("NATS_URL", "NATS_CREDENTIALS_FILE_PATH", "SSL_CERT_FILE", "NATS_CERT"):
        assert running.found(rf" +{variable},? +.*")
    assert all(running.found(rf"  {status}  .*") for status in range(3))
    with_value = running.found(r"  --[a-z-]+ [A-Z_]+ .*")
    assert not [line for line in with_value if "(default: " not in line and "--input" not in line]


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh") if os.access(path, os.X_OK))
)
async def test_every_shell_script_has_help(script: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for file in (script, "help.sh", "natscli.sh"):  # nothing else is there that it could do
        shutil.copy(ROOT / "scripts" / file, tmp_path / "scripts")
    async with started(f"scripts/{script}", "--help", cwd=tmp_path) as running:
        assert await running.status() == 0
    assert [line for line in running.lines if re.fullmatch(rf"    .*scripts/{script}.*", line)]
    assert running.lines[-1].startswith("exit status: ") or running.lines[-1].startswith("  ")


async def test_uv_runs_a_script_without_any_setup(server: Server, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for part in ("jobqueue", "publisher"):
        shutil.copytree(ROOT / part, project / part)
    (project / "docs").mkdir()
    for file in ("pyproject.toml", "docs/package.md", "LICENSE"):
        shutil.copy(ROOT / file, project / file)
    command = ("uv", "run", "--quiet", *PUBLISHER, "--count", "1")
    # uv by itself knows only the well-known certificate authorities, where pip asks the system.
    async with started(*command, cwd=project, NATS_URL=server.url, UV_SYSTEM_CERTS="true") as publisher:
        assert await publisher.status() == 0, publisher.lines
    assert publisher.messages[-1] == "published order no. 0"
