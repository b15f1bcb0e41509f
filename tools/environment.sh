# The environment of tools/quickstart.sh and tools/run_tests.sh; to be sourced.
#
# `prepare_environment digits tests` makes .venv in the repository, fills it
# with the packages of requirements/ and sets $python. Every step is stamped
# with a hash of what it depends on, so that a second call is quick and an
# interrupted one goes on where it stopped.
#
# Read from the caller's environment:
#   PYTHON      the interpreter to start from (3.10 to 3.12)
#   E3VA_STACK  which frameworks: onedl, the default, or openmmlab, the dormant
#               originals, which need Python 3.10 or 3.11
#   E3VA_VENV   the folder of the environment; default .venv, and
#               .venv-openmmlab for the originals
#   E3VA_TORCH  the version of torch, such as 2.13.0+cpu; default 2.13.0, and
#               2.1.2 for the originals
#   E3VA_CACHE  where compiled ops are kept; default ~/.cache/e3va_mm
#   MAX_JOBS    compilers at a time; default all cores
# Where packages come from is pip's own affair (pip.conf, PIP_INDEX_URL,
# PIP_FIND_LINKS ...).

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${E3VA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/e3va_mm}
child=
SECONDS=0

unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# -- saying ------------------------------------------------------------------

elapsed() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }

heading() { printf '\n== %s  [%s]\n' "$1" "$(elapsed)"; }

note() { printf '   %s\n' "$1"; }

# fail WHAT WHAT_TO_DO: the end of the script, explained.
fail() {
    printf '\nFAILED  %s\n' "$1" >&2
    printf 'TO DO   %s\n' "${@:2}" >&2
    exit 1
}

# -- choosing ----------------------------------------------------------------

# choose_stack NAME: sets where the environment lies and what goes into it.
# Pythons come in order of preference; files are those of requirements/.
choose_stack() {
    case $1 in
    onedl)
        pythons='3.11 3.12 3.10' frameworks=mminstall pins=tested
        ops=onedl-mmcv torch_version=2.13.0 venv=.venv
        ;;
    openmmlab)
        # mmcv 2.1.0 belongs to torch 2.1.
        pythons='3.10 3.11' frameworks=openmmlab pins=openmmlab
        ops=mmcv torch_version=2.1.2 venv=.venv-openmmlab
        ;;
    *)
        fail "There is no stack called '$1'." \
            'Choose onedl, the maintained frameworks, or openmmlab.'
        ;;
    esac
    torch_version=${E3VA_TORCH:-$torch_version}
    venv=${E3VA_VENV:-$repository/$venv}
}

# -- doing -------------------------------------------------------------------

# A command runs in a process group of its own, so that an interruption ends
# all of it (pip, ninja, compilers, data loaders) and nothing else.
interrupted() {
    if [ -n "$child" ]; then
        kill -TERM -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    printf '\nInterrupted. The same command goes on from here.\n' >&2
    exit 130
}
trap interrupted INT TERM HUP

# start COMMAND...: in the background, as $child.
start() {
    set -m
    "$@" </dev/null &
    child=$!
    set +m
}

# finish: the status of $child.
finish() {
    local status=0
    wait "$child" || status=$?
    child=
    return $status
}

# The last [done/total] of a log, such as ninja writes, or its last line.
progress() {
    local count
    count=$(grep -o '^ *\[[0-9]*/[0-9]*\]' "$1" | tail -n 1 || true)
    printf '%s' "${count:-$(tail -n 1 "$1" | cut -c 1-60)}"
}

# quietly LOG COMMAND...: output goes into LOG; a sign of life each 30 s.
quietly() {
    local log=$1 began=$SECONDS
    shift
    mkdir -p "$(dirname "$log")"
    start "$@" >"$log" 2>&1
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - began >= 30)); then
            began=$SECONDS
            printf '   [%s] %s\n' "$(elapsed)" "$(progress "$log")"
        fi
    done
    finish
}

