#!/usr/bin/env bash
# launch/slurm.sbatch on a real Slurm of one machine, started here and stopped again: it is warned of the end of its time, saves,
# queues itself again, and ends with the bits of a run that nothing interrupted.
#
# Takes about 3 minutes on 2 cores; needs root, and what launch/setup.sh --slurm installs (it is SKIPPED without either). The
# packages' own services are not used and may be off. Everything lies in a temporary folder, which is kept after a failure.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

skip() {
    echo "SKIPPED $0: $*"
    exit 77
}

[ "$#" -eq 0 ] || stop "usage: launch/test-slurm.sh"
[ "$(id -u)" -eq 0 ] || skip "Slurm's daemons need root"
PATH=$PATH:/usr/sbin
for needed in munged slurmctld slurmd sbatch srun mpirun; do
    command -v "$needed" >/dev/null || skip "no $needed here; launch/setup.sh --slurm installs it"
done
id munge >/dev/null 2>&1 || skip "no user munge here"

program=${FM_DIST_PROGRAM:-$PWD/target/debug/fm-dist}
room=$(mktemp -d "${TMPDIR:-/tmp}/fm-dist-slurm.XXXXXX")
daemons=()

# Every process that was started for this Slurm has the room in its environment.
survivors() {
    local pid
    for pid in /proc/[0-9]*; do
        pid=${pid#/proc/}
        [ "$pid" -eq $$ ] || ! { tr '\0' '\n' <"/proc/$pid/environ" | grep -xF "FM_DIST_ROOM=$room"; } >/dev/null 2>&1 || echo "$pid"
    done
}

clean_up() {
    local code=$? pid
    trap - EXIT
    # Jobs first: their steps outlive slurmd.
    if [ "${#daemons[@]}" -eq 3 ]; then
        scancel --user=root 2>/dev/null || true
        within 10 no_job_is_left || true
    fi
    for pid in "${daemons[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    for pid in $(survivors); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    if [ "$code" -eq 0 ]; then
        rm -r "$room"
    else
        tail -n 15 "$room"/*.log
        echo "$0: failed; everything is in $room"
    fi
    exit "$code"
}

fail() {
    echo "$0: $*" >&2
    exit 1
}

# Waits until the command succeeds, at most so many seconds.
within() {
    local limit=$1 begin=$SECONDS
    shift
    until "$@"; do
        [ $((SECONDS - begin)) -lt "$limit" ] || return 1
        sleep 0.2
    done
}

no_job_is_left() { [ -z "$(squeue --noheader 2>/dev/null)" ]; }
state_of() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
restarts_of() { scontrol show job "$1" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p'; }
excluded_of() { scontrol show job "$1" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p'; }
is_pending() { [ "$(state_of "$1")" = PENDING ]; }
has_ended() { [[ $(state_of "$1") =~ ^(COMPLETED|CANCELLED|FAILED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY)$ ]]; }
says() { grep -qE -- "$2" "$room/$1.log" 2>/dev/null; }

# One node that is this machine, known to nobody else: sockets, keys, state and spool in the room, ports of its own.
start_slurm() {
    local host port=$((20000 + $$ % 10000))
    host=$(hostname --short)
    chmod 755 "$room"
    mkdir "$room/munge" "$room/state" "$room/spool"
    head -c 128 /dev/urandom >"$room/munge/key"
    chmod 400 "$room/munge/key"
    chown -R munge: "$room/munge"
    cat >"$room/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
# A job that was queued again waits for as long as credentials live.
AuthInfo=socket=$room/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=pmix
SelectType=select/cons_tres
ReturnToService=2
KillWait=5
# By itself it looks for jobs to start every 30 s.
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation=$room/state
SlurmdSpoolDir=$room/spool
SlurmctldPidFile=$room/slurmctld.pid
SlurmdPidFile=$room/slurmd.pid
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$room/slurm.conf FM_DIST_ROOM=$room
    setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --socket="$room/munge/socket" \
        --key-file="$room/munge/key" --pid-file="$room/munge/pid" --seed-file="$room/munge/seed" >"$room/munged.log" 2>&1 &
    daemons=("$!")
    within 10 test -S "$room/munge/socket" || fail "munged does not start"
    slurmctld -D >"$room/slurmctld.log" 2>&1 &
    daemons=("$!" "${daemons[@]}")
    slurmd -D >"$room/slurmd.log" 2>&1 &
    daemons=("$!" "${daemons[@]}")
    within 20 node_is_idle || fail "the node does not become idle"
}

node_is_idle() { [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; }

# Submits the shipped script under a name that is also its output_dir's and its log's; prints the job's number.
submit() {
    local name=$1 sbatch=()
    shift
    while [ "$1" != -- ]; do
        sbatch+=("$1")
        shift
    done
    shift
    sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --time=5 --output="$room/$name.log" \
        "${sbatch[@]}" launch/slurm.sbatch "${tiny[@]}" --set output_dir="$room/$name" "$@"
}

# The bytes of a run's last checkpoint.
checkpoint() { (cd "$room/$1/step-$(printf %08d "$steps")" && sha256sum ./*); }

same_as_unbroken() { [ "$(checkpoint "$1")" = "$(checkpoint unbroken)" ] || fail "the bits of $1 are not those of the unbroken run"; }

unbroken_run() {
    mpi_run 2 "$program" train "${tiny[@]}" --set output_dir="$room/unbroken" >"$room/unbroken.log" 2>&1
}

# A minute is Slurm's shortest limit, and it looks every 30 s who is to be warned: here 5 to 35 s after the start. So the run is
# made to take longer, but only its first start is that short of time. Its name is one that a shell, TOML and JSON would each like to
# read otherwise, and an older run beside it leaves a gap.
requeued_run() {
    local job odd='re"queued it'\''s \d $HOME'
    mpi_run 2 "$program" train "${tiny[@]}" --set output_dir="$room/$odd" --set max_steps=1 >"$room/older.log" 2>&1
    mv "$room/$odd" "$room/$odd-7"
    # One argument is of training alone.
    job=$(submit requeued --time=1 --signal=B:USR1@25 -- --allow-data-change --set output_dir="$room/$odd" --set 'debug.inject_fault="sleep@0:every:optimizer:0.65"')
    within 60 says requeued 'queued again' || fail "job $job is not warned or not queued again"
    scontrol update JobId="$job" TimeLimit=5
    within 110 has_ended "$job" || fail "job $job has not ended: $(state_of "$job")"
    [ "$(state_of "$job")" = COMPLETED ] || fail "job $job ended as $(state_of "$job")"
    [ "$(restarts_of "$job")" -ge 1 ] || fail "job $job was never queued again"
    says requeued 'SIGUSR1 came: the ranks are asked' || fail "the script did not hear of the end of its time"
    says requeued 'code 10 at step [1-9][0-9]*: queued again' || fail "the ranks did not save and stop"
    says requeued 'start 1 at step 1 of ' || fail "the older run was not found"
    says requeued 'start 2 at step [1-9][0-9]* of .*: --resume auto' || fail "the second start did not go on"
    same_as_unbroken "$odd-7"
    grep 'slurm.sbatch ' "$room/requeued.log" | sed 's/^/    /'
}

# The other two ways to start ranks.
run_by() {
    local job
    job=$(FM_DIST_LAUNCHER=$1 submit "$1" --)
    within 60 has_ended "$job" || fail "job $job by $1 has not ended: $(state_of "$job")"
    [ "$(state_of "$job")" = COMPLETED ] || fail "job $job by $1 ended as $(state_of "$job")"
    same_as_unbroken "$1"
}

# Without a PMI every task would be rank 0 of 1 and train alone.
a7_srun_without_a_pmi() {
    local code=0
    srun --ntasks=2 --mpi=none "$program" train "${tiny[@]}" --set output_dir="$room/alone" >"$room/alone.log" 2>&1 || code=$?
    [ "$code" -eq 52 ] || fail "srun --mpi=none returned $code, expected 52"
    [ ! -e "$room/alone" ] || fail "srun --mpi=none left a run folder"
}

# One task has nobody to find, with a PMI or without.
one_task_runs_alone() {
    local mpi
    for mpi in none pmix; do
        srun --ntasks=1 --mpi="$mpi" "$program" train "${tiny[@]}" --set max_steps=1 --set output_dir="$room/one-$mpi" \
            >"$room/one-$mpi.log" 2>&1 || fail "srun --ntasks=1 --mpi=$mpi returned $?, expected 0"
    done
    [ "$(sha256sum <"$room/one-none/step-00000001/manifest.json")" = "$(sha256sum <"$room/one-pmix/step-00000001/manifest.json")" ] ||
        fail "one task has other bits without a PMI"
}

# Rank 0 stands still before the first checkpoint, and no watchdog ends it.
launcher_that_never_returns() {
    local job
    job=$(FM_DIST_MAX_SILENCE=5 FM_DIST_MAX_IDLE_STARTS=1 submit hung -- --set 'debug.inject_fault="stop@0:5:forward"')
    within 60 has_ended "$job" || fail "job $job still hangs"
    says hung 'no sign of life for [0-9]+ s: srun is ended' || fail "the guard did not speak"
    says hung '1 starts in a row ended at step 0, the last with code 21: not queued again, code 43' || fail "no verdict"
    [ "$(restarts_of "$job")" -eq 0 ] || fail "job $job was queued again without a newer checkpoint"
}

# srun returns the highest code of all ranks, and those that it killed count 128 and more: the failure's file knows better.
first_failure_counts() {
    local job
    job=$(submit panic -- --set 'debug.inject_fault="panic@1:5:forward"')
    within 60 has_ended "$job" || fail "job $job does not end"
    says panic 'the first failure, .*/failure-1.json, says 70, which counts' || fail "the failure's file was not read"
    says panic 'the next start would end the same way: not queued again, code 70' || fail "no verdict"
    [ "$(restarts_of "$job")" -eq 0 ] || fail "job $job was queued again after a panic"
}

# A job on one node whose device failed waits for another one; it starts again once its node may be used.
failed_device_excludes_its_node() {
    local job
    job=$(submit device -- --set 'debug.inject_fault="device@1:5:backward:1"')
    within 60 says device 'code 23 at step 0: queued again' || fail "job $job is not queued again after code 23"
    within 20 says device 'a device failed on node [^ ]*: the next start leaves out [^ ]*$' || fail "no node was excluded"
    within 20 is_pending "$job" || fail "job $job is $(state_of "$job") where its only node is excluded"
    [ "$(excluded_of "$job")" = "$(hostname --short)" ] || fail "job $job excludes $(excluded_of "$job"), expected its node"
    sleep 8
    is_pending "$job" || fail "job $job started again on the node that was excluded"
    scontrol update JobId="$job" ExcNodeList=
    within 60 says device 'start 2 at step 0' || fail "job $job does not start on a node that may be used"
    scancel "$job"
    within 30 has_ended "$job" || fail "job $job does not end"
}

# More of the same memory would not help.
memory_that_runs_out_is_not_tried_again() {
    local job
    job=$(submit memory -- --set 'debug.inject_fault="out_of_memory@1:5:forward:1"')
    within 60 has_ended "$job" || fail "job $job does not end"
    says memory 'the first failure, .*/failure-1.json, says 53, which counts' || fail "the failure's file was not read"
    says memory 'the next start would end the same way: not queued again, code 53' || fail "no verdict"
    [ "$(restarts_of "$job")" -eq 0 ] || fail "job $job was queued again after memory ran out"
    [ "$(excluded_of "$job")" = '(null)' ] || fail "job $job excludes $(excluded_of "$job") after memory ran out"
}

# The same rank dies at the same step of every start.
c17_crash_loop() {
    local job
    job=$(submit crash -- --set 'debug.inject_fault="kill@1:5:forward"')
    within 90 has_ended "$job" || fail "job $job does not end"
    says crash '3 starts in a row ended at step 0, the last with code [0-9]*: not queued again, code 43' || fail "no verdict"
    [ "$(restarts_of "$job")" -eq 2 ] || fail "job $job was queued again $(restarts_of "$job") times, expected 2"
}

# Slurm would queue a cancelled job again if it were asked to.
cancelled_run() {
    local job
    job=$(submit cancelled -- --set checkpoint.every_n_steps=5 --set 'debug.inject_fault="sleep@0:every:optimizer:0.65"')
    within 60 test -e "$room/cancelled/step-00000005" || fail "job $job does not train"
    scancel "$job"
    within 30 has_ended "$job" || fail "job $job does not end"
    within 10 says cancelled 'the job was cancelled at step [1-9][0-9]*: not queued again' || fail "no verdict"
    [ "$(state_of "$job")" = CANCELLED ] || fail "job $job is $(state_of "$job") after scancel"
}

steps=60
tiny=(--set model.dit.width=32 --set model.dit.depth=2 --set data.micro_batch_size_per_gpu=8 --set train.global_batch_size=32
    --set sampling.num_steps=2 --set 'log.progress="never"' --set max_steps="$steps")
[ -n "${FM_DIST_PROGRAM:-}" ] || timed "build" cargo build
export FM_DIST_PROGRAM=$program FM_DIST_CONFIG=configs/digits.toml OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

timed "a Slurm on this machine" start_slurm
timed "a run that nothing interrupts" unbroken_run
timed "srun without a PMI ends with 52 (A7)" a7_srun_without_a_pmi
timed "one task of a step runs alone" one_task_runs_alone
timed "ranks started by mpirun" run_by mpirun
timed "ranks started by srun without MPI" run_by tcp
timed "a launcher that never returns is ended" launcher_that_never_returns
timed "the first failure counts, not what the launcher makes of it" first_failure_counts
timed "a device that failed excludes its node (code 23)" failed_device_excludes_its_node
timed "memory that ran out is not tried again (code 53)" memory_that_runs_out_is_not_tried_again
timed "three starts without a newer checkpoint are the last (C17)" c17_crash_loop
timed "a cancelled job stays cancelled" cancelled_run
timed "a job whose time is over saves, queues itself again and ends bit-equal" requeued_run
