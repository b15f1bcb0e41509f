#!/usr/bin/env bash
# One whole training step of four workloads beside full fine-tuning and both
# frozen rows: `as-is` is `lean`, `frozen-same` the frozen trunk under its
# options.
#
#   bash benchmarks/workloads.sh w1 [options of tools/measure.py]
#     (but --cfg-options, which it gives itself)
#   bash benchmarks/workloads.sh w1-methods  # all baselines, and E3VA exact, lean
#   bash benchmarks/workloads.sh w1-mix  # E3VA-Mix as `lean`
#   bash benchmarks/workloads.sh w1-fusion  # E3VA-Fusion as `lean`
#
# Figures go to work_dirs/benchmarks/; if interrupted, rerun the command to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

workload=${1:?one of w1 w2 w3 w4 w4-checkpointed, w1-methods, w1-mix...}
shift
compare=full,frozen,frozen-same,exact
options=(model.backbone.tuner.preset=lean)
case $workload in
  *-methods)
    compare=full,frozen,bitfit,norm,partial1,adapter,lora,adaptformer,lorand
    compare+=,mona,lean
    options=(model.backbone.tuner.preset=exact)
    ;;
  *-mix | *-fusion)
    compare=frozen-same
    type=${workload#*-}
    options+=("model.backbone.tuner.type=E3VA${type^}")
    ;;
esac
case ${workload%-[mf]*} in
  w1) step=(configs/cascade_e3va_swin_b_coco.py --size 800 1216 --batch 1) ;;
  w2) step=(configs/retinanet_e3va_swin_l_voc.py --size 608 1000 --batch 2) ;;
  w3) step=(configs/upernet_e3va_swin_l_ade20k.py --size 512 512 --batch 2) ;;
  w4) step=(configs/cascade_e3va_swin_l_coco.py --size 800 1216 --batch 1) ;;
  w4-checkpointed)
    step=(configs/cascade_e3va_swin_l_coco_6gb.py --size 800 1216 --batch 1)
    compare=frozen-same  # full would not be checkpointed
    ;;
  *) echo "error: no workload $workload" >&2; exit 2 ;;
esac
exec "${PYTHON:-python}" tools/measure.py "${step[@]}" \
  "$@" --compare "$compare" --steps 3 --warmup 1 \
  --json "work_dirs/benchmarks/$workload.json" --resume \
  --cfg-options "${options[@]}"
