"""The wheel and the source distribution, as an index and a user's environment get them."""

import email.message
import email.parser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from nats.aio.client import Client

from tests.harness import ROOT, Server, emptied, environment, messages, started
from tests.versions import VERSIONS

NOT_OURS = [".*_cache", ".coverage*", ".git", ".hypothesis", ".venv*", "*.creds", "*.egg-info", "__pycache__"]
NOT_OURS += ["build", "dist", "nats-data", "uv.lock"]
LINK = re.compile(r"\]\(([^)\s]+)|(?:src|href)=[\"']([^\"']+)")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command, and return what it prints."""
    ran = subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, since a build writes into it."""
    copy = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_OURS))
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, which is built from the source distribution, and that one; without a network."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, cwd=source)
    (wheel,), (sdist,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that has the wheel in it and nothing else."""
    directory = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-index", "--target", directory, built[0], cwd=directory)
    return directory


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def python_examples() -> dict[str, str]:
    """Return the examples of the index's description, by the name of their file."""
    text = (ROOT / "docs" / "package.md").read_text()
    return dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)^```", text, re.M | re.S))


def test_an_index_accepts_both_and_renders_their_description(built: tuple[Path, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=tmp_path)


def test_the_metadata_say_what_it_is(built: tuple[Path, Path]) -> None:
    metadata = metadata_of(built[0])
    classifiers, links = (metadata.get_all(field) or [] for field in ("Classifier", "Project-URL"))
    assert len(classifiers) >= 6
    assert len(links) >= 3 and all(", https://" in link for link in links)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Author"] == "The nats-job-queue authors"
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (tested,) = re.findall(r"python: \[(.*)\]", workflow)
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    assert versions == re.findall(r"[\d.]+", tested)
    assert metadata["Requires-Python"] == f">={versions[0]}"


def test_the_description_leads_out_of_the_index(built: tuple[Path, Path]) -> None:
    """An index shows neither relative links nor diagrams."""
    description = metadata_of(built[0]).get_payload()
    assert isinstance(description, str)
    links = [link or source for link, source in LINK.findall(description)]
    assert links
    assert not [link for link in links if not link.startswith("https://")]
    assert "```mermaid" not in description


def test_the_version_is_in_the_changelog() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version
    assert f"v{version}" in (ROOT / "CONTRIBUTING.md").read_text()


def test_contributing_names_each_file_of_the_library_and_the_supported_versions() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = dict(re.findall(r"^\| `(jobqueue/[\w./]*)` \| (.*) \|$", text, re.M))
    for file in (ROOT / "jobqueue").rglob("[a-z]*.py"):
        path = file.relative_to(ROOT).as_posix()
        assert path in table or f"`{file.name}`" in table[f"{file.parent.relative_to(ROOT).as_posix()}/"], path
    ((first, last),) = re.findall(r"^\| Python \| ([\d.]+) to ([\d.]+) \|", text, re.M)
    (nats_py,) = re.findall(r"^\| nats-py \| ([\d.]+)\.x \|", text, re.M)
    ((oldest, newest),) = re.findall(r"^\| nats-server \| ([\d.]+) to ([\d.]+)\.x \|", text, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [f"Programming Language :: Python :: {one}" in project["classifiers"] for one in (first, last)] == [True] * 2
    assert f"nats-py[nkeys]>={nats_py}," in project["dependencies"][0]
    assert VERSIONS[0] == oldest and VERSIONS[-1].startswith(f"{newest}.")


def test_the_wheel_has_all_of_the_library_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    library = [*(ROOT / "jobqueue").rglob("*.py"), ROOT / "jobqueue" / "py.typed"]
    assert packed == {file.relative_to(ROOT).as_posix() for file in library}


def test_the_wheel_works_where_nothing_else_of_the_project_is(installed: Path, tmp_path: Path) -> None:
    modules = sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in (ROOT / "jobqueue").rglob("*.py")
    )
    code = f"import importlib\nfor name in {modules}:\n    print(importlib.import_module(name).__file__)"
    files = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert len(files) == len(modules)
    assert all(Path(file).is_relative_to(installed) for file in files)
    usage = run(sys.executable, "-m", "jobqueue.manage", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert usage.startswith("usage: ")


async def test_the_indexs_example_works(bare_server: Server, nc: Client, installed: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "package.md").read_text()
    env = {"NATS_URL": bare_server.url, "PYTHONPATH": str(installed), "PYTHONUNBUFFERED": "1"}
    for line in re.findall(r"^nats stream add .*$", text.replace("\\\n", ""), re.M):
        created = await bare_server.run(*shlex.split(line))
        assert created.process.returncode == 0, created.lines
    programs = python_examples()
    assert set(programs) == {"worker.py", "shop.py"}
    for name, code in programs.items():
        (tmp_path / name).write_text(code)
    async with started(sys.executable, "worker.py", cwd=tmp_path, **env) as worker:
        async with started(sys.executable, "shop.py", cwd=tmp_path, **env) as shop:
            assert await shop.status() == 0, shop.lines
        assert shop.lines == ["Outcome.STORED"]
        await worker.line("processing order-1")
        await emptied(nc, "orders_stream")
        assert await worker.stop() == 0
    assert await messages(nc, "orders_unprocessed") == 0
    for line in re.findall(r"^python (-m jobqueue.manage .*)$", text, re.M):
        async with started(sys.executable, *shlex.split(line), cwd=tmp_path, **env) as managed:
            assert await managed.status() == 0, managed.lines


def test_the_source_distribution_has_all_that_its_tests_need_and_runs_them(
    built: tuple[Path, Path], source: Path, tmp_path: Path
) -> None:
    subprocess.run(["tar", "-xzf", built[1], "-C", tmp_path], check=True)
    (unpacked,) = tmp_path.iterdir()

    def files(directory: Path) -> dict[str, bool]:
        """Return the files, and which of them can be run."""
        return {
            file.relative_to(directory).as_posix(): os.access(file, os.X_OK)
            for file in directory.rglob("*")
            if file.is_file() and ".egg-info/" not in file.as_posix()
        }

    ours = files(source)
    assert ours.items() <= files(unpacked).items()
    assert {"tests/harness.py", "scripts/setup.sh", "consumer/consumer.py", "docs/alerts.yml", "Dockerfile"} <= set(
        ours
    )
    pytest_there = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n", "0")
    assert "error" not in run(*pytest_there, "--collect-only", cwd=unpacked).splitlines()[-1]
    quick = ("tests/test_pure.py", "tests/test_streams.py", "tests/test_docs.py")
    ran = run(*pytest_there, *quick, "-k", "pure or stream_script or named", cwd=unpacked)
    assert re.search(r"^\d+ passed", ran.splitlines()[-1]), ran
