#!/usr/bin/env bash
# All that one GPU can prove, in at most eight minutes.
#
#   bash benchmarks/gpu.sh                       # on the first GPU
#   DEVICE=cpu SIZE=small bash benchmarks/gpu.sh # a trial of the script itself
#
# Figures go to work_dirs/gpu/SIZE: a JSON file for each part, and table.md. If
# interrupted, or out of time (BUDGET, in seconds), rerun it to go on: it measures
# what failed or is not there. Whole detectors need mmcv's operators for the
# device and are left out without; backbones need none.
set -euo pipefail
cd "$(dirname "$0")/.."

device=${DEVICE:-cuda} size=${SIZE:-full}
until=$(($(date +%s) + ${BUDGET:-470}))
status=0
for part in modelled numerics limits compiled steps table; do
  # A process each: an error of CUDA leaves none behind that works.
  "${PYTHON:-python}" benchmarks/gpu.py "$part" --device "$device" \
    --size "$size" --until "$until" || status=1
done
exit $status
