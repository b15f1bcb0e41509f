#!/usr/bin/env bash
# tools/test.py in several processes, on one machine or more.
# tools/distributed.sh lists the variables that it reads.
set -euo pipefail
usage='bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]'
. "$(dirname "${BASH_SOURCE[0]}")/distributed.sh"

(($# >= 3)) || fail "CONFIG, CHECKPOINT and GPUS should be given, but got '$*'."
launch "$3" test "$1" "$2" "${@:4}"
