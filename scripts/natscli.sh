# shellcheck shell=bash
# For the scripts that create a stream: natscli, with the Python scripts' server and user.

# shellcheck source=scripts/help.sh
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$PATH:$root/.venv/bin" # where scripts/setup.sh puts natscli and Python

fail() {
    echo "$1" >&2
    exit "${2:-1}"
}

malformed="NATS_URL must be URLs such as nats://localhost:4222, with commas between them"

# share_user URLS: puts the URLs into `url`, each with the user that one of them has, as the Python scripts do.
share_user() {
    local one shared="" user=""
    local IFS=,
    for one in ${1// /}; do
        case $one in
            *://*@*) one=${one##*://} ;;
            # A password with a comma in it would be taken apart here, and shown.
            *@*) [ "$one" = "${1%%,*}" ] || fail "$malformed" ;;
            *) continue ;;
        esac
        [ -z "$user" ] || [ "$user" = "${one%@*}@" ] || fail "NATS_URL has two users in it: one is for all servers"
        user=${one%@*}@
    done
    for one in ${1// /}; do
        case $one in
            *@*) ;;
            *://*) one=${one%%://*}://$user${one#*://} ;;
            *) one=$user$one ;;
        esac
        shared=$shared,$one
    done
    url=${shared#,}
}

command -v nats >/dev/null ||
    fail "natscli (the command nats) is missing: run scripts/setup.sh, or see https://github.com/nats-io/natscli"

# The same variables as in jobqueue/connection/environment.py; the others that natscli knows are for its other uses.
credentials=${NATS_CREDENTIALS_FILE_PATH:-}
if [ -n "$credentials" ]; then
    url=${NATS_URL:-tls://connect.ngs.global}
else
    url=${NATS_URL:-nats://localhost:4222}
fi
share_user "$url"
for variable in $(compgen -v NATS_); do
    case $variable in
        NATS_CA | NATS_CERT | NATS_KEY) ;; # natscli reads them itself
        *) unset -v "$variable" ;;
    esac
done
export NATS_URL=$url
[ -z "$credentials" ] || export NATS_CREDS=$credentials
# Go reads SSL_CERT_FILE itself, but not on macOS; with NATS_CA natscli would want TLS of any server.
case $url in
    *tls://*) [ -n "${NATS_CA:-}" ] || [ -z "${SSL_CERT_FILE:-}" ] || export NATS_CA=$SSL_CERT_FILE ;;
esac

# natscli ARGUMENT...: runs it without a terminal and puts what it prints, or the line of its error, in `output`.
natscli() {
    output=$(nats --no-context "$@" 2>&1 </dev/null) && return
    output=${output##*$'\n'}
    output=${output#nats: error: }
    output=${output#could not create Stream: }
    output=${output#nats: }
    case $output in
        "context deadline exceeded") output="timed out; may this user create streams?" ;;
        "Authorization Violation") output="$output (are the credentials wrong, expired or revoked?)" ;;
        *'parse "'*) # it has the URL in it, and in that perhaps a password
            output=$malformed ;;
    esac
    return 1
}

# check_name NAME: fails if no stream can have that name.
check_name() {
    case $1 in
        "" | [-@]* | *[[:space:][:cntrl:].*\>/\\]*)
            fail "a stream needs a name without spaces, control characters and . * > / \\, and without - or @ before it" 2
            ;;
    esac
}

# create_stream NAME FLAG...: creates a stream, or verifies that it exists with exactly these flags.
create_stream() {
    local name=$1 wanted
    shift
    check_name "$name"
    case ${REPLICAS:-1} in
        [1-5]) ;;
        *) fail "REPLICAS must be a number from 1 to 5" 2 ;;
    esac
    if natscli stream add "$name" --defaults "$@"; then
        echo "$output"
        return
    fi
    case $output in
        *"(10058)"*) ;; # the name is in use with a different configuration
        *) fail "$name was not created: $output" ;;
    esac
    local unchanged="$name exists with another configuration, and was not changed"
    natscli stream add "$name" --defaults --output=/dev/stdout "$@" || fail "$unchanged: $output"
    wanted=$output
    natscli stream info "$name" --json || fail "$unchanged: $output"
    fail "$unchanged: $(differences "$wanted" <<<"$output")"
}

# differences WANTED: says where the stream on standard input differs from the configuration WANTED (JSON).
differences() {
    python3 -c '
import json, sys
found, wanted = json.load(sys.stdin)["config"], json.loads(sys.argv[1])
print("; ".join(
    f"{key} is {json.dumps(found.get(key))} instead of {json.dumps(value)}"
    for key, value in wanted.items()
    if (found.get(key) or None) != (value or None)
))' "$1"
}
