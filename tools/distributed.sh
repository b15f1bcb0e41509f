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
#   SRUN_ARGS      more options of srun, parted by spaces
#   PORT           a free port of the first machine; default any

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
child=

# fail WHAT: the end of a call that cannot work, in one line.
fail() {
    printf 'error: %s Usage: %s\n' "$1" "$usage" >&2
    exit 2
}

note() { printf '%s\n' "$1" >&2; }

# number NAME VALUE LEAST
number() {
    # Leading zeros would be octal to bash.
    [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] && (($2 >= $3)) ||
        fail "$1 should be a whole number of at least $3, but got '$2'."
}

# file WHAT PATH: a checkpoint may be a URL.
file() {
    [ -f "$2" ] || [[ $2 == *://* ]] || fail "$1 should be a file, but got '$2'."
}

count_gpus() {
    "$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null ||
        fail "$python cannot import torch; set PYTHON to one that can."
}

port_is_free() {
    "$python" -c 'import socket, sys
socket.create_server(("", int(sys.argv[1])))' "$1" 2>/dev/null
}

# meeting_point: sets $rendezvous to the options by which processes meet.
meeting_point() {
    local nodes=${NNODES:-1} port=${PORT:-29500}
    number NNODES "$nodes" 1
    number PORT "$port" 1
    if ((nodes > 1)); then
        [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ] ||
            fail "NNODES=$nodes needs MASTER_ADDR and NODE_RANK beside it."
        number NODE_RANK "$NODE_RANK" 0
        ((NODE_RANK < nodes)) ||
            fail "NODE_RANK should be below NNODES=$nodes, but got $NODE_RANK."
        ((NODE_RANK > 0)) || port_is_free "$port" ||
            fail "PORT=$port is taken here; set the same free one everywhere."
        rendezvous=(--nnodes "$nodes" --node_rank "$NODE_RANK"
            --master_addr "$MASTER_ADDR" --master_port "$port")
    elif [ -n "${PORT:-}" ] && port_is_free "$port"; then
        rendezvous=(--master_addr "${MASTER_ADDR:-127.0.0.1}"
            --master_port "$port")
    else
        [ -z "${PORT:-}" ] || note "PORT=$port is taken; a free one is used."
        # The name of a machine need not lead to it; this address does.
        rendezvous=(--standalone --local_addr 127.0.0.1)
    fi
}

# torchrun ends the processes that it has started.
interrupted() {
    kill -TERM "$child" 2>/dev/null || true
    wait "$child" || true
    note "error: interrupted.$resume"
    exit 130
}

# launch GPUS TOOL ARGUMENT...: so many processes of tools/TOOL.py.
launch() {
    local gpus=$1 tool=$2 there status=0 rendezvous resume=
    shift 2
    number GPUS "$gpus" 1
    there=$(count_gpus)
    ((there == 0 || gpus <= there)) ||
        fail "GPUS should be at most the $there here, but got $gpus."
    meeting_point
    ((there > 0)) || note "No GPU here: $gpus processes on CPUs, with gloo."
    [ "$tool" = test ] ||
        resume=' The same command with --resume goes on from the last checkpoint.'

    trap interrupted INT TERM HUP
    # In a process group of its own: a signal reaches it once, through us.
    set -m
    "$python" -m torch.distributed.run "${rendezvous[@]}" \
        --nproc_per_node "$gpus" "$tools/$tool.py" --launcher pytorch "$@" \
        </dev/null &
    child=$!
    set +m
    wait "$child" || status=$?
    ((status == 0)) || note "error: a process of $tool.py failed or was\
 killed, and the others were ended. The first error above says why, and Root\
 Cause which rank; after Signal 9 alone, memory may have run out.$resume"
    exit "$status"
}

# submit PARTITION JOB_NAME TOOL ARGUMENT...: processes of tools/TOOL.py.
submit() {
    local gpus=${GPUS:-8} cpus=${CPUS_PER_TASK:-5} each placement=()
    number GPUS "$gpus" 1
    each=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    number GPUS_PER_NODE "$each" 0
    number CPUS_PER_TASK "$cpus" 1
    command -v srun >/dev/null ||
        fail 'srun was not found: this machine submits no jobs to slurm.'
    ((each == 0)) ||
        placement=(--gres="gpu:$each" --ntasks-per-node="$each")
    # Two jobs may share a machine. What is free there is not known here.
    export MASTER_PORT=${PORT:-$((10000 + RANDOM % 20000))}
    number PORT "$MASTER_PORT" 1
    # SRUN_ARGS is to be split.
    exec srun -p "$1" --job-name="$2" "${placement[@]}" --ntasks="$gpus" \
        --cpus-per-task="$cpus" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "$python" -u "$tools/$3.py" --launcher slurm "${@:4}"
}
