#!/usr/bin/env bash
# From a bare machine (Python 3.10 to 3.13, a C++ compiler) to a detector that
# is trained, evaluated, measured and drawn. If interrupted, rerun the command
# to resume. tools/environment.sh lists the variables that it reads.
#   bash tools/quickstart.sh         a nano trunk on digits
#   bash tools/quickstart.sh --real  DINOv2-S on blood cells, from the network
#                                    or from these paths:
#   E3VA_BCCD      the folder BCCD of github.com/Shenggan/BCCD_Dataset
#   E3VA_DINOV2_S  a file of DINOv2 ViT-S/14
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# = 0 ] || [ "$*" = --real ] ||
    fail "unknown arguments: $*" 'Give --real or nothing.'

config=configs/cascade_e3va_swin_nano_digits.py
parents=()
data=data/digits
work=work_dirs/quickstart
groups=digits
weights=()
if [ "${1:-}" = --real ]; then
    config=configs/retinanet_e3va_fusion_dinov2_s_bccd.py
    parents=(configs/retinanet_e3va_dinov2_s_bccd.py)
    data=data/BCCD_Dataset
    work=work_dirs/quickstart_real
    groups+=' mmpretrain'
    for name in E3VA_BCCD E3VA_DINOV2_S; do
        path=${!name:-}
        [ -n "$path" ] || continue
        [ -e "$path" ] || fail "$name=$path does not exist." \
            'Correct the path, or leave it out to download.'
        # The script works in the repository, wherever it was started.
        [[ $path = /* ]] || printf -v "$name" %s "$PWD/$path"
    done
    [ -z "${E3VA_DINOV2_S:-}" ] || weights=(
        --cfg-options "model.backbone.init_cfg.checkpoint=$E3VA_DINOV2_S"
    )
fi
table=$work/table.md
curves=$work/curves.png
detections=$work/detections.png
again='Rerun the command; should it fail again, the log says why.'

heading '1/6  Environment'
prepare_environment $groups

lock "$config"
stamps=$work/.done
logs=$work/logs
# What a training must not change between its beginning and its end.
begun=$(checksum "$config" "${parents[@]}" configs/_base_/*.py \
    e3va_mm/datasets/*.py e3va_mm/version.py)
[ ! -e "$stamps/begun" ] || done_before begun "$begun" || fail \
    "the training in $work was begun with another config or version." \
    "Begin again: mv $work $work.old"
remember begun "$begun"

heading '2/6  Data'
if [ "${1:-}" != --real ]; then
    # Says by itself that the data set is complete.
    step "digits in photographs, $data" "Remove $data and rerun the command." \
        "$python" tools/make_digits.py --out "$data"
elif [ -n "${E3VA_BCCD:-}" ]; then
    mkdir -p "$data"
    [ -L "$data/BCCD" ] || [ ! -e "$data/BCCD" ] || fail \
        "$data/BCCD is there already." \
        'Move it away, or leave E3VA_BCCD out to take it.'
    ln -sfn "$E3VA_BCCD" "$data/BCCD"
elif [ ! -d "$data/BCCD" ]; then
    step "blood cells, $data" "Or set E3VA_BCCD, see $0. $network" \
        git clone --depth 1 https://github.com/Shenggan/BCCD_Dataset "$data"
fi

heading '3/6  Training'
if ! done_before training yes; then
    # In sight, with its bar; mmengine keeps the log in the work directory.
    "$python" tools/train.py "$config" --work-dir "$work" --resume \
        "${weights[@]}" ||
        fail 'the training; its error stands above.' \
            "The log is the newest .log file below $work." \
            'Rerun the command to resume from the last checkpoint.'
    remember training yes
fi
best=$(ls -t "$work"/best_*.pth 2>/dev/null | head -n 1 || true)
checkpoint=${best:-$(cat "$work/last_checkpoint")}
note "checkpoint: $checkpoint"

heading '4/6  Evaluation on the test split'
once evaluation yes "the checkpoint on the test split of $data" "$again" \
    "$python" tools/test.py "$config" "$checkpoint" --work-dir "$work/test"

heading '5/6  Parameters, memory and time beside full and frozen'
once measured yes 'some training steps of each' "$again" \
    "$python" tools/measure.py "$config" --compare full,frozen \
    --json "$work/measured.json"
"$python" tools/results_table.py "$work" >"$table"

heading '6/6  Images'
once curves yes 'training curves' "$again" \
    "$python" tools/plot_curves.py "$work" --out "$curves"
once detections yes 'detections on images of the test split' "$again" \
    "$python" tools/draw_detections.py "$config" "$checkpoint" \
    --out "$detections"

heading 'Result'
cat "$table"
printf '\nFinished in %s. Table: %s  Images: %s %s\n' \
    "$(elapsed)" "$table" "$curves" "$detections"
