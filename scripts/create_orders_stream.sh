#!/usr/bin/env bash
# Creates orders_stream, the work queue of the orders, with the article's flags.
#
#     [REPLICAS=3] scripts/create_orders_stream.sh
set -euo pipefail
# shellcheck source=scripts/natscli.sh
. "$(dirname "$0")/natscli.sh"

create_stream orders_stream \
    --subjects="orders.*" \
    --storage=file \
    --replicas="${REPLICAS:-1}" \
    --retention=work \
    --discard=new \
    --max-msgs=-1 \
    --max-msgs-per-subject=-1 \
    --max-bytes=256MB \
    --max-age=-1 \
    --max-msg-size=1MIB \
    --dupe-window=2m0s \
    --deny-delete \
    --no-deny-purge \
    --allow-direct
