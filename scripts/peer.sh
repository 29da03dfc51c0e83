#!/usr/bin/env bash
# Make the environment in which `specforge bench train-step --peer` runs speculators 0.9.0, and print its interpreter.
# It needs an older transformers than specforge, so it cannot share the environment of scripts/setup.sh.
#
#   SPECFORGE_PEER_VENV  folder of the environment; default: .venv-peer beside pyproject.toml
#   SPECFORGE_PYTHON     interpreter to make it with; default: python3.11
#   SPECFORGE_PIP_ARGS   more arguments for `pip install`, as in scripts/setup.sh
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${SPECFORGE_PEER_VENV:-$root/.venv-peer}"
if ! [[ -e "$venv/.complete" ]]; then
    "${SPECFORGE_PYTHON:-python3.11}" -m venv "$venv"
    # shellcheck disable=SC2086  # words, not one word
    "$venv/bin/python" -m pip install --quiet "speculators==0.9.0" "transformers<=5.19.0" "torch==2.13.0" ${SPECFORGE_PIP_ARGS:-} >&2
    # Their builds for CUDA do not load beside a torch without it, and a text model needs neither.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio >&2
    touch "$venv/.complete"
fi
echo "$venv/bin/python"
