#!/usr/bin/env bash
# Train every method on the embedded target, with equal rows, steps and parameters and several seeds, and compare them in one table.
# What an earlier call has trained is kept. The last line is one JSON object.
#
#   scripts/compare_methods.sh [--out FOLDER] [--steps N] [--seeds N] [--rows N]
set -euo pipefail

venv="$("$(dirname "${BASH_SOURCE[0]}")/setup.sh")"
exec "$venv/bin/python" -m specforge compare "$@"
