#!/usr/bin/env bash
# A suite's tasks scored with and without sharing prefixes, side by side: raw and forwarded tokens, time, peak memory.
#
#   scripts/prefix_demo.sh [--model FOLDER] [--examples N]
set -euo pipefail

venv="$("$(dirname "${BASH_SOURCE[0]}")/setup.sh")"
exec "$venv/bin/python" -m specforge.demo.prefixes "$@"