# step TITLE TO_DO COMMAND...: a quiet command that must succeed.
step() {
    local title=$1 todo=$2
    local log=$logs/${title//[^A-Za-z0-9]/_}.log
    shift 2
    note "$title"
    if ! quietly "$log" "$@"; then
        printf '\n-- the last lines of %s\n' "$log" >&2
        tail -n 15 "$log" >&2
        fail "$title" "$todo" "The command was: $*" "Its whole output: $log"
    fi
}

# lock FILE: wait for others who hold it. All commands inherit the lock, so
# that it also covers those which a killed script has left at work.
lock() {
    exec 9<"$1"
    command -v flock >/dev/null || return 0
    if ! flock -n 9; then
        note "Another run of this, or what is left of one, is at work here;"
        note "waiting for it to end ..."
        flock 9
    fi
}

unlock() { exec 9<&-; }

# -- remembering -------------------------------------------------------------

# checksum FILE...
checksum() { cat -- "$@" | cksum | tr -d ' '; }

# done_before NAME KEY, remember NAME KEY: the stamps in $stamps.
done_before() { [ "$(cat "$stamps/$1" 2>/dev/null)" = "$2" ]; }

remember() {
    mkdir -p "$stamps"
    printf '%s' "$2" >"$stamps/$1.new"
    mv "$stamps/$1.new" "$stamps/$1"
}

# -- Python ------------------------------------------------------------------

supported() {
    "$1" -c 'import sys
sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1].split())' \
        "$pythons" 2>/dev/null
}

