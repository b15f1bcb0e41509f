#!/usr/bin/env bash
# tools/test.py as a job of slurm.
# tools/distributed.sh lists the variables that it reads.
set -euo pipefail
usage='bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]'
. "$(dirname "${BASH_SOURCE[0]}")/distributed.sh"

(($# >= 4)) ||
    fail "PARTITION, JOB_NAME, CONFIG and CHECKPOINT should be given, but got '$*'."
submit "$1" "$2" test "$3" "$4" "${@:5}"
