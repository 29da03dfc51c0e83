#!/usr/bin/env bash
# Make an environment in which a bench runs another project's program, and print its interpreter. What they need would not fit into
# the environment of scripts/setup.sh.
#
#   scripts/peer.sh            speculators 0.9.0, for `specforge bench train-step --peer "$(scripts/peer.sh)"` and the tests of exports
#   scripts/peer.sh lm-eval    lm-evaluation-harness 0.4.13, for `scripts/bench_suite.py --peer lm-eval`
#
#   SPECFORGE_PEER_VENV  folder of the environment; default: .venv-peer or .venv-lm-eval beside pyproject.toml
#   SPECFORGE_PYTHON     interpreter to make it with; default: python3.11
#   SPECFORGE_PIP_ARGS   more arguments for `pip install`, as in scripts/setup.sh
set -euo pipefail

export PIP_DISABLE_PIP_VERSION_CHECK=1

root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-speculators}" in
    speculators)
        venv="${SPECFORGE_PEER_VENV:-$root/.venv-peer}"
        packages=("speculators==0.9.0" "transformers<=5.19.0")
        ;;
    lm-eval)
        venv="${SPECFORGE_PEER_VENV:-$root/.venv-lm-eval}"
        packages=("lm-eval==0.4.13" "transformers<6" "accelerate<2")
        ;;
    *)
        echo "peer: there is no peer $1; give speculators or lm-eval." >&2
        exit 2
        ;;
esac
if ! [[ -e "$venv/.complete" ]]; then
    echo "peer: installing ${packages[0]} into $venv; this takes a few minutes" >&2
    "${SPECFORGE_PYTHON:-python3.11}" -m venv "$venv"
    # shellcheck disable=SC2086  # words, not one word
    # Of what it brings little is ever imported: bytecode is made then.
    "$venv/bin/python" -m pip install --quiet --no-compile "${packages[@]}" "torch==2.13.0" ${SPECFORGE_PIP_ARGS:-} >&2
    # Their builds for CUDA do not load beside a torch without it, and a text model needs neither.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio >&2
    touch "$venv/.complete"
fi
echo "$venv/bin/python"
