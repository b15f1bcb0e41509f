#!/usr/bin/env bash
# The whole test suite in the environment of tools/quickstart.sh, or in one of
# the dormant originals:  bash tools/run_tests.sh --stack openmmlab
# Other arguments go to pytest:  bash tools/run_tests.sh tests/test_package.py
set -euo pipefail
if [ "${1:-}" = --stack ]; then
    export E3VA_STACK=${2:?"--stack needs a name, onedl or openmmlab."}
    shift 2
fi
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

heading 'Environment'
prepare_environment digits tests

heading 'Tests'
# One thread a process: the processes already use all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n auto --maxprocesses 8 "$@"
