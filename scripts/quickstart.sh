#!/usr/bin/env bash
# From a fresh checkout to a trained and measured draft model, on any CPU and without a download of weights or data.
#
#   scripts/quickstart.sh [arguments of `specforge demo`]
set -euo pipefail

venv="$("$(dirname "${BASH_SOURCE[0]}")/setup.sh")"
exec "$venv/bin/python" -m specforge demo "$@"
