#!/usr/bin/env bash
# tools/train.py in several processes, on one machine or more.
# tools/distributed.sh lists the variables that it reads.
set -euo pipefail
usage='bash tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]'
. "$(dirname "${BASH_SOURCE[0]}")/distributed.sh"

(($# >= 2)) || fail "CONFIG and GPUS should be given, but got '$*'."
launch "$2" train "$1" "${@:3}"
