#!/bin/sh
# Makes the virtual environment $1 and installs penstock in it, with the versions of constraints.txt.
#
# torch comes first and by itself, because its default build for Linux brings several gigabytes of CUDA packages. Without
# an NVIDIA GPU the CPU build is tried first: from the index that pip is configured with, then from TORCH_INDEX. The
# default build is the last resort; with an NVIDIA GPU, and on macOS, it is the right one. TORCH=cuda or TORCH=cpu says
# which, whatever this machine has; EXTRAS are those of pyproject.toml that are installed; PACKAGE is a
# wheel to install in place of this checkout.
set -eu
venv=$1
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
torch=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' constraints.txt)
extras=${EXTRAS:-dev,serve,verify}

say() { echo "setup: $*"; }
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"; }
try() { install --no-deps "$@" >>"$venv/setup.log" 2>&1; } # what torch needs is installed with penstock, below

[ -n "${PYTHON:-}" ] || { say "penstock needs Python 3.11 to 3.14. Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "virtual environment $venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv "$venv" || {
        say "$PYTHON made no virtual environment. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
fi
command -v "${CC:-cc}" >/dev/null ||
    say "no C compiler: a CPU takes two to five times as long. On Debian and Ubuntu: sudo apt install gcc"

if "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    say "torch $torch is installed already"
elif [ "${TORCH:-}" != cpu ] && { [ "${TORCH:-}" = cuda ] || command -v nvidia-smi >/dev/null 2>&1 || [ "$(uname -s)" = Darwin ]; }; then
    say "torch $torch, the default build for this machine"
    install "torch==$torch"
else
    say "torch $torch, the CPU build: this machine has no NVIDIA GPU"
    if ! try "torch==$torch+cpu"; then
        say "torch $torch, the CPU build, from $index"
        if ! try --timeout 30 --retries 1 --index-url "$index" "torch==$torch+cpu"; then
            say "no CPU build was found (see $venv/setup.log); installing the default build: several gigabytes on Linux"
            install "torch==$torch"
        fi
    fi
fi
say "penstock and its other packages"
if [ -n "${PACKAGE:-}" ]; then install "$PACKAGE[$extras]"; else install --editable ".[$extras]"; fi
