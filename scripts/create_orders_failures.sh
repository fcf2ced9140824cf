#!/usr/bin/env bash
# Creates the optional stream that keeps the last reason of each dead letter. Consumers write the reasons there, and
# `python -m jobqueue.manage ... list` shows them. A reason goes after 30 days.
#
#     [REPLICAS=3] scripts/create_orders_failures.sh [FAILURES_STREAM STREAM]
#     scripts/create_orders_failures.sh emails_failures emails_stream
#
# Without arguments it is orders_failures, for orders_stream. Restart the consumers and DLQ processors afterwards: they look
# for the stream when they start.
#
# environment: REPLICAS (default: 1); NATS_URL, NATS_CREDENTIALS_FILE_PATH, SSL_CERT_FILE, NATS_CA, NATS_CERT and NATS_KEY
# as in the Python scripts
#
# exit status: 0 the stream exists with these flags, 1 anything else, and standard error says why, 2 wrong usage
set -euo pipefail
# shellcheck source=scripts/natscli.sh
. "$(dirname "$(readlink -f "$0")")/natscli.sh"
[ $# -eq 0 ] || [ $# -eq 2 ] || fail "usage: $0 [FAILURES_STREAM STREAM]" 2
check_name "${2-orders_stream}"

create_stream "${1-orders_failures}" \
    --subjects="failures.${2-orders_stream}.*" \
    --storage=file \
    --replicas="${REPLICAS:-1}" \
    --retention=limits \
    --discard=old \
    --max-msgs=-1 \
    --max-msgs-per-subject=1 \
    --max-bytes=64MB \
    --max-age=30d \
    --max-msg-size=-1 \
    --dupe-window=2m0s \
    --no-deny-purge \
    --allow-direct
