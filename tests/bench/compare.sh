#!/usr/bin/env bash
# fm-dist beside what a user would pick instead, in turns on this machine: the README here says what each row means.
#
#   tests/bench/compare.sh --help
#
# Sets up the peer under .deps/oracle and builds fm-dist first. Whatever else computes meanwhile falsifies the times.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/../../launch/env.sh"

if is_packed; then
    # shellcheck source=launch/packed.sh
    . launch/packed.sh
    timed "what the pack needs" unpack
else
    launch/setup.sh --oracle >/dev/null
    timed "build, optimized" cargo build --quiet --release
fi
# One thread a rank, on both sides.
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error
exec .deps/oracle/bin/python tests/bench/compare.py "$@"
