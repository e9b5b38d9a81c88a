#!/usr/bin/env bash
# Run what was built here under another PyTorch: bash scripts/other_torch.sh torch==2.11.0
# The argument is what pip shall install: a requirement or the path of a wheel. Nothing is compiled:
# the libraries in lsmha_fast/ are the ones that were built against this environment's torch.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 1 ] || { echo "usage: bash scripts/other_torch.sh torch==VERSION|WHEEL" >&2; exit 2; }
[ -e lsmha_fast/_C.abi3.so ] || { echo "build first: python setup.py build_ext --inplace" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
# Triton's interpreter, where there is one, fails with numpy 2.5, and that of 3.6 with 2.4
"$folder/venv/bin/pip" install -q "$1" "numpy<2.4" pytest pytest-xdist hypothesis
export PYTHONPATH=$PWD
"$folder/venv/bin/python" -m lsmha_fast info
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$folder/venv/bin/python" -m pytest -q -p no:cacheprovider -n "${WORKERS:-2}" --dist loadfile \
    tests/ops tests/test_ext.py
