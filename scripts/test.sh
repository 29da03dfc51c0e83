#!/usr/bin/env bash
# Format, lint, types and tests: what a change must pass.
#
#   scripts/test.sh [--all] [pytest arguments]     --all adds the second tier, the tests marked `long`
set -euo pipefail

scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$("$scripts/setup.sh")"
cd "$scripts/.."

tier=""
if [[ "${1:-}" == "--all" ]]; then
    tier="--long"
    shift
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
python="$venv/bin/python"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
exec "$python" -m pytest $tier "$@"
