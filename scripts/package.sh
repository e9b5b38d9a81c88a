#!/usr/bin/env bash
# Builds the sdist and the wheel and tries both as a user would: bash scripts/package.sh [TORCH ...]
# Each TORCH is what pip shall install (default: the version of constraints.txt), in a fresh venv of
# its own. The archives are left in dist/. A full run needs nvcc where this environment's torch is a
# CUDA build; EXTRAS (default train,data,report) are what the wheel is installed with.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
extras=${EXTRAS:-train,data,report}
[ $# -gt 0 ] || set -- "$(grep '^torch==' constraints.txt)"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

step() { echo "== $*"; }

step "sdist, and the wheel from it alone"
rm -rf dist
LSMHA_BUILD=require "$python" -m build --no-isolation --outdir dist . >"$folder/build.log" 2>&1 ||
    { tail -20 "$folder/build.log" >&2; exit 1; }
ls -sh1 dist
wheel=$(realpath dist/*.whl) sdist=$(realpath dist/*.tar.gz)
LSMHA_ARCHIVES=$PWD/dist "$python" -m pytest -q -p no:cacheprovider tests/test_package.py

step "only Python's limited API is used"
"$python" -m venv "$folder/tools"
"$folder/tools/bin/pip" install -q abi3audit
"$folder/tools/bin/abi3audit" --strict --summary "$wheel"

# nothing of the sources is in sight where the archives are tried
mkdir "$folder/empty" "$folder/tests"
cp scripts/try_installed.py README.md "$folder"
cp tests/test_ext.py tests/conftest.py "$folder/tests"
root=$PWD
cd "$folder/empty"
unset PYTHONPATH

listing() { (cd "$1" && find . -not -path '*/__pycache__*' | sort); }

try() { # VENV ARCHIVE[EXTRAS]
    local bin=$1/bin
    "$bin/pip" install -q "$2"
    "$bin/lsmha" info
    "$bin/python" ../try_installed.py ../README.md
    "$bin/lsmha" arch cct_7_3x1_32 --num-heads 64 --conv-blocks 2 | tail -2
}

for torch in "$@"; do
    step "wheel with $torch"
    venv=$folder/venv
    rm -rf "$venv" run
    "$python" -m venv "$venv"
    # what the wheel needs first, so that afterwards only its own files can be new
    "$venv/bin/pip" install -q "$torch" "numpy<2.5" pytest "$wheel[$extras]"
    "$venv/bin/pip" uninstall -q -y lsmha_fast
    listing "$venv" >before
    try "$venv" "$wheel"
    "$venv/bin/lsmha" train --data digits --num-heads 4 --train-images 128 --epochs 1 --out run | tail -3
    "$venv/bin/python" -m pytest -q -p no:cacheprovider ../tests/test_ext.py
    "$venv/bin/pip" uninstall -q -y lsmha_fast
    listing "$venv" | diff before - || { echo "pip uninstall left these" >&2; exit 1; }
    [ -z "$(find "$venv" -iname '*lsmha*')" ] || { echo "something of lsmha_fast is left" >&2; exit 1; }

    step "sdist without native kernels, with $torch"
    LSMHA_BUILD=skip try "$venv" "$sdist"
done
step "done; archives in $root/dist"
