#!/usr/bin/env bash
# The long part of the tests: faults by chance, every phase, rank and kind, cut power, slow links, leaks, fuzzing. Prints a table.
#
#   launch/soak.sh HOURS [CASE…]     e.g. 8; 0.05 runs each case at its smallest, in about ten minutes on 2 cores
#
# Everything random follows from a seed that is printed; FM_DIST_SOAK_SEED=… repeats it. FM_DIST_PROGRAM=… tests that program
# instead of target/debug/fm-dist. Needs what launch/setup.sh needs; cut power and slow links also need root (SKIPPED without).
# What failed is kept in the folder that is printed.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

cases=(
    case_c1_c2_c5_every_phase_rank_and_kind
    case_c3_c4_c9_c10_d4_chaos
    case_d1_a_part_cut_at_every_64_kibibytes
    case_d2_power_cut
    case_d12_bits_of_1_and_4_ranks
    case_b3_b5_fuzz
    case_c15_slow_link
    case_leaks
)

hours=${1:-}
[[ $hours =~ ^[0-9]+([.][0-9]+)?$ ]] || stop "usage: launch/soak.sh HOURS [CASE…], HOURS being a number such as 8 or 0.05; the cases are ${cases[*]}"
shift
[ "$#" -eq 0 ] || cases=("$@")

seed=${FM_DIST_SOAK_SEED:-$((RANDOM * 32768 + RANDOM))}
program=${FM_DIST_PROGRAM:-$PWD/target/debug/fm-dist}
room=$(mktemp -d "${TMPDIR:-/tmp}/fm-dist-soak.XXXXXX")
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1

# Four blocks of four samples suit 1, 2 and 4 ranks; draws follow the sample, sums a fixed order, so that all give the same bits.
tiny=(--set model.dit.width=32 --set model.dit.depth=2 --set data.micro_batch_size_per_gpu=4 --set train.global_batch_size=16
    --set parallel.deterministic=true --set parallel.seed_scope=sample --set sampling.num_steps=2 --set sampling.per_condition=1
    --set 'log.progress="never"')
# Long enough for a debug build with 4 ranks on 2 busy cores, short enough to wait for.
limits=(--set watchdog.init_seconds=30 --set watchdog.first_step_seconds=20 --set watchdog.step_seconds=8
    --set watchdog.save_seconds=8 --set watchdog.report_seconds=30 --set watchdog.finalize_seconds=8)

# What a case counts: launches, what went wrong, the longest launch in milliseconds. Files, because some cases are subshells.
count() { echo "$2" >>"$room/$case/$1"; }
wrong() {
    echo "    FAILED $case: $*"
    count failures "$*"
}

now() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }

# NUMBER an hour of soaking, at least LEAST and at most MOST.
scaled() {
    awk -v hours="$hours" -v number="$1" -v least="$2" -v most="$3" \
        'BEGIN { count = int(hours * number); print (count < least ? least : (count > most ? most : count)) }'
}

one_of() {
    local choices=("$@")
    echo "${choices[RANDOM % $#]}"
}

# Runs to its end, at most LIMIT seconds; standard output and error go to $log, the exit code to $code. No RANKS: without mpirun.
launch() {
    local limit=$1 ranks=$2 begin mpirun=()
    shift 2
    log=$room/$case/$(wc -l <"$room/$case/launches").log
    begin=$(now)
    code=0
    [ "$ranks" -eq 0 ] || mpirun=(mpirun --oversubscribe -n "$ranks")
    # timeout ends mpirun alone; ranks do not outlive it.
    timeout -s KILL "$limit" "${mpirun[@]}" "$program" train "${tiny[@]}" "$@" >"$log" 2>&1 </dev/null || code=$?
    count launches "$(($(now) - begin))"
    all_gone "${@: -1}" || wrong "processes outlive $log"
}

