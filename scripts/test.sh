#!/usr/bin/env bash
# Set-up, linters, types, the tests, and the main ones on the oldest nats-server that is supported.
# With arguments it is these tests only, as pytest takes them:
#
#     ./scripts/test.sh [-k NAME] [-m faults] [--seed N] [--soak TIMES]
#
# exit status: 0 all passed
set -euo pipefail
# shellcheck source=scripts/help.sh
. "$(dirname "$(readlink -f "$0")")/help.sh"
cd "$(dirname "$(readlink -f "$0")")/.."
scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
if [ $# -gt 0 ]; then
    exec pytest "$@"
fi
ruff check
ruff format --check
mypy
shellcheck --external-sources scripts/*.sh .ci/run
coverage run -m pytest # the processes that the tests start are looked at too, but for those that they kill
coverage combine --quiet
coverage report
python tests/versions.py 2.10.25
