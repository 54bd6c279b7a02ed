#!/usr/bin/env bash
# How well `fm-dist check --cluster` predicts a step on this machine: a small FLUX model on 1, 2 and 4 ranks of one thread, predicted
# beside measured.
#
# First the machine is measured without any model (`calibrate.rs`), and only then the model trains: nothing is fitted. Prints a
# table of seconds and ratios; the constants stay in target/scaling/clusters.toml. `--set KEY=VALUE`… go to both sides. Takes
# some minutes, and every core: what else computes meanwhile shows in the spread and in the load.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/../../launch/env.sh"

cores=$(num_cores)
folder=target/scaling
steps=12

build=$(cargo bench --no-run --bench calibrate 2>&1) || { echo "$build" >&2; exit 1; }
calibrate=$(sed -n 's/.*Executable.*(\(.*\))$/\1/p' <<<"$build")
cargo build --release --quiet
fm_dist=target/release/fm-dist
export OMP_NUM_THREADS=1

rm -rf "$folder"
mkdir -p "$folder"
python3 tests/bench/scaling.py data "$folder/data"
cat >"$folder/flux.toml" <<TOML
max_steps = $steps

[model.flux]
in_channels = 16
num_layers = 2
num_single_layers = 4
attention_head_dim = 64
num_attention_heads = 8
joint_attention_dim = 256
pooled_projection_dim = 128
guidance_embeds = true
axes_dims_rope = [16, 24, 24]

[flow_matching]
adapter_type = "flux"

[data]
path = "$folder/data"
micro_batch_size_per_gpu = 2

[checkpoint]
every_n_steps = 1000

[log]
progress = "never"
TOML

echo "load: $(cut -d' ' -f1-3 /proc/loadavg)"
mpi_run "$cores" "$calibrate" 15 >"$folder/calibrated.txt"
python3 tests/bench/scaling.py clusters src/plan/prediction/clusters.toml "$folder/calibrated.txt" >"$folder/clusters.toml"
sed -n "/^\[cluster.cpu$cores\]/,\$p" "$folder/clusters.toml"

"$fm_dist" check -c "$folder/flux.toml" "$@" --world 1..4 --cluster "cpu$cores" --clusters "$folder/clusters.toml" >"$folder/plan.txt"
for ranks in 1 2 4; do
    mpi_run "$ranks" "$fm_dist" train -c "$folder/flux.toml" "$@" --set output_dir="$folder/run-$ranks" >"$folder/log-$ranks.txt" 2>&1 ||
        { cat "$folder/log-$ranks.txt" >&2; exit 1; }
done
echo "load: $(cut -d' ' -f1-3 /proc/loadavg)"
python3 tests/bench/scaling.py compare "$folder"
