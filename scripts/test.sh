#!/usr/bin/env bash
# Set-up, linters, types and tests. Arguments go to pytest:
#
#     ./scripts/test.sh [-k NAME]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
ruff check
ruff format --check
mypy
shellcheck --external-sources scripts/*.sh .ci/run
pytest "$@"
