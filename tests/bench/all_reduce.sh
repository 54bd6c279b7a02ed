#!/usr/bin/env bash
# How fast 2 ranks of one thread each all-reduce 256 MB of f32: fm-dist over MPI against gloo of PyTorch, in turns.
#
# Prints both medians in GB/s with their spreads, the ratio, and the latency of small all-reduces beside MPI's own. Needs
# the oracle packages under .deps/oracle, and both cores: what else computes meanwhile shows in the spread and in the load.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/../../launch/env.sh"

bytes=256000000
repeats=5
turns=${1:-5}

build=$(cargo bench --no-run --bench all_reduce 2>&1) || { echo "$build" >&2; exit 1; }
bench=$(sed -n 's/.*Executable.*(\(.*\))$/\1/p' <<<"$build")
export OMP_NUM_THREADS=1

echo "load: $(cut -d' ' -f1-3 /proc/loadavg)"
results=$(mktemp)
trap 'rm -f "$results"' EXIT
for turn in $(seq "$turns"); do
    echo "turn $turn of $turns"
    mpi_run 2 "$bench" $bytes $repeats | grep '^fm-dist' >>"$results"
    .deps/oracle/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 tests/bench/gloo_all_reduce.py \
        $bytes $repeats | grep '^gloo' >>"$results"
done

.deps/oracle/bin/python - "$results" $bytes <<'PYTHON'
import statistics
import sys

rates = {"fm-dist": [], "gloo": []}
for line in open(sys.argv[1]):
    name, *seconds = line.split()
    rates[name] += [int(sys.argv[2]) / float(each) / 1e9 for each in seconds]
for name, each in rates.items():
    print(f"{name:8} {statistics.median(each):.2f} GB/s (median of {len(each)}, {min(each):.2f} to {max(each):.2f})")
print(f"ratio    {statistics.median(rates['fm-dist']) / statistics.median(rates['gloo']):.2f}")
PYTHON

for small in 4 256 2048; do
    echo "seconds of an all-reduce of $small bytes:"
    mpi_run 2 "$bench" $small 5 | grep -v '^    '
done
