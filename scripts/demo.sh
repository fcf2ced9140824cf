#!/usr/bin/env bash
# Shows the whole article on an embedded nats-server: set-up, streams, two consumers, the DLQ processor,
# the publisher, and a tally of what became of the orders.
#
#     ./scripts/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python scripts/demo.py
