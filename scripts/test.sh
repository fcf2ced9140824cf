#!/usr/bin/env bash
# Set-up, linters, types, the tests, and the main ones on the oldest nats-server that is supported.
# With arguments it is these tests only, as pytest takes them:
#
#     ./scripts/test.sh [-k NAME] [-m faults] [--seed N] [--soak TIMES]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
ruff check
ruff format --check
mypy
shellcheck --external-sources scripts/*.sh .ci/run
pytest "$@"
[ $# -gt 0 ] || python tests/versions.py 2.10.25
