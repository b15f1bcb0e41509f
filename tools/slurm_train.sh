#!/usr/bin/env bash
# tools/train.py as a job of slurm.
# tools/distributed.sh lists the variables that it reads.
set -euo pipefail
usage='bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]'
. "$(dirname "${BASH_SOURCE[0]}")/distributed.sh"

(($# >= 4)) ||
    fail "PARTITION, JOB_NAME, CONFIG and WORK_DIR should be given, but got '$*'."
submit "$1" "$2" train "$3" --work-dir "$4" "${@:5}"
