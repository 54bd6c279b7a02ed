#!/usr/bin/env bash
# The whole truth about this checkout, cheapest first: set-up, lints, documentation, every test, two nodes and a Slurm on this
# machine (by root, for whom a Slurm is installed where there is none), then the demo judged by a classifier.
#
# Takes from nothing half an hour on two fast cores, and an hour on two slow ones with nothing else running; needs what launch/setup.sh needs, and 10 GB of disk with target/.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

ranks=2
run=target/test-run

await_oracle() {
    wait "$oracle" || { cat .deps/oracle.log; stop "the oracle could not be set up: its messages stand above"; }
    trap - EXIT
    cat .deps/oracle.log
}

# A test that ends with 77 where it cannot run, and has said why.
where_possible() {
    local text=$1 script=$2 begin=$SECONDS code=0
    echo "==> $text"
    "$script" || code=$?
    case $code in
    0) echo "    done in $((SECONDS - begin)) s" ;;
    77) skipped+="$(basename "$script"), " ;;
    *) exit "$code" ;;
    esac
}
skipped=

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then launch/setup.sh --slurm; else launch/setup.sh; fi
# The oracle is mostly download: it travels while the lints compile.
launch/setup.sh --oracle >.deps/oracle.log 2>&1 &
oracle=$!
trap 'kill "$oracle" 2>/dev/null || true' EXIT

timed "formatting" cargo fmt --check
timed "formatting of the double of NCCL" cargo fmt --check --manifest-path tests/nccl_double/Cargo.toml
timed "lints" cargo clippy --all-targets -- -D warnings
timed "documentation" env RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
timed "set-up of the oracle, begun beside the lints" await_oracle
timed "the double of NCCL: each rule that it holds fm-dist to is broken once" \
    cargo test --quiet --manifest-path tests/nccl_double/Cargo.toml --target-dir target/nccl_double
timed "tests" cargo test
where_possible "two nodes on this machine, and a cable that is cut" launch/test-nodes.sh
where_possible "a Slurm on this machine" launch/test-slurm.sh
timed "build, optimized" cargo build --release
rm -rf "$run"
timed "train: the embedded default configuration, mpirun -n $ranks" mpi_run "$ranks" target/release/fm-dist train --set output_dir="$run"
timed "sample" target/release/fm-dist sample --run "$run" --out "$run/samples.safetensors"
timed "judge: are these the digits asked for, as varied as real ones, and not copies?" \
    .deps/oracle/bin/python tests/fixtures/judge_samples.py "$run/samples.safetensors"
echo "everything${skipped:+ but what was SKIPPED above (${skipped%, })} passed in $SECONDS s"
