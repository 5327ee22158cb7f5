#!/usr/bin/env bash
# The benchmark, in the project's own environment: ./scripts/bench/run.sh SET [options]
#
#   ./scripts/bench/run.sh smoke               CPU, minutes: shows that everything works
#   ./scripts/bench/run.sh core --dry-run      what one H100 would measure, and in how many minutes
#   ./scripts/bench/run.sh --help              all sets and options; docs/benchmarks.md explains them
#
# Where the package is installed already, `python -m sglang_sparsespec.bench` is the same.
set -euo pipefail
# shellcheck source=scripts/lib/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/env.sh"

sparsespec_environment bench
# where quickstart.sh put the model
export SPARSESPEC_CACHE="${SPARSESPEC_CACHE:-$REPOSITORY/.cache}"
exec "$PYTHON" -m sglang_sparsespec.bench "$@"
