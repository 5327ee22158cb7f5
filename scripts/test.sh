#!/usr/bin/env bash
# Run the checks: ./scripts/test.sh runs the linters, mypy and every test; ./scripts/test.sh ARGS runs `pytest ARGS`.
# Without a GPU the tests marked gpu are skipped. The fast part: ./scripts/test.sh -m 'not slow'
# Tests that take minutes each (the benchmark end to end, a pool under pressure) run with --long.
set -euo pipefail
# shellcheck source=scripts/lib/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

sparsespec_environment test
cd "$REPOSITORY"
if [ $# -gt 0 ]; then
    say "pytest $*"
    exec "$PYTHON" -m pytest "$@"
fi
say "ruff check"
"$PYTHON" -m ruff check .
say "ruff format --check"
"$PYTHON" -m ruff format --check .
say "mypy"
"$PYTHON" -m mypy

# tests with servers leave a second core idle, and the others need twenty minutes of one
others="$(mktemp)"
trap 'rm -f "$others"' EXIT
nice -n 10 "$PYTHON" -m pytest --ignore=tests/e2e >"$others" 2>&1 </dev/null &
beside=$!
trap 'kill "$beside" 2>/dev/null; exit 130' INT TERM
status=0
say "pytest tests/e2e (all others run beside it; what they say comes at the end)"
"$PYTHON" -m pytest tests/e2e || status=$?
wait "$beside" || status=$?
say "pytest --ignore=tests/e2e"
cat "$others"
exit "$status"
