#!/usr/bin/env bash
# From a fresh machine to generated pictures: sets up, builds, trains the digits on 2 ranks, draws 10 of each class.
#
# Takes at most 8 minutes on 2 cores with a fast network, at most 3 of them training; needs what launch/setup.sh needs.
# Every call trains into a new folder under runs/.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

ranks=2
run=runs/demo-$(date +%Y%m%d-%H%M%S)

launch/setup.sh
timed "build: the program, optimized" cargo build --release
timed "train: the embedded default configuration, mpirun -n $ranks" mpi_run "$ranks" target/release/fm-dist train --set output_dir="$run"
timed "sample: 10 digits of each class from noise" target/release/fm-dist sample --run "$run" --out "$run/samples.png"

cat <<TEXT

It took $SECONDS s in all. Look at
  $run/samples.png    generated digits
  $run/loss.png       the loss curve
  $run/report.html    curves and pictures on one page
  $run                the run folder: checkpoints and logs
TEXT