# Whether no process with these words among its own is left; the last moments of some are waited for.
all_gone() {
    local deadline=$((SECONDS + 10))
    while grep -qsaF "$1" /proc/[0-9]*/cmdline; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

# The last launch must have ended with this code.
expect() { [ "$code" -eq "$1" ] || wrong "exit code $code instead of $1: $log"; }

# Bytes of a checkpoint as one line.
bytes_of() { (cd "$1" && sha256sum ./* | sha256sum); }
same_bytes() { [ "$(bytes_of "$1")" = "$(bytes_of "$2")" ] || wrong "$1 and $2 differ"; }

checkpoints() { find "$1" -maxdepth 1 -name 'step-*' ! -name '*.*' 2>/dev/null | sort; }

# Goes on from the newest checkpoint, or begins where there is none; never beside what is there.
go_on() {
    local limit=$1 ranks=$2 run=$3 resume=never
    shift 3
    if [ -n "$(checkpoints "$run")" ]; then resume=$run; else rm -rf "$run"; fi
    launch "$limit" "$ranks" --resume "$resume" "$@" --set output_dir="$run"
}

# One line each: phase, steps at which it is entered, ranks. A launch has no watchdog before its world has met, and only a step with
# a number that is none is diagnosed; those are tests/faults's.
phases() {
    cat <<'PHASES'
bootstrap 0 0123
open 0 0123
read 5-7 0123
data 6 0123
forward 6 0123
backward 6 0123
reduce 6 0123
optimizer 6 0123
compare 8 0123
snapshot 8 0123
write 8 0123
sync 8 0
commit 8 0
prune 12 0
report 12 0123
finalize 12 0123
PHASES
}

# A rank is killed, crashes or stops in some phase; the run ends in time and goes on to the bits of one that nothing befell.
case_c1_c2_c5_every_phase_rank_and_kind() {
    local phase steps ranks rank kind order want sets=(--set max_steps=12 --set checkpoint.every_n_steps=4)
    go_on 120 4 "$room/$case/unbroken" "${sets[@]}"
    expect 0
    phases | while read -r phase steps ranks; do
        for ((rank = 0; rank < ${#ranks}; rank++)); do
            for kind in kill segv stop; do echo "$kind@$rank:$steps:$phase"; done
        done
    done | shuf --random-source=<(yes "$seed") | head -n "$(scaled 120 6 1000)" >"$room/$case/orders"
    while read -r order; do
        case $order in kill*) want=137 ;; segv*) want=139 ;; stop@*:0:*) want=22 ;; *) want=21 ;; esac
        rm -rf "$room/$case/run"
        go_on 90 4 "$room/$case/run" "${sets[@]}" "${limits[@]}" --set debug.inject_fault="$order"
        grep -qF "fault $order strikes" "$log" || wrong "$order never struck: $log"
        expect "$want"
        go_on 90 4 "$room/$case/run" "${sets[@]}"
        expect 0
        same_bytes "$room/$case/run/step-00000012" "$room/$case/unbroken/step-00000012"
    done <"$room/$case/orders"
}

# About every twenty steps some rank fails in some way; lost are at most the steps of two saves, one that is on its way and one that
# was about to begin.
case_c3_c4_c9_c10_d4_chaos() {
    local steps every=10 step=0 starts=0 lost=0 worst=0 order at back struck run=$room/$case/run
    steps=$(scaled 3000 60 1000000)
    local sets=(--set max_steps="$steps" --set checkpoint.every_n_steps="$every")
    go_on 36000 4 "$room/$case/unbroken" "${sets[@]}"
    expect 0
    while [ "$step" -lt "$steps" ]; do
        at=$((step + 1 + RANDOM % 40))
        order=$(chaos "$at" "$every")
        go_on 300 4 "$run" "${sets[@]}" "${limits[@]}" --set debug.inject_fault="$order"
        starts=$((starts + 1))
        [ "$code" -ne 0 ] || break
        struck=$(sed -n 's/^fm-dist: fault .* strikes at step \([0-9]*\)$/\1/p' "$log" | head -n 1)
        [ -n "$struck" ] || wrong "$order never struck and the code is $code: $log"
        case $code in 3 | 10 | 20 | 21 | 22 | 30 | 52 | 70 | 134 | 137 | 139) ;; *) wrong "$order ends with code $code: $log" ;; esac
        back=$(checkpoints "$run" | tail -n 1 | sed 's/.*step-0*//')
        back=${back:-0}
        # A rank that was asked to stop saves the step that it is in.
        at=$((${struck:-0} > back ? ${struck:-0} - back : 0))
        lost=$((lost + at))
        worst=$((at > worst ? at : worst))
        step=$back
        echo "    $order: code $code, on from step $step"
    done
    expect 0
    same_bytes "$run/step-$(printf %08d "$steps")" "$room/$case/unbroken/step-$(printf %08d "$steps")"
    [ "$worst" -le $((2 * every)) ] || wrong "$worst steps were lost at once, saves are $every apart"
    echo "    $starts starts for $steps steps; $lost steps were lost, at most $worst at once"
}

# A fault near step AT; those of a save in a step that saves.
chaos() {
    local at=$1 save=$((($1 + $2 - 1) / $2 * $2)) rank=$((RANDOM % 4))
    case $((RANDOM % 4)) in
    0) echo "$(one_of enospc eio edquot erofs)@0:$save:$(one_of write sync commit)" ;;
    1) echo "$(one_of kill segv panic stop)@$rank:$save:$(one_of compare snapshot write)" ;;
    2) echo "$(one_of error usr1 term)@$rank:$at:forward" ;;
    *) echo "$(one_of kill segv abort stop spin panic exit)@$rank:$at:$(one_of data forward backward reduce optimizer)" ;;
    esac
}

