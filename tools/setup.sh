#!/bin/sh
# Makes the virtual environment $1 and installs penstock with pinned versions.
#
# torch comes first and by itself: without an NVIDIA GPU only a CPU build is acceptable, never the default Linux build
# that brings gigabytes of CUDA packages along. TORCH_INDEX may name a wheel index that has CPU builds (the address that
# pytorch.org's "get started" page prints for CPU); with a GPU, the default build is what you want.
set -eu
venv=$1
[ -n "${PYTHON:-}" ] || { echo "penstock needs Python 3.11 or 3.12; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
torch=$(sed -n 's/^torch==//p' constraints.txt)
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt"

if "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    :
elif command -v nvidia-smi >/dev/null 2>&1 || [ "$(uname -s)" = Darwin ]; then
    $pip "torch==$torch"
else
    $pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "torch==$torch+cpu" || {
        echo "No CPU build of torch $torch was found, and the default build would bring gigabytes of CUDA packages." >&2
        echo "Run again with TORCH_INDEX=ADDRESS, the wheel index that pytorch.org's start page prints for CPU." >&2
        exit 2
    }
fi
$pip --editable ".[dev,serve]"
