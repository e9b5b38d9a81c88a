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
"$folder/venv/bin/pip" install -q "$1" numpy pytest hypothesis
export PYTHONPATH=$PWD
"$folder/venv/bin/python" -m lsmha_fast info
"$folder/venv/bin/python" -m pytest -q -p no:cacheprovider tests/ops/test_attention_cpp.py \
    tests/ops/test_seq_pool.py tests/ops/test_head_class_sums.py tests/ops/test_conv_stem_cpp.py \
    tests/test_ext.py -k "not triton and not sm_90 and not interpreter and not obeyed"  # see docs/kernels.md