# The largest part of a checkpoint may grow up to each multiple of 64 KiB and not a byte further; the save fails, what it leaves is in
# nobody's way. (A process that is killed in a write leaves the same bytes behind.)
case_d1_a_part_cut_at_every_64_kibibytes() {
    local largest kib offsets run=$room/$case/run
    local sets=(--set model.dit.width=64 --set max_steps=4 --set checkpoint.every_n_steps=2)
    go_on 120 0 "$room/$case/unbroken" "${sets[@]}"
    expect 0
    go_on 120 0 "$room/$case/begun" "${sets[@]}" --set debug.inject_fault=usr1@0:2:backward
    expect 10
    largest=$(find "$room/$case/unbroken/step-00000004" -name '*.safetensors' -printf '%k\n' | sort -n | tail -n 1)
    offsets=$(seq 64 64 "$largest" | shuf --random-source=<(yes "$seed") | head -n "$(scaled 200 3 1000)")
    [ -n "$offsets" ] || wrong "no part is larger than 64 KiB"
    for kib in $offsets; do
        rm -rf "$run"
        cp -r "$room/$case/begun" "$run"
        # Without mpirun, which has large files of its own.
        ulimit -S -f "$kib"
        go_on 60 0 "$run" "${sets[@]}"
        ulimit -S -f unlimited
        expect 30
        grep -q 'File too large' "$log" || wrong "nothing was cut at $kib KiB: $log"
        [ "$(checkpoints "$run")" = "$run/step-00000002" ] || wrong "a save that was cut at $kib KiB left $(checkpoints "$run")"
        go_on 60 0 "$run" "${sets[@]}"
        expect 0
        same_bytes "$run/step-00000004" "$room/$case/unbroken/step-00000004"
    done
}

skip() {
    echo "    SKIPPED $case: $*"
    count skipped "$*"
}

