#!/usr/bin/env bash
# Creates the dead letter queue of a work queue, with the article's flags.
#
#     [REPLICAS=3] scripts/create_orders_unprocessed.sh [DLQ_STREAM ORIGINAL_STREAM]
#     scripts/create_orders_unprocessed.sh emails_unprocessed emails_stream
#
# Without arguments it is orders_unprocessed, for orders_stream.
#
# environment: REPLICAS (default: 1); NATS_URL, NATS_CREDENTIALS_FILE_PATH, SSL_CERT_FILE, NATS_CA, NATS_CERT and NATS_KEY
# as in the Python scripts
#
# exit status: 0 the stream exists with these flags, 1 anything else, and standard error says why, 2 wrong usage
set -euo pipefail
# shellcheck source=scripts/natscli.sh
. "$(dirname "$(readlink -f "$0")")/natscli.sh"
[ $# -eq 0 ] || [ $# -eq 2 ] || fail "usage: $0 [DLQ_STREAM ORIGINAL_STREAM]" 2
check_name "${2-orders_stream}"

create_stream "${1-orders_unprocessed}" \
    --subjects="\$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.${2-orders_stream}.*" \
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
