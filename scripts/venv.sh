# Sourced by demo.sh and test.sh: makes .venv with the package and the extras in $1, or reuses it.
# Needs Python >= 3.10 (choose another with PYTHON=...); with a C++ compiler the native kernels
# are built too.

fail() {
    echo "error: $*" >&2
    exit 1
}

make_venv() {
    local extras=$1 python=${PYTHON:-python3} stamp=.venv/.installed-$1 want
    command -v "$python" >/dev/null || fail "$python not found; install Python >= 3.10 or set PYTHON"
    want=$(cat pyproject.toml constraints.txt setup.py csrc/*/* 2>/dev/null | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        return
    fi
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            fail "$("$python" --version) is too old; Python >= 3.10 is needed (set PYTHON)"
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv || fail "$python cannot make a venv (on Debian: apt install python3-venv)"
    fi
    echo "installing the package with [$extras] and its dependencies (a few minutes the first time)"
    local pip=".venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt"
    # torch first: building the native kernels needs it
    $pip "torch>=2.11,<2.16" numpy "setuptools>=77" wheel ninja
    $pip --no-build-isolation -e ".[$extras]"
    echo "$want" >"$stamp"
}
