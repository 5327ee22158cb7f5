#!/usr/bin/env bash
# Run the checks: ./scripts/test.sh runs the linters, mypy and every test; ./scripts/test.sh ARGS runs `pytest ARGS`.
# Without a GPU the tests marked gpu are skipped. The fast part: ./scripts/test.sh -m 'not slow'
# Tests that take minutes each (the benchmark end to end, a pool under pressure) run with --long.
set -euo pipefail
# shellcheck source=scripts/lib/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib/env.sh"

sparsespec_environment test
cd "$REPOSITORY"
if [ $# -eq 0 ]; then
    say "ruff check"
    "$PYTHON" -m ruff check .
    say "ruff format --check"
    "$PYTHON" -m ruff format --check .
    say "mypy"
    "$PYTHON" -m mypy
fi
say "pytest $*"
exec "$PYTHON" -m pytest "$@"
