#!/usr/bin/env bash
# Creates orders_unprocessed, the dead letter queue of orders_stream, with the article's flags.
#
#     [REPLICAS=3] scripts/create_orders_unprocessed.sh
set -euo pipefail
# shellcheck source=scripts/natscli.sh
. "$(dirname "$0")/natscli.sh"

# shellcheck disable=SC2016 # the $ is the subject's
create_stream orders_unprocessed \
    --subjects='$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.orders_stream.*' \
    --storage=file \
    --replicas="${REPLICAS:-1}" \
    --retention=work \
    --discard=new \
    --max-msgs=-1 \
    --max-msgs-per-subject=-1 \
    --max-bytes=256MB \
    --max-age=-1 \
    --max-msg-size=-1 \
    --dupe-window=2m0s \
    --deny-delete \
    --no-deny-purge \
    --allow-direct
