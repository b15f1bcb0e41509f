# The environment of tools/quickstart.sh and tools/run_tests.sh; to be sourced.
# Finished steps are remembered, so that a rerun resumes. It reads
#   PYTHON      the interpreter to start from (3.10 to 3.13)
#   E3VA_VENV   the folder of the environment; default .venv
#   E3VA_TORCH  the version of torch; default 2.13.0
#   E3VA_CACHE  the folder of compiled operators; default ~/.cache/e3va_mm
#   MAX_JOBS    compilers that run at once; default one for each core

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${E3VA_VENV:-$repository/.venv}
python=$venv/bin/python
stamps=$venv/.e3va
logs=$stamps/logs
torch=torch==${E3VA_TORCH:-2.13.0}
pins=$repository/requirements/tested.txt
ops=$(grep '^onedl-mmcv==' "$pins")
cache=${E3VA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/e3va_mm}/$ops
network='Check the network and the settings of pip (pip config list), then rerun the command.'

unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
trap 'printf "\nInterrupted. Rerun the command to resume.\n" >&2; exit 130' INT TERM HUP

elapsed() { printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)); }
heading() { printf '\n== %s  [%s]\n' "$1" "$(elapsed)"; }
note() { printf '   %s\n' "$1"; }

fail() {
    printf '\nFAILED  %s\n' "$1" >&2
    printf 'TO DO   %s\n' "${@:2}" >&2
    exit 1
}

# step TITLE TO_DO COMMAND...: a quiet command that must succeed.
step() {
    local log=$logs/${1//[^A-Za-z0-9]/_}.log
    mkdir -p "$logs"
    note "$1"
    "${@:3}" >"$log" 2>&1 </dev/null && return
    tail -n 15 "$log" >&2
    fail "$1" "$2" "The command was: ${*:3}" "Its whole output: $log"
}

# The stamps of finished steps.
done_before() { [ "$(cat "$stamps/$1" 2>/dev/null)" = "$2" ]; }
remember() { mkdir -p "$stamps" && printf '%s' "$2" >"$stamps/$1"; }
checksum() { cat -- "$@" | cksum | tr -d ' '; }
# once NAME KEY TITLE TO_DO COMMAND...: a step that is not done again.
once() {
    done_before "$1" "$2" && return
    step "${@:3}"
    remember "$1" "$2"
}

# lock FILE: wait for another run, or for commands that a killed one left.
lock() {
    exec 9<"$1"
    ! command -v flock >/dev/null || flock -n 9 ||
        { note 'Waiting for another run to end ...' && flock 9; }
}

supported() {
    "$1" -c 'import ensurepip, sys, venv
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

make_venv() {
    local base
    [ ! -e "$stamps/venv" ] || ! supported "$python" || return 0
    [ ! -e "$venv" ] || [ -d "$stamps" ] || fail \
        "$venv exists and was not made here." \
        'Move it away, or set E3VA_VENV to another folder.'
    for base in ${PYTHON:-python3.11 python3.12 python3.13 python3.10 python3}; do
        ! supported "$base" || break
    done
    supported "$base" || fail \
        "No Python 3.10 to 3.13 with venv and ensurepip: ${PYTHON:-on the PATH}." \
        'Debian and Ubuntu: apt-get install python3 python3-venv python3-dev' \
        'Or name one: PYTHON=/path/to/python3.11 before the command.'
    rm -rf -- "$venv"
    once venv "$base" "a new environment from $base" \
        'Set PYTHON to another interpreter and rerun the command.' \
        "$base" -m venv "$venv"
}

pip() { "$python" -m pip "$@"; }
# The torch that is installed must stay, and so must what was tested.
install() { pip install -c "$pins" "$torch" "$@"; }

# The operators of mmcv must fit torch: they have a step of their own. Of the
# two OpenCV that come, that which needs a display is on top.
install_frameworks() {
    grep -v '^onedl-mmcv' requirements/mminstall.txt >"$stamps/mminstall.txt"
    install setuptools wheel ninja packaging -r "$stamps/mminstall.txt" &&
        install --force-reinstall --no-deps opencv-python-headless
}

use_ops() {
    compgen -G "$1/*.whl" && pip install --no-deps --force-reinstall "$1"/*.whl &&
        "$python" -c 'if True:
            import torch
            from mmcv.ops import nms
            box = torch.ones(1, 4).to("cuda" if torch.cuda.is_available() else "cpu")
            nms(box, box[:, 0], 0.5)'
}

# From a wheel that was compiled before, else one that pip finds, else source.
install_ops() {
    local compiled=$cache/$("$python" -c 'import sys, torch
print(sys.implementation.cache_tag, torch.__version__, sep="-")')
    rm -rf "$stamps/device" "$stamps/wheels"
    pip download --no-deps --only-binary :all: -d "$stamps/wheels" "$ops"
    ! use_ops "$compiled" && ! use_ops "$stamps/wheels" || return 0
    if "$python" -c 'from torch.utils.cpp_extension import CUDA_HOME
raise SystemExit(CUDA_HOME is not None)'; then
        # Without nvcc nothing can be compiled for a GPU: do without it.
        export CUDA_VISIBLE_DEVICES=
        remember device cpu
        ! use_ops "$compiled" && ! use_ops "$stamps/wheels" || return 0
    fi
    # Without debug symbols compilers need less memory.
    CFLAGS="${CFLAGS:-} -g0" MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        pip wheel -v -w "$compiled" --no-binary onedl-mmcv --no-cache-dir \
        --no-deps --no-build-isolation "$ops" && use_ops "$compiled"
}

# prepare_environment GROUP...: sets $python to an interpreter that has torch,
# the frameworks, e3va_mm and the packages of requirements/GROUP.txt.
prepare_environment() {
    local key group
    cd "$repository"
    lock "$pins"
    make_venv
    key=$torch-$(checksum "$pins" requirements/mminstall.txt)
    once frameworks "$key" "the frameworks and $torch: several GB, unless pip \
finds a CPU build" "$network" install_frameworks
    for group in runtime "$@"; do
        once "$group" "$key-$(checksum "requirements/$group.txt")" \
            "packages of requirements/$group.txt" "$network" \
            install -r "requirements/$group.txt"
    done
    once ops "$key" 'operators of mmcv; compiled if pip finds no wheel, which '"\
takes about 15 minutes on 2 cores" "Compiling needs g++ and the headers of \
Python: apt-get install g++ python3-dev. If memory ran out, set MAX_JOBS=1." \
        install_ops
    # A GPU is of no use to operators that were compiled without it.
    ! done_before device cpu || export CUDA_VISIBLE_DEVICES=
    once project "$repository-$(checksum setup.py)" 'e3va_mm itself, in place' \
        "Remove $venv and rerun the command." \
        pip install -e . --no-deps --no-build-isolation
    exec 9<&-
    note "the environment $venv is complete  [$(elapsed)]"
}
