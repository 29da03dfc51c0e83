#!/usr/bin/env bash
# Format, lint, types and tests: what a change must pass.
#
#   scripts/test.sh [--all] [pytest arguments]     --all adds the second tier, the tests marked `long`, beside the first
set -euo pipefail

scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$("$scripts/setup.sh")"
cd "$scripts/.."

all=false
if [[ "${1:-}" == "--all" ]]; then
    all=true
    shift
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
python="$venv/bin/python"
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
$all || exec "$python" -m pytest "$@"

first="$(mktemp)"
trap 'kill $! 2>/dev/null || true; rm -f "$first"' EXIT
trap 'exit 130' INT
"$python" -m pytest "$@" >"$first" 2>&1 &
codes=(0 0)
"$python" -m pytest -m long "$@" || codes[1]=$?
wait $! || codes[0]=$?
cat "$first"
none=5 # of a tier was asked for
for code in "${codes[@]}"; do
    [[ $code == 0 || $code == "$none" ]] || exit "$code"
done
[[ " ${codes[*]} " == *" 0 "* ]] || exit "$none"