# Power is cut at random moments of a run that saves every other step.
#
# The disk is an image behind a loop device with a file system of its own. What that file system has not yet sent to the device
# is in its page cache only, and what was sent is in the image's, where a copy of the image finds it whether or not the host
# brought it further. So a copy, taken while the ranks stand still and without unmounting or syncing anything, is the disk
# as a power cut leaves it: the file system's unsent writes, its unwritten journal and its delayed allocations are lost. Two
# things stay outside: a disk that lies about flushes or reorders what it was sent (dm-log-writes would show that), and half a
# sector. The kernel's own threads write on while ranks stand still, so a copy counts only if the image is the same after it.
# Each round proves that the cut cuts: a file that was written and not synced must not outlive it.
case_d2_power_cut() {
    [ "$(id -u)" -eq 0 ] || { skip "mounting a file system needs root"; return; }
    local needed round rounds image=$room/$case/disk.img disk=$room/$case/disk copy=$room/$case/after
    for needed in mkfs.ext4 losetup mount; do
        command -v "$needed" >/dev/null || { skip "no $needed here (e2fsprogs, util-linux, mount)"; return; }
    done
    truncate -s 256M "$image" && mkfs.ext4 -q -F "$image" && mkdir "$disk" "$copy"
    mount -o loop "$image" "$disk" || { skip "this machine lets nobody mount a loop device"; return; }
    mounted+=("$disk" "$copy")
    rounds=$(scaled 60 2 10000)
    # In a process group of its own, so that all of it can stand still at once.
    log=$room/$case/writer.log
    setsid mpirun --oversubscribe -n 2 "$program" train "${tiny[@]}" --set max_steps=1000000 --set checkpoint.every_n_steps=2 \
        --set checkpoint.keep_last=3 --set output_dir="$disk/run" >"$log" 2>&1 </dev/null &
    writer=$!
    count launches 0
    await_first_save "$log" || { wrong "the first checkpoint was never reported: $log"; end_writer; return; }
    for ((round = 1; round <= rounds; round++)); do
        sleep "0.$((RANDOM % 9 + 1))"
        power_cut "$round"
    done
    end_writer
    unmount "$disk"
}

# The last moments of a process may hold a file.
unmount() {
    local deadline=$((SECONDS + 10))
    until umount "$1" 2>/dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || { wrong "$1 stays busy"; umount -l "$1"; return; }
        sleep 0.1
    done
}

