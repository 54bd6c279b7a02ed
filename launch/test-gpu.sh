#!/usr/bin/env bash
# What only GPUs can show: the collectives' contract on real NCCL, stream order, our kernel, loss curves, memory, overlap. Prints
# a table.
#
#   launch/test-gpu.sh            on all GPUs of this machine, which should have nothing else to do
#
# Needs an NVIDIA driver for CUDA 13, what launch/setup.sh needs, and 15 GB of disk with target/; the largest test takes 6 GB of
# a GPU. With compute-sanitizer in PATH the stream order is tested under it as well. CUDA_VISIBLE_DEVICES chooses the GPUs.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

logs=target/test-gpu
failed=0

gpus() { nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true; }

# How many of the machine's GPUs programs see.
visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .
    else
        gpus
    fi
}

# Every test that is ignored for want of a GPU, by its full name.
gpu_tests() {
    local name
    grep -rhA 3 'ignore = "needs a CUDA device"' tests src | sed -n 's/^ *fn \([a-z0-9_]*\)().*/\1/p' | while read -r name; do
        grep -E "(^|::)$name: test\$" "$logs/list" | sed 's/: test$//'
    done
}

row() { printf '%-78s %-8s %7s\n' "$1" "$2" "$3"; }

# One line of the table: runs the command with its output in a file, which is shown where it fails.
test_row() {
    local title=$1 begin=$SECONDS log
    shift
    log="$logs/$(echo "$title" | tr -c 'a-z0-9_\n' '-').log"
    # A name that fits no test runs none, which cargo calls a success.
    if "$@" >"$log" 2>&1 && grep -q '^test result: ok. 1 passed' "$log"; then
        row "$title" passed $((SECONDS - begin))
    else
        row "$title" FAILED $((SECONDS - begin))
        tail -n 40 "$log" | sed 's/^/    /'
        failed=1
    fi
}

[ "$#" -eq 0 ] || stop "usage: launch/test-gpu.sh"
command -v nvidia-smi >/dev/null || stop "no nvidia-smi found: this needs a machine with an NVIDIA driver"
[ "$(gpus)" -gt 0 ] || stop "nvidia-smi lists no GPU: is one there, and does the driver fit the kernel?"
[ "$(visible_gpus)" -gt 0 ] || stop "CUDA_VISIBLE_DEVICES names no GPU"
nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader | sed 's/^/    GPU /'

launch/setup.sh
[ -e .deps/torch/lib/libtorch_cuda.so ] || stop "launch/setup.sh left no libtorch_cuda.so under .deps/torch/lib: it saw no driver"
export LD_LIBRARY_PATH="$PWD/.deps/nvidia/nccl/lib:$PWD/.deps/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# As root Open MPI asks for both.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mkdir -p "$logs"
timed "build of the tests" cargo test --lib --test tests --no-run
cargo test --quiet --lib --test tests -- --ignored --list >"$logs/list"
mapfile -t tests < <(gpu_tests)
[ "${#tests[@]}" -gt 0 ] || stop "no test is ignored for want of a CUDA device: was their mark changed?"

row test result seconds
for name in "${tests[@]}"; do
    if [[ "$name" = *between_gpus* ]] && [ "$(visible_gpus)" -lt 2 ]; then
        row "$name" "1 GPU" -
        continue
    fi
    test_row "$name" cargo test --quiet --lib --test tests -- --ignored --exact "$name" --nocapture
done
if command -v compute-sanitizer >/dev/null; then
    order=cuda::what_is_computed_before_and_after_a_collective_keeps_its_place
    test_row "$order, under compute-sanitizer" compute-sanitizer --tool memcheck --track-stream-ordered-races all --target-processes all \
        --error-exitcode 1 cargo test --quiet --test tests -- --ignored --exact "$order" --nocapture
    kernel=cuda::the_kernel_of_adamw_gives_a_gpu_the_bits_of_a_cpu
    test_row "$kernel, under compute-sanitizer" compute-sanitizer --tool memcheck --target-processes all \
        --error-exitcode 1 cargo test --quiet --test tests -- --ignored --exact "$kernel" --nocapture
else
    row "stream order, under compute-sanitizer" absent -
fi
[ "$failed" -eq 0 ] || { echo "some tests failed; their output is in $logs/"; exit 1; }
echo "everything passed in $SECONDS s"
