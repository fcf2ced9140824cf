#!/usr/bin/env bash
# Shows the whole article on an embedded nats-server: set-up, streams, two consumers, the DLQ processor,
# the publisher, and a tally of what became of the orders.
#
#     ./scripts/demo.sh
#
# exit status: 0 every order is accounted for, 1 one is not, or a line says what is wrong, 130 interrupted
set -euo pipefail
# shellcheck source=scripts/help.sh
. "$(dirname "$(readlink -f "$0")")/help.sh"
cd "$(dirname "$(readlink -f "$0")")/.."
scripts/setup.sh
exec .venv/bin/python scripts/demo.py
