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
groups='digits tests'
# The originals' torch is older than the exporter of ONNX that is used.
[ "${E3VA_STACK:-onedl}" != onedl ] || groups+=' export'
# The torchvision that is pinned belongs to the default torch of that stack.
[ "${E3VA_STACK:-onedl}${E3VA_TORCH:-}" != onedl ] || groups+=' mmpretrain'
prepare_environment $groups

heading 'Tests'
# One thread a process: the processes already use all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n auto --maxprocesses 8 "$@"
