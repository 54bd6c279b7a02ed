#!/usr/bin/env bash
# From a fresh machine to generated pictures: sets up, builds, trains on 2 ranks, draws.
#
#   launch/demo.sh               the digits: 10 of each class, from the data in the program
#   launch/demo.sh --pictures    eight real photographs: pictures and captions, a dataset, training, and pictures by prompt
#
# Takes at most 8 minutes on 2 cores with a fast network, at most 3 of them training; --pictures at most 10, 5 of them training, and
# it fetches 30 MB of Python packages for their photographs. Needs what launch/setup.sh needs. Every call trains into a new folder
# under runs/.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

ranks=2
run=runs/demo-$(date +%Y%m%d-%H%M%S)
program=target/release/fm-dist

digits() {
    timed "train: the embedded default configuration, mpirun -n $ranks" mpi_run "$ranks" "$program" train --set output_dir="$run"
    timed "sample: 10 digits of each class from noise" "$program" sample --run "$run" --out "$run/samples.png"
    cat <<TEXT

It took $SECONDS s in all. Look at
  $run/samples.png    generated digits
  $run/loss.png       the loss curve
  $run/report.html    curves and pictures on one page
  $run                the run folder: checkpoints and logs
TEXT
}

pictures() {
    local data=$run-data
    timed "photographs: those in two Python packages, pinned by hash" python_packages launch/requirements/pictures.txt .deps/pictures
    mkdir -p "$data"
    timed "pictures: cut into squares, each with its caption beside it" .deps/pictures/bin/python launch/pictures.py "$data/pictures"
    timed "dataset: fm-dist data encode, by a cosine transform in place of an autoencoder" \
        "$program" data encode --family dit --size 64x64 "$data/pictures" --out "$data/dataset" \
        --source "scikit-image and scikit-learn" --licence "see LICENCES.txt beside the pictures"
    timed "train: configs/pictures.toml, mpirun -n $ranks" mpi_run "$ranks" "$program" train --config configs/pictures.toml \
        --set data.path="$data/dataset" --set output_dir="$run"
    timed "sample: a picture of each of four prompts" "$program" sample --run "$run" --ema --out "$run/sample.png" \
        --prompt "a cat" --prompt "a flower" --prompt "a temple" --prompt "a cup of coffee"
    cat <<TEXT

It took $SECONDS s in all. Look at
  $run/report.html         the loss, and how the pictures of each prompt came out of noise while it trained
  $run/sample-0.png, …     64 x 64 pixels by prompt: a cat, a flower, a temple, a cup of coffee
  $run/samples             the pictures of each prompt after every few hundred steps
  $data/pictures      what it learned from, and LICENCES.txt of the photographs
A model of this size, trained for minutes on eight photographs, learns their colours, their textures and where things are. It has
learned these photographs, and nothing of cats and flowers at large.
TEXT
}

[ "$#" -eq 0 ] || [ "$*" = --pictures ] || stop "usage: launch/demo.sh [--pictures]"
launch/setup.sh
timed "build: the program, optimized" cargo build --release
if [ "$#" -eq 0 ]; then digits; else pictures; fi
