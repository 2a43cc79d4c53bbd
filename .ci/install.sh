#!/usr/bin/env bash
# Makes .venv (first argument) ready; called by the Makefile, which leaves the stamp only if this ends well.
# torch goes first and alone: its CPU build is not on PyPI, and an extra index would slow every later look-up.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
log=$venv/install.log

fail() {
    echo "install: $1" >&2
    exit 1
}

quietly() { # run a command, its output to the log; on failure show the end of it
    "$@" >>"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        fail "\`${*: -3}\` failed; the whole output is in $log. Run the same make command again to go on"
    }
}

suits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found (tried: ${PYTHON:-python3.11 python3.12 python3}); install one or name it: make PYTHON=/path/to/python3.11 ..."
}

python=$(find_python)
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] || fail "the headers of $("$python" -V) are missing ($headers/Python.h); install python3-dev"
for tool in git g++; do
    command -v "$tool" >/dev/null || fail "$tool is missing; install it with the system's package manager"
done

extra=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then extra=gpu; fi

echo "[1/4] environment in $venv, $("$python" -V), extra '$extra' (about 4 minutes and 5 GB, once)"
"$python" -m venv "$venv" || fail "\`$python -m venv $venv\` failed; install python3-venv"
: >"$log"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --no-input)
quietly "${pip[@]}" --upgrade pip

if [ "$extra" = cpu ]; then
    torch=$(sed -n 's/.*"\(torch==[0-9.]*\)".*/\1+cpu/p' pyproject.toml)
    echo "[2/4] $torch"
    if ! "${pip[@]}" "$torch" >>"$log" 2>&1; then
        echo "      not on the configured package index; asking PyTorch's"
        quietly "${pip[@]}" "$torch" --index-url https://download.pytorch.org/whl/cpu
    fi
else
    echo "[2/4] torch comes with vLLM on GPUs"
fi

echo "[3/4] turnstile-rl[$extra,dev]"
quietly "${pip[@]}" --editable ".[$extra,dev]"

# The PyPI builds of these are CUDA-linked: beside a CPU torch they break `import transformers`, and nothing here needs them.
for package in torchvision torchaudio torchcodec; do
    if "$venv/bin/python" -m pip show --quiet $package 2>/dev/null && ! "$venv/bin/python" -c "import $package" 2>>"$log"; then
        quietly "$venv/bin/python" -m pip uninstall --yes $package
    fi
done

echo "[4/4] checking imports"
quietly "$venv/bin/python" -c 'import torch, transformers, trl, hydra; from transformers import Trainer'
