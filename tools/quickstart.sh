#!/usr/bin/env bash
# From a bare machine (Python 3.10 to 3.13, a C++ compiler) to a detector that
# is trained, evaluated, measured and drawn. If interrupted, rerun the command
# to resume. tools/environment.sh lists the variables that it reads.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

config=configs/cascade_e3va_swin_nano_digits.py
data=data/digits
work=work_dirs/quickstart
table=$work/table.md
curves=$work/curves.png
detections=$work/detections.png
again='Rerun the command; should it fail again, the log says why.'

heading '1/6  Environment'
prepare_environment digits

lock "$config"
stamps=$work/.done
logs=$work/logs
# What a training must not change between its beginning and its end.
begun=$(checksum "$config" configs/_base_/*.py e3va_mm/datasets/*.py \
    e3va_mm/version.py)
[ ! -e "$stamps/begun" ] || done_before begun "$begun" || fail \
    "the training in $work was begun with another config or version." \
    "Begin again: mv $work $work.old"
remember begun "$begun"

heading '2/6  Data'
# Says by itself that the data set is complete.
step "digits in photographs, $data" "Remove $data and rerun the command." \
    "$python" tools/make_digits.py --out "$data"

heading '3/6  Training'
if ! done_before training yes; then
    # In sight, with its bar; mmengine keeps the log in the work directory.
    "$python" tools/train.py "$config" --work-dir "$work" --resume ||
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
