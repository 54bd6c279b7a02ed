#!/usr/bin/env bash
# Two nodes on one machine: network namespaces with a cable between them, each with a host name of its own, and mpirun that goes
# from one to the other as it would by ssh. 2 x 2 ranks train as 4 on one node do, bit for bit; then the cable is cut.
#
# Takes half a minute on 2 cores; needs root (it is SKIPPED without) and what launch/setup.sh needs.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

skip() {
    echo "SKIPPED $0: $*"
    exit 77
}

fail() {
    echo "$0: $*" >&2
    exit 1
}

[ "$#" -eq 0 ] || stop "usage: launch/test-nodes.sh"
[ "$(id -u)" -eq 0 ] || skip "network namespaces need root"
for needed in ip unshare mpirun; do
    command -v "$needed" >/dev/null || skip "no $needed here (iproute2, util-linux, openmpi-bin)"
done
mpirun --version | grep 'Open MPI' >/dev/null || skip "mpirun is not Open MPI's, which this knows how to send into a namespace"

program=${FM_DIST_PROGRAM:-$PWD/target/debug/fm-dist}
room=$(mktemp -d "${TMPDIR:-/tmp}/fm-dist-nodes.XXXXXX")
# Namespaces are known to the whole machine, host names only inside of theirs.
mark=fmd$$
nodes=(node-a node-b)

# Processes of both nodes, whoever started them.
processes() { for node in "${nodes[@]}"; do ip netns pids "$mark-$node" 2>/dev/null || true; done; }

# Those of them that are ranks.
ranks() {
    local pid
    for pid in $(processes); do
        [ "$(readlink "/proc/$pid/exe" 2>/dev/null)" != "$(readlink -f "$program")" ] || echo "$pid"
    done
}