# Sets $base to the interpreter to start from.
find_python() {
    local candidate crippled='' wanted=${pythons// / or }
    if [ -n "${PYTHON:-}" ] && ! supported "$PYTHON"; then
        fail "PYTHON=$PYTHON is not a Python $wanted." \
            'Set PYTHON to the path of one, or unset it.'
    fi
    # The first is the one that the pinned versions were tested with.
    for candidate in ${PYTHON:-python${pythons// / python} python3}; do
        supported "$candidate" || continue
        base=$("$candidate" -c 'import sys; print(sys.executable)')
        "$base" -c 'import ensurepip, venv' 2>/dev/null && return
        crippled=$base
    done
    if [ -n "$crippled" ]; then
        fail "$crippled has no venv and ensurepip to make environments with." \
            'Debian and Ubuntu: apt-get install python3-venv'
    fi
    fail "No Python $wanted was found on the PATH." \
        'Debian and Ubuntu: apt-get install python3 python3-venv python3-dev' \
        "Or name one: PYTHON=/path/to/python${pythons%% *} and the same command"
}

identity() {
    "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null
}

# Sets $python.
make_venv() {
    python=$venv/bin/python
    if [ -e "$stamps/venv" ] && supported "$python" && {
        [ -z "${PYTHON:-}" ] ||
            [ "$(identity "$python")" = "$(identity "$PYTHON")" ]
    }; then
        return
    fi
    find_python
    if [ -e "$venv" ] && [ ! -d "$stamps" ]; then
        fail "$venv exists and was not made here." \
            'Move it away, or set E3VA_VENV to another folder.'
    fi
    rm -rf -- "$venv"
    mkdir -p "$stamps"
    step "a new environment from $base" \
        'Set PYTHON to another interpreter and run the same command again.' \
        "$base" -m venv "$venv"
    remember venv "$base"
}

# -- packages ----------------------------------------------------------------

pip() { "$python" -m pip "$@"; }

network='Check the network and the settings of pip (pip config list), then run the same command again.'

# The torch that is installed must stay, and so must what was tested.
install() { pip install -c "$requirements/$pins.txt" "$torch" "$@"; }

# The last that pip writes of a package is INSTALLER: forget packages that were
# killed before, so that pip installs them again.
forget_half_installed() {
    local info
    for info in "$venv"/lib/python3.*/site-packages/*.dist-info; do
        [ -e "$info/INSTALLER" ] || rm -rf -- "$info"
    done
}

# install_packages KEY GROUP...: what requirements/GROUP.txt names.
install_packages() {
    local key=$1 group pending='' files=()
    shift
    for group in "$@"; do
        done_before "$group" "$key-$(checksum "$requirements/$group.txt")" &&
            continue
        pending="$pending $group"
        # The ops of mmcv must fit torch: they have a step of their own.
        grep -v "^$ops[=><~]" "$requirements/$group.txt" \
            >"$stamps/$group.txt"
        files+=(-r "$stamps/$group.txt")
    done
    [ -n "$pending" ] || return 0
    step "packages of requirements/:$pending" "$network" \
        install "${files[@]}"
    if [[ " $pending " == *" $frameworks "* ]]; then
        # opencv-python, which mmcv and imaug pull in, overwrites the files of
        # the headless build and needs libGL: put them back.
        step 'OpenCV that needs no display' "$network" \
            install_headless_opencv
    fi
    for group in $pending; do
        remember "$group" "$key-$(checksum "$requirements/$group.txt")"
    done
}

install_headless_opencv() {
    local version
    version=$("$python" -c 'from importlib.metadata import version
print(version("opencv-python-headless"))')
    pip install --force-reinstall --no-deps "opencv-python-headless==$version"
}

# -- the compiled ops of mmcv ------------------------------------------------

# Fails unless nms and roi_align run on the device $1.
ops_run_on() {
    "$python" - "$1" <<'PYTHON'
import sys

import torch
from mmcv.ops import nms, roi_align

device = sys.argv[1]
boxes = torch.tensor([[0., 0., 8., 8.], [0., 0., 8., 7.]], device=device)
scores = torch.tensor([.9, .8], device=device)
assert len(nms(boxes, scores, 0.5)[1]) == 1
rois = torch.tensor([[0., 0., 0., 8., 8.]], device=device)
crop = roi_align(torch.ones(1, 1, 8, 8, device=device), rois, 2)
assert torch.allclose(crop, torch.ones_like(crop))
PYTHON
}

check_compiler() {
    local trial=$stamps/trial include
    local command=${CXX:-c++}
    include=$("$python" -c 'import sysconfig
print(sysconfig.get_path("include"))')
    command -v "${command%% *}" >/dev/null || fail \
        "No C++ compiler: the ops of mmcv must be built and $command was not found." \
        'Debian and Ubuntu: apt-get install g++' \
        'Or set CXX to the path of a compiler.'
    printf '#include <Python.h>\n#include <optional>\nint main() {}\n' \
        >"$trial.cpp"
    $command -std=c++17 -I"$include" -c "$trial.cpp" -o "$trial.o" \
        2>"$trial.log" || fail \
        "$command cannot compile C++17 with Python.h; see $trial.log" \
        'Debian and Ubuntu: apt-get install g++ python3-dev'
}

# A wheel that pip finds; the index may offer none, or one for another torch.
download_ops() {
    rm -rf -- "$venv/wheels"
    quietly "$logs/binary_ops.log" pip download -d "$venv/wheels" --no-deps \
        --only-binary "$ops" "$ops_pin"
}

install_ops_wheel() {
    pip install --no-deps --force-reinstall "$1"/*.whl
}

# Compiles in a folder that is kept, so that ninja finds what it finished.
build_ops() {
    local source=$1 wheels=$2
    if [ ! -d "$source" ]; then
        rm -rf -- "$source.new" "$source.sdist"
        mkdir -p "$source.new"
        pip download -d "$source.sdist" --no-deps --no-binary "$ops" \
            --no-build-isolation "$ops_pin" || return
        tar -xzf "$source.sdist"/*.tar.gz -C "$source.new" \
            --strip-components 1 || return
        mv "$source.new" "$source"
    fi
    rm -rf -- "$wheels.new"
    # Without debug symbols: compilers need less memory and time.
    CFLAGS="${CFLAGS:-} -g0" MMCV_WITH_OPS=1 MAX_JOBS=$jobs \
        "$python" -m pip wheel -v -w "$wheels.new" --no-deps \
        --no-build-isolation "$source" || return
    rm -rf -- "$wheels"
    mv "$wheels.new" "$wheels"
}

# Sets $device to the first of $devices on which the installed ops run.
try_ops() {
    for device in $devices; do
        ops_run_on "$device" >"$logs/ops_check.log" 2>&1 && return
    done
    return 1
}

install_ops() {
    local devices device tag wheels found jobs
    # The devices whose ops will do, best first; those for cuda can only be
    # compiled where nvcc is.
    read -r tag devices < <("$python" -c '
import platform, sys, torch
from torch.utils.cpp_extension import CUDA_HOME
gpu = torch.cuda.is_available()
devices = "cuda" if gpu and CUDA_HOME else "cuda cpu" if gpu else "cpu"
print(sys.implementation.cache_tag, platform.machine(), torch.__version__,
      devices.split()[-1], sep="-", end=" ")
print(devices)')
    wheels=$cache/$ops_pin/$tag
    for found in "$wheels" "$venv/wheels"; do
        compgen -G "$found/*.whl" >/dev/null || continue
        step "the compiled ops of mmcv, from $found" "$network" \
            install_ops_wheel "$found"
        if try_ops; then
            remember device "$device"
            return
        fi
        note 'They do not run with this torch.'
    done
    check_compiler
    jobs=${MAX_JOBS:-$("$python" -c 'import os
print(len(os.sched_getaffinity(0)))')}
    note "Compiling the ops of mmcv for this torch takes about 15 minutes on"
    note "2 cores ($jobs used here), once. If interrupted, it goes on."
    mkdir -p "$(dirname "$wheels")"
    device=${devices##* }
    [ "$device" = cuda ] || export CUDA_VISIBLE_DEVICES=
    step 'compiling' \
        'If memory ran out, run the same command again with MAX_JOBS=1.' \
        build_ops "$venv/build/$tag-$ops_pin" "$wheels"
    step 'installing what was compiled' "$network" install_ops_wheel "$wheels"
    step "running nms and roi_align on $device" \
        "Remove $venv/build and $wheels and run the same command again." \
        ops_run_on "$device"
    remember device "$device"
}

choose_stack "${E3VA_STACK:-onedl}"

# -- all of it ---------------------------------------------------------------

# prepare_environment GROUP...: sets $python to an interpreter that has torch,
# the frameworks, e3va_mm and the packages of requirements/GROUP.txt.
prepare_environment() {
    local key
    stamps=$venv/.e3va
    logs=$stamps/logs
    requirements=$repository/requirements
    torch=torch==$torch_version
    ops_pin=$(grep "^$ops==" "$requirements/$pins.txt")
    cd "$repository"
    # Each stack has an environment, and so a lock, of its own.
    lock "$requirements/$pins.txt"
    make_venv
    mkdir -p "$logs"
    forget_half_installed

    key=$torch_version-$(checksum "$requirements/$pins.txt")
    if ! done_before ops "$key"; then
        # Whether a compiler will be needed is known before the downloads.
        download_ops || compgen -G "$cache/$ops_pin/*/*.whl" >/dev/null ||
            check_compiler
    fi
    if ! done_before torch "$key"; then
        note 'Where pip offers no CPU build, torch brings CUDA: several GB.'
        step "$torch and build tools" "$network" \
            install setuptools wheel ninja packaging
        remember torch "$key"
    fi
    install_packages "$key" runtime "$frameworks" "$@"
    if ! done_before ops "$key"; then
        install_ops
        remember ops "$key"
    fi
    if [ "$(cat "$stamps/device")" = cpu ]; then
        # A GPU would be of no use to ops that were compiled without it.
        export CUDA_VISIBLE_DEVICES=
    fi
    key=$repository-$(checksum setup.py)
    if ! done_before project "$key"; then
        step 'e3va_mm itself, in place' \
            'This is a defect of setup.py: please report it with the log.' \
            pip install -e . --no-deps --no-build-isolation
        step 'importing torch, mmcv, mmdet, mmseg and e3va_mm' \
            "Remove $venv and run the same command again." \
            "$python" -c 'import e3va_mm.registry, mmcv.ops, mmdet.apis, mmseg.apis'
        remember project "$key"
    fi
    unlock
    note "the environment $venv is complete  [$(elapsed)]"
}
