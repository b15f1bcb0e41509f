#!/usr/bin/env bash
# From a bare machine (Python 3.10 to 3.12, a C++ compiler) to a detector that
# was trained, evaluated, measured and drawn. Interrupted, the same command
# goes on. tools/environment.sh lists the variables that it reads.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

config=configs/cascade_e3va_swin_nano_digits.py
data=data/digits
work=work_dirs/quickstart
table=$work/table.md
curves=$work/curves.png
detections=$work/detections.png

again='Run the same command again; should it fail again, the log says why.'

heading '1/6  Environment'
prepare_environment digits

lock "$config"
stamps=$work/.done
logs=$work/logs
mkdir -p "$stamps"

# pending STEP: false, with a note, for a step that was finished before.
pending() {
    if done_before "$1" yes; then
        note 'done before'
        return 1
    fi
}

# What a training must not change between its beginning and its end.
begun=$(checksum "$config" configs/_base_/*.py e3va_mm/datasets/*.py \
    e3va_mm/version.py)
if [ -e "$stamps/begun" ] && ! done_before begun "$begun"; then
    fail "the training in $work was begun with another config or version." \
        "Begin again: mv $work $work.old"
fi
remember begun "$begun"

heading '2/6  Data'
# Says by itself that the data set is complete.
step "digits in photographs, $data" \
    "Remove $data and run the same command again." \
    "$python" tools/make_digits.py --out "$data"

heading '3/6  Training'
if pending training; then
    # In sight, with its bar; mmengine keeps the log in the work directory.
    start "$python" tools/train.py "$config" --work-dir "$work" --resume
    finish || fail 'the training; its error stands above.' \
        "The log is the newest .log file below $work." \
        'Run the same command again to go on from the last checkpoint.'
    remember training yes
fi
best=$(ls -t "$work"/best_*.pth 2>/dev/null | head -n 1 || true)
checkpoint=${best:-$(cat "$work/last_checkpoint")}
note "checkpoint: $checkpoint"

heading '4/6  Evaluation on the test split'
if pending evaluation; then
    step "the checkpoint on the test split of $data" "$again" \
        "$python" tools/test.py "$config" "$checkpoint" \
        --work-dir "$work/test"
    remember evaluation yes
fi

heading '5/6  Parameters, memory and time beside full and frozen'
if pending table; then
    step 'some training steps of each' "$again" \
        "$python" tools/measure.py "$config" --compare full,frozen \
        --json "$work/measured.json"
    "$python" tools/results_table.py "$work" >"$table.new"
    mv "$table.new" "$table"
    remember table yes
fi

heading '6/6  Pictures'
if pending pictures; then
    step 'training curves' "$again" \
        "$python" tools/plot_curves.py "$work" --out "$curves"
    step 'detections on pictures of the test split' "$again" \
        "$python" tools/draw_detections.py "$config" "$checkpoint" \
        --out "$detections"
    remember pictures yes
fi

heading 'Result'
cat "$table"
printf '\nFinished in %s. Table: %s  Pictures: %s %s\n' \
    "$(elapsed)" "$table" "$curves" "$detections"