clean_up() {
    local code=$? node pid
    trap - EXIT
    for pid in $(processes); do kill -KILL "$pid" 2>/dev/null || true; done
    for node in "${nodes[@]}"; do
        ip netns delete "$mark-$node" 2>/dev/null || true
        rm -rf "/etc/netns/$mark-$node"
    done
    rmdir /etc/netns 2>/dev/null || true
    if [ "$code" -eq 0 ]; then
        rm -r "$room"
    else
        tail -n 15 "$room"/*.log 2>/dev/null || true
        echo "$0: failed; everything is in $room"
    fi
    exit "$code"
}

# Two namespaces and a cable; in each a hosts file that knows both nodes.
plug_in() {
    local node number=0
    ip link add "$mark-a" type veth peer name "$mark-b"
    for node in "${nodes[@]}"; do
        number=$((number + 1))
        mkdir -p "/etc/netns/$mark-$node"
        printf '127.0.0.1 localhost\n10.99.7.1 node-a\n10.99.7.2 node-b\n' >"/etc/netns/$mark-$node/hosts"
        ip netns add "$mark-$node"
        ip link set "$mark-${node#node-}" netns "$mark-$node"
        ip -netns "$mark-$node" address add "10.99.7.$number/24" dev "$mark-${node#node-}"
        ip -netns "$mark-$node" link set "$mark-${node#node-}" up
        ip -netns "$mark-$node" link set lo up
    done
    # What mpirun calls instead of ssh: NODE COMMAND…
    cat >"$room/enter" <<SCRIPT
#!/bin/sh
node=\$1
shift
exec ip netns exec "$mark-\$node" unshare --uts sh -c 'hostname "\$0" && exec sh -c "\$*"' "\$node" "\$@"
SCRIPT
    chmod +x "$room/enter"
}

# mpirun on node-a with so many ranks on each of these nodes.
mpirun_on() {
    local hosts=$1
    shift
    local as_node_a=(ip netns exec "$mark-node-a" unshare --uts sh -c 'hostname node-a && exec "$@"' sh)
    local by_cable=(--mca plm_rsh_agent "$room/enter" --mca btl_tcp_if_include 10.99.7.0/24 --mca oob_tcp_if_include 10.99.7.0/24)
    exec "${as_node_a[@]}" mpirun "${by_cable[@]}" --oversubscribe --host "$hosts" "$program" train "${tiny[@]}" "$@"
}

checkpoint() { (cd "$room/$1/step-00000010" && sha256sum ./*); }

# Ten steps on these nodes.
train() {
    (mpirun_on "$2" --set max_steps=10 --set output_dir="$room/$1") >"$room/$1.log" 2>&1 || fail "ranks on $2 end with $?"
}

two_nodes_are_one() {
    train one node-a:4
    train two node-a:2,node-b:2
    [ "$(checkpoint one)" = "$(checkpoint two)" ] || fail "2 x 2 ranks gave other bits than 4 on one node"
}

# Whether all ranks are gone in so many seconds; says how many it took.
ranks_end_within() {
    local limit=$1 begin=$SECONDS
    while [ -n "$(ranks)" ]; do
        [ $((SECONDS - begin)) -lt "$limit" ] || return 1
        sleep 0.1
    done
    echo "    every rank was gone $((SECONDS - begin)) s after the cut"
}

# mpirun notices nothing and does not return: the watchdogs end the ranks, and this ends mpirun, as slurm.sbatch's guard would.
c14_cut_in_the_middle() {
    local line mpirun mpirun_output seen=
    local limits=(--set watchdog.init_seconds=30 --set watchdog.first_step_seconds=30 --set watchdog.step_seconds=3
        --set watchdog.save_seconds=3 --set watchdog.report_seconds=3 --set watchdog.finalize_seconds=3)
    exec {mpirun_output}< <(mpirun_on node-a:2,node-b:2 --set max_steps=100000 --set checkpoint.every_n_steps=10 \
        --set output_dir="$room/cut" "${limits[@]}" 2>&1)
    mpirun=$!
    while read -r -t 30 line <&"$mpirun_output"; do
        echo "$line" >>"$room/cut.log"
        [[ $line != *saved*step-00000010* ]] || { seen=yes; break; }
    done
    [ -n "$seen" ] || fail "the first checkpoint was never reported"
    [ "$(ranks | wc -l)" -eq 4 ] || fail "$(ranks | wc -l) ranks run, expected 4"
    ip -netns "$mark-node-a" link set "$mark-a" down
    # The rest of what they say; it must not fill the pipe.
    cat <&"$mpirun_output" >>"$room/cut.log" &
    # The limit of a step, two seconds to end in, and as much again for a busy machine.
    ranks_end_within 10 || fail "ranks outlive the cut: $(ranks | tr '\n' ' ')"
    if kill -0 "$mpirun" 2>/dev/null; then
        kill -TERM "$mpirun"
        for _ in {1..20}; do
            kill -0 "$mpirun" 2>/dev/null || break
            sleep 0.1
        done
        echo "    mpirun did not return by itself: ended"
        kill -KILL "$mpirun" 2>/dev/null || true
    fi
    grep -q 'fm-dist: error \(HANG\|COMM\|PEER\)' "$room/cut.log" || fail "no rank said why"
    grep 'fm-dist: error' "$room/cut.log" | sed 's/^/    /'
    # Nothing that node-b says gets through, but its files lie where both write.
    compgen -G "$room/cut/failure-[01].json" >/dev/null || fail "no rank of node-a left a failure file"
    compgen -G "$room/cut/failure-[23].json" >/dev/null || fail "no rank of node-b left a failure file"
    [ -e "$room/cut/step-00000010/manifest.json" ] || fail "the checkpoint before the cut is gone"
}

tiny=(--set model.dit.width=32 --set model.dit.depth=2 --set data.micro_batch_size_per_gpu=8 --set train.global_batch_size=32
    --set sampling.num_steps=2 --set 'log.progress="never"' --set parallel.sharding=gradients --set parallel.sharding_group=node)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
# launch/soak.sh takes the nodes and trains on them in its own way.
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

{ ip netns add "$mark-node-a" && ip netns delete "$mark-node-a"; } 2>/dev/null || skip "this machine lets nobody make network namespaces"
[ -n "${FM_DIST_PROGRAM:-}" ] || timed "build" cargo build
timed "two nodes and a cable between them" plug_in
timed "2 x 2 ranks train as 4 on one node do" two_nodes_are_one
timed "the cable is cut: every rank ends within the watchdog's limit (C14)" c14_cut_in_the_middle
