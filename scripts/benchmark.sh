#!/usr/bin/env bash
# Measures the queue and other programs, and writes RESULTS.md and results.svg in tests/benchmarks/.
# With arguments it measures only these sections, and writes nothing:
#
#     ./scripts/benchmark.sh [--rounds 3] [SECTION ...]
#
# exit status: 0 all is measured
set -euo pipefail
# shellcheck source=scripts/help.sh
. "$(dirname "$(readlink -f "$0")")/help.sh"
cd "$(dirname "$(readlink -f "$0")")/.."
scripts/setup.sh
# An environment of its own: what the others need would change what the tests run.
[ -x .venv-bench/bin/python ] || .venv/bin/python -m venv .venv-bench
.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
# natsio, one of the rivals, needs Python 3.13 or later.
for python in python3.14 python3.13 "$HOME"/.pyenv/versions/3.1[3-9]*/bin/python; do
    if [ -n "${NATSIO_PYTHON:-}" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 13))' 2>/dev/null; then
        continue
    fi
    [ -x .venv-natsio/bin/python ] || "$python" -m venv .venv-natsio
    .venv-natsio/bin/python -m pip install --quiet --disable-pip-version-check 'natsio>=1.0,<2'
    export NATSIO_PYTHON=$PWD/.venv-natsio/bin/python
done
export PATH="$PATH:$PWD/.venv/bin" # where natscli may be
exec .venv-bench/bin/python -m tests.benchmarks.run "$@"