await_first_save() {
    local deadline=$((SECONDS + 60))
    until grep -q 'saved .*step-00000002' "$1"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

# mpirun gives each rank a group of its own: all descendants are signalled, one by one.
descendants() {
    local child
    for child in $(pgrep -P "$1"); do
        echo "$child"
        descendants "$child"
    done
}

end_writer() {
    local all
    [ -n "${writer:-}" ] || return 0
    all="$writer $(descendants "$writer")"
    # shellcheck disable=SC2086
    kill -KILL $all 2>/dev/null || true
    # shellcheck disable=SC2086
    kill -CONT $all 2>/dev/null || true
    wait "$writer" 2>/dev/null || true
    writer=
    all_gone "$room/$case/" || wrong "processes outlive $log"
}

power_cut() {
    local round=$1 said step found begin
    # shellcheck disable=SC2046
    kill -STOP $(descendants "$writer")
    said=$(grep -o 'saved .*step-0*[0-9]*' "$log" | tail -n 1 | sed 's/.*step-0*//')
    echo "not synced" >"$disk/witness-$round"
    until cp --sparse=always "$image" "$room/$case/cut.img" && cmp -s "$image" "$room/$case/cut.img"; do :; done
    # shellcheck disable=SC2046
    kill -CONT $(descendants "$writer")
    begin=$(now)
    mount -o loop "$room/$case/cut.img" "$copy" || { wrong "the file system does not mount after cut $round"; return; }
    [ ! -s "$copy/witness-$round" ] || wrong "cut $round cut nothing: a file that was never synced is there"
    found=0
    for step in $(checkpoints "$copy/run"); do
        # Alone in a run of its own, so that no older one stands in for it.
        rm -rf "$room/$case/alone"
        mkdir "$room/$case/alone"
        cp -r "$copy/run/config.toml" "$step" "$room/$case/alone"
        found=$((10#${step##*step-}))
        launch 60 0 --resume "$room/$case/alone" --set max_steps=$((found + 1)) --set output_dir="$room/$case/alone"
        expect 0
        grep -q "resumed from .*${step##*/}" "$log" || wrong "$step was not resumed after cut $round: $log"
    done
    log=$room/$case/writer.log
    [ "$found" -ge "$said" ] || wrong "step $said was said to be saved before cut $round, the newest after it is $found"
    echo "    cut $round: step $said was said to be saved, $(checkpoints "$copy/run" | wc -l) checkpoints up to step $found are there"
    unmount "$copy"
    count launches "$(($(now) - begin))"
}

# One rank and four, step by step the same bits.
case_d12_bits_of_1_and_4_ranks() {
    local steps every ranks step
    steps=$(scaled 10000 100 10000)
    every=$((steps / 10))
    for ranks in 1 4; do
        go_on 36000 "$ranks" "$room/$case/$ranks" --set max_steps="$steps" --set checkpoint.every_n_steps="$every" --set checkpoint.keep_last=100
        expect 0
    done
    [ "$(checkpoints "$room/$case/1" | wc -l)" -ge 10 ] || wrong "there is too little to compare"
    for step in $(checkpoints "$room/$case/1"); do same_bytes "$step" "$room/$case/4/${step##*/}"; done
}

case_b3_b5_fuzz() {
    local begin
    begin=$(now)
    log=$room/$case/fuzz.log
    # All readers together: in eight hours, those of safetensors, of pickles and of each other format have ten minutes apiece.
    FM_DIST_FUZZ_SEED=$seed FM_DIST_FUZZ_SECONDS=$(scaled 900 14 9000) cargo test --quiet --test fuzz -- --nocapture >"$log" 2>&1 ||
        wrong "an input breaks a reader: $log"
    count launches "$(($(now) - begin))"
    grep -o '^.* with FM_DIST_FUZZ_SEED.*' "$log" | sed 's/^/    /' || wrong "nothing was tried: $log"
}

# Two nodes whose cable carries two megabits a second: slow is no reason to end, and no rank is blamed for it.
case_c15_slow_link() {
    local begin
    begin=$(now)
    log=$room/$case/link.log
    # Not behind an `if`, in which nothing that fails would end it.
    set +e
    (set -e; on_a_slow_link "$(scaled 200 10 2000)") >"$log" 2>&1
    code=$?
    set -e
    # It cannot run here, and has said why.
    [ "$code" -ne 77 ] || code=0
    expect 0
    sed -n 's/^SKIPPED.*: /    SKIPPED: /p' "$log"
    ! grep -q '^SKIPPED' "$log" || count skipped "$(grep '^SKIPPED' "$log")"
    grep '^    ' "$log" || true
    count launches "$(($(now) - begin))"
}

# In a subshell: the nodes clean up after themselves when it ends, and have a room, a skip and a fail of their own.
on_a_slow_link() {
    local steps=$1 end log
    # Called without arguments, as the script itself is.
    shift
    # shellcheck source=launch/test-nodes.sh
    . launch/test-nodes.sh
    trap clean_up EXIT
    command -v tc >/dev/null || skip "no tc here (iproute2)"
    plug_in
    for end in a b; do
        ip netns exec "$mark-node-$end" tc qdisc add dev "$mark-$end" root tbf rate 2mbit burst 16kb latency 400ms ||
            skip "this kernel has no token bucket filter"
    done
    log=$room/slow.log
    (mpirun_on node-a:2,node-b:2 --set max_steps="$steps" --set output_dir="$room/slow" --set watchdog.step_seconds=20) >"$log" 2>&1 ||
        fail "the run ends with $?"
    ! grep -E 'HANG|WARN' "$log" || fail "a false alarm"
    ip netns exec "$mark-node-a" tc -s qdisc show dev "$mark-a" | grep -qE 'overlimits [1-9]' || fail "the link was never too slow"
    tail -n 1 "$room/slow/metrics.jsonl" | grep -o '"samples_per_s[a-z]*":[0-9.]*' | sed 's/^/    /'
}

# Memory, files and threads of each rank at one save are those at the last; nothing is left in shared memory.
case_leaks() {
    local steps saves file run=$room/$case/run mpirun line
    steps=$(scaled 5000 400 5000)
    saves=$(scaled 50 10 50)
    log=$room/$case/run.log
    coproc RUN { exec mpirun --oversubscribe -n 2 "$program" train "${tiny[@]}" --set max_steps="$steps" --set output_dir="$run" \
        --set checkpoint.every_n_steps=$((steps / saves)) 2>&1; }
    mpirun=$RUN_PID
    local begin
    begin=$(now)
    while read -r -u "${RUN[0]}" line; do
        echo "$line" >>"$log"
        [[ $line != *saved*step-* ]] || held "$mpirun" >>"$room/$case/held"
    done || true
    wait "$mpirun" || wrong "the run ends with $?: $log"
    count launches "$(($(now) - begin))"
    all_gone "$room/$case/" || wrong "processes outlive $log"
    [ -s "$room/$case/shared" ] || wrong "ranks of one machine shared no memory"
    # Those that these ranks had: other programs have theirs.
    while read -r file; do [ ! -e "$file" ] || wrong "$file is left"; done < <(sort -u "$room/$case/shared")
    no_growth <"$room/$case/held" || wrong "something grows: $room/$case/held"
}

# Kilobytes, files and threads of all ranks together; notes their files in shared memory.
held() {
    local pid kilobytes=0 files=0 threads=0
    for pid in $(pgrep -P "$1" -f "$program"); do
        { grep -o '/dev/shm/[^ ]*' "/proc/$pid/maps" || true; } >>"$room/$case/shared"
        kilobytes=$((kilobytes + $(awk '/^VmRSS/ { print $2 }' "/proc/$pid/status")))
        files=$((files + $(find "/proc/$pid/fd" -mindepth 1 | wc -l)))
        threads=$((threads + $(find "/proc/$pid/task" -mindepth 1 -maxdepth 1 | wc -l)))
    done
    [ "$threads" -eq 0 ] || echo "$kilobytes $files $threads"
}

# Of these lines the first fifth is warming up; from then on the medians of both halves must be alike.
no_growth() {
    awk 'function median(column, from, to,   count, i, sorted, text) {
            count = 0
            for (i = from; i < to; i++) sorted[count++] = value[i, column]
            for (i = 1; i < count; i++) for (j = i; j > 0 && sorted[j - 1] > sorted[j]; j--) { text = sorted[j]; sorted[j] = sorted[j - 1]; sorted[j - 1] = text }
            return sorted[int(count / 2)] }
        { for (i = 1; i <= 3; i++) value[NR - 1, i] = $i }
        END {
            first = int(NR / 5); middle = int((NR + first) / 2)
            for (i = 1; i <= 3; i++) { early[i] = median(i, first, middle); late[i] = median(i, middle, NR) }
            printf "    %d saves: %d, then %d kB; %d, then %d files; %d, then %d threads\n", NR, early[1], late[1], early[2], late[2], early[3], late[3]
            exit !(NR >= 8 && late[1] <= early[1] * 1.02 + 2048 && late[2] <= early[2] && late[3] <= early[3]) }'
}

# One line of the table.
row() {
    local launches failures worst note=
    launches=$(wc -l <"$room/$1/launches")
    failures=$(wc -l <"$room/$1/failures")
    worst=$(sort -n "$room/$1/launches" | tail -n 1)
    [ ! -s "$room/$1/skipped" ] || note=SKIPPED
    printf '%-46s %6d %9d %9s %s\n' "$1" "$launches" "$failures" "$(awk -v ms="${worst:-0}" 'BEGIN { printf "%.1f", ms / 1000 }')" "$note"
}

mounted=()
writer=
clean_up() {
    local code=$? folder
    trap - EXIT
    end_writer
    for folder in "${mounted[@]}"; do umount -l "$folder" 2>/dev/null || true; done
    [ "$code" -ne 0 ] || rm -r "$room"
    [ "$code" -eq 0 ] || echo "$0: failed; everything is in $room"
    exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

echo "FM_DIST_SOAK_SEED=$seed, $hours h"
[ -n "${FM_DIST_PROGRAM:-}" ] || timed "build" cargo build
timed "build of the fuzzer" cargo test --quiet --test fuzz --no-run
for case in "${cases[@]}"; do
    declare -F "$case" >/dev/null || stop "no case $case"
    mkdir "$room/$case"
    touch "$room/$case"/{launches,failures,skipped}
    # Every case from the same numbers, whichever ran before.
    RANDOM=$seed
    timed "$case" "$case"
done

printf '%-46s %6s %9s %9s\n' case runs failures "worst/s"
for name in "${cases[@]}"; do row "$name"; done
echo "FM_DIST_SOAK_SEED=$seed, $((SECONDS / 60)) min"
! grep -q . "$room"/*/failures
