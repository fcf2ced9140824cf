#!/usr/bin/env bash
# Creates a work queue with the article's flags.
#
#     [REPLICAS=3] scripts/create_orders_stream.sh [STREAM SUBJECTS]
#     scripts/create_orders_stream.sh emails_stream "emails.*"
#
# Without arguments it is orders_stream with the subjects orders.*
#
# environment: REPLICAS (default: 1); NATS_URL, NATS_CREDENTIALS_FILE_PATH, SSL_CERT_FILE, NATS_CA, NATS_CERT and NATS_KEY
# as in the Python scripts
#
# exit status: 0 the stream exists with these flags, 1 anything else, and standard error says why, 2 wrong usage
set -euo pipefail
# shellcheck source=scripts/natscli.sh
. "$(dirname "$(readlink -f "$0")")/natscli.sh"
[ $# -eq 0 ] || [ $# -eq 2 ] || fail "usage: $0 [STREAM SUBJECTS]" 2
case ${2-orders.*} in
    "" | *[[:space:][:cntrl:],]*) fail "SUBJECTS must be a subject such as orders.*" 2 ;;
esac

create_stream "${1-orders_stream}" \
    --subjects="${2-orders.*}" \
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
