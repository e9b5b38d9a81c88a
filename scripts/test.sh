#!/usr/bin/env bash
# Installs what is missing into .venv and runs the whole test suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
make_venv dev

# two workers with one thread each are faster here than one worker with two threads
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -q -n "${WORKERS:-2}" --dist loadfile "$@"
