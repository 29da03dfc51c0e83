#!/usr/bin/env bash
# Kill a training N times at random moments, mostly while it saves, start it again each time, and compare it with an
# undisturbed one. The last line is one JSON object; the exit code is 0 when nothing was lost.
#
#   scripts/chaos.sh N [--out FOLDER] [--ranks R] [--seed S]
set -euo pipefail

venv="$("$(dirname "${BASH_SOURCE[0]}")/setup.sh")"
exec "$venv/bin/python" -m specforge.demo.chaos "$@"
