#!/usr/bin/env bash
# The whole test suite in the environment of tools/quickstart.sh.
# Arguments go to pytest:  bash tools/run_tests.sh tests/test_package.py
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

heading 'Environment'
groups='digits tests export'
# The torchvision that is pinned belongs to the default torch.
[ "${E3VA_TORCH:-}" ] || groups+=' mmpretrain'
prepare_environment $groups

heading 'Tests'
# One thread a process: the processes already use all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n auto --maxprocesses 8 "$@"
