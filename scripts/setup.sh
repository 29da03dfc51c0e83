#!/usr/bin/env bash
# Make the virtual environment of this checkout and print where it is. The second run takes a fraction of a second.
#
#   SPECFORGE_VENV      folder of the environment; default: .venv beside pyproject.toml
#   SPECFORGE_PYTHON    interpreter to make it with; default: the first of python3.11, python3, python3.12, python3.13
#   SPECFORGE_PIP_ARGS  more arguments for `pip install`. A plain install of torch on Linux brings gigabytes of CUDA;
#                       without a GPU, name PyTorch's index of CPU wheels: SPECFORGE_PIP_ARGS="--extra-index-url URL"
set -euo pipefail

export PIP_DISABLE_PIP_VERSION_CHECK=1

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${SPECFORGE_VENV:-$root/.venv}"
[[ "$venv" = /* ]] || venv="$PWD/$venv"
stamp="$venv/.specforge-installed"
unfinished="$venv/.specforge-unfinished"

fail() {
    echo "setup: $1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${SPECFORGE_PYTHON:-python3.11 python3 python3.12 python3.13}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer among ${SPECFORGE_PYTHON:-python3.11 python3 python3.12 python3.13}; install one or name it in SPECFORGE_PYTHON."
}

# What the installed environment depends on; it is as recent as the stamp that holds this hash.
fingerprint() {
    "$venv/bin/python" - "$root" "${SPECFORGE_PIP_ARGS:-}" <<'PYTHON'
import hashlib, pathlib, sys
root, pip_args = sys.argv[1:]
parts = [sys.version, root, pip_args, *((pathlib.Path(root) / name).read_text() for name in ("pyproject.toml", "constraints.txt"))]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

# Two set-ups of one checkout take turns where the system has a lock to offer.
if command -v flock >/dev/null; then
    exec 9>"$root/.setup.lock"
    flock 9
fi

if ! [[ -x "$venv/bin/python" ]]; then
    if [[ -e "$venv" && ! -e "$venv/pyvenv.cfg" && -n "$(ls -A "$venv")" ]]; then
        fail "SPECFORGE_VENV=$venv is a folder that holds something else; name an empty or new one."
    fi
    python="$(find_python)"
    echo "setup: making $venv with $("$python" -V)" >&2
    "$python" -m venv "$venv" || fail "$python cannot make environments; on Debian and Ubuntu install python3-venv."
fi

wanted="$(fingerprint)"
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    # pip does not notice a package of which an interrupted run wrote only half, so after one everything is written again.
    again=""
    [[ -e "$unfinished" ]] && again="--force-reinstall"
    rm -f "$stamp"
    touch "$unfinished"
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade >&2
    echo "setup: installing specforge and its development tools into $venv; this takes a few minutes" >&2
    # shellcheck disable=SC2086  # both hold words, not one word
    "$venv/bin/python" -m pip install --quiet $again -e "$root[dev]" -c "$root/constraints.txt" ${SPECFORGE_PIP_ARGS:-} >&2
    echo "$wanted" >"$stamp"
    rm -f "$unfinished"
fi
echo "$venv"
