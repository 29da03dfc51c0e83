#!/usr/bin/env bash
# Build the documentation into one folder, with every warning an error. The pages need no network, neither now nor when they are read.
#
#   scripts/docs.sh [FOLDER]   default: site beside pyproject.toml. Open FOLDER/index.html; the search box works where the folder is served, for
#                              instance by `python -m http.server --directory FOLDER`
#
#   SPECFORGE_DOCS_VENV  folder of the environment; default: .venv-docs beside pyproject.toml
#   SPECFORGE_PYTHON     interpreter to make it with; default: python3.11
#   SPECFORGE_PIP_ARGS   more arguments for `pip install`, as in scripts/setup.sh
set -euo pipefail

export PIP_DISABLE_PIP_VERSION_CHECK=1

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${SPECFORGE_DOCS_VENV:-$root/.venv-docs}"
[[ "$venv" = /* ]] || venv="$PWD/$venv"
site="${1:-$root/site}"
[[ "$site" = /* ]] || site="$PWD/$site"
stamp="$venv/.complete"

if ! cmp --quiet "$root/docs/constraints.txt" "$stamp"; then
    echo "docs: installing mkdocs into $venv; this takes a minute" >&2
    "${SPECFORGE_PYTHON:-python3.11}" -m venv "$venv"
    # shellcheck disable=SC2086  # words, not one word
    "$venv/bin/python" -m pip install --quiet mkdocs mkdocs-material mkdocstrings-python ruff \
        -c "$root/docs/constraints.txt" ${SPECFORGE_PIP_ARGS:-} >&2
    cp "$root/docs/constraints.txt" "$stamp"
fi
cd "$root"
NO_MKDOCS_2_WARNING=1 "$venv/bin/python" -m mkdocs build --strict --site-dir "$site"
echo "$site/index.html"
