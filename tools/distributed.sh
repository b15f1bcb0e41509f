# What dist_train.sh, dist_test.sh, slurm_train.sh and slurm_test.sh share; to
# be sourced where $usage is set.
#
# Read from the caller's environment:
#   PYTHON         the interpreter; default python
# by dist_*.sh, whose GPUS are those of one machine:
#   NNODES         machines; default 1. The same command runs on each
#   NODE_RANK      which of them this one is, from 0
#   MASTER_ADDR    where machine 0 is found
#   PORT           a free port of it; default 29500, on one machine any
# by slurm_*.sh:
#   GPUS           processes in all; default 8
#   GPUS_PER_NODE  default 8, or GPUS if these are fewer; 0 to train on CPUs
#   CPUS_PER_TASK  cores of a process; default 5
#   SRUN_ARGS      more options of srun, separated by spaces
#   PORT           a free port of the first machine; default any

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

# fail WHAT: the end of a call that cannot work, in one line.
fail() {
    printf 'error: %s Usage: %s\n' "$1" "$usage" >&2
    exit 2
}

# number NAME VALUE LEAST
number() {
    # Leading zeros would be octal to bash.
    [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] && (($2 >= $3)) ||
        fail "$1 should be a whole number of at least $3, but got '$2'."
}

# launch GPUS TOOL ARGUMENT...: so many processes of tools/TOOL.py here.
launch() {
    local rendezvous
    number GPUS "$1" 1
    if [ "${NNODES:-1}" != 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ] ||
            fail "NNODES=$NNODES needs MASTER_ADDR and NODE_RANK beside it."
        rendezvous=(--nnodes "$NNODES" --node_rank "$NODE_RANK"
            --master_addr "$MASTER_ADDR" --master_port "${PORT:-29500}")
    elif [ -n "${PORT:-}" ]; then
        rendezvous=(--master_addr "${MASTER_ADDR:-127.0.0.1}"
            --master_port "$PORT")
    else
        # The name of a machine need not lead to it; this address does.
        rendezvous=(--standalone --local_addr 127.0.0.1)
    fi
    # In the background a signal reaches torchrun once, from us, and torchrun
    # ends its processes.
    trap 'kill -TERM "$child"; wait "$child" || true; exit 130' INT TERM HUP
    "$python" -m torch.distributed.run "${rendezvous[@]}" \
        --nproc_per_node "$1" "$tools/$2.py" --launcher pytorch "${@:3}" &
    child=$!
    wait "$child" && return
    printf 'error: a process of %s.py failed or was killed, and the others were
ended. The first error above says why, and Root Cause which rank; after
Signal 9 alone, memory may have run out.' "$2" >&2
    [ "$2" = test ] || printf ' To resume, rerun the command with --resume.' >&2
    printf '\n' >&2
    exit 1
}

# submit PARTITION JOB_NAME TOOL ARGUMENT...: processes of tools/TOOL.py.
submit() {
    local gpus=${GPUS:-8} each placement=()
    number GPUS "$gpus" 1
    each=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    number GPUS_PER_NODE "$each" 0
    ((each == 0)) ||
        placement=(--gres="gpu:$each" --ntasks-per-node="$each")
    # Two jobs may share a machine. What is free there is not known here.
    export MASTER_PORT=${PORT:-$((10000 + RANDOM % 20000))}
    # SRUN_ARGS is to be split.
    exec srun -p "$1" --job-name="$2" "${placement[@]}" --ntasks="$gpus" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} "$python" -u "$tools/$3.py" --launcher slurm "${@:4}"
}
