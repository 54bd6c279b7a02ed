#!/usr/bin/env bash
# What only GPUs can show, part by part, what is worth most first. Prints a table; a part that fails does not stop the others.
#
#   launch/test-gpu.sh [--again] [PART…]      those parts, or all of them, on all GPUs of this machine, which should have nothing else to do
#   launch/test-gpu.sh --list                 the parts, their limits, and the tests that they run
#
# Needs an NVIDIA driver for CUDA 13, what launch/setup.sh --oracle needs, 30 GB of disk with target/, and for the last parts a GPU of
# 80 GB and 100 GB of memory. It builds first; a folder that launch/pack-gpu.sh has made is built. With ncu in PATH `bench` names the
# kernels of a step, with compute-sanitizer there is a part of that name. CUDA_VISIBLE_DEVICES chooses the GPUs.
#
# A row that passed is not run again, unless --again asks for it: target/test-gpu/passed has its name, with a hash of the programs, the
# scripts, the GPUs and their driver. Logs are in target/test-gpu/, numbers of `bench` and `offload` in target/bench/compare.json.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"
# shellcheck source=launch/packed.sh
. launch/packed.sh

# In the order of what is worth most. Seconds without the build: 300 for the first four, 1500 for all.
PARTS=(attention tests families parity runs bench offload sanitizer)
declare -A LIMIT=([attention]=60 [tests]=90 [families]=60 [parity]=90 [runs]=240 [bench]=540 [offload]=240 [sanitizer]=180)
declare -A PURPOSE=(
    [attention]="which of libtorch's attention kernels are sound here, and their times: fm-dist doctor --gpu"
    [tests]="what is computed on GPUs: collectives by NCCL, the order of streams, our kernels, the digits' loss curve"
    [families]="one bfloat16 step of each model family at its real head width, with and without masks, beside a CPU's in float32"
    [parity]="a step of each family beside NeMo AutoModel and diffusers on the same GPU, with draws of the host and of the device"
    [runs]="memory beside fm-dist check, a GPU that fails or is too small, NCCL among 1 to N GPUs, and collectives behind computation"
    [bench]="FLUX of 71M and 2.6B and Wan 1.3B beside NeMo AutoModel and diffusers, eager and compiled; kernels of a step"
    [offload]="a step of half of FLUX.1-dev at 1024 x 1024 pixels with offload, beside what fm-dist check told"
    [sanitizer]="the order of streams and our kernels under compute-sanitizer"
)
# Whose tests are another part's.
OTHER_PARTS='^cuda::(families|parity|memory|failures)::'
# Tests that `tests` has run already belong to `runs` as well.
OF_RUNS='^cuda::(memory::.*|failures::.*|the_digits_run_.*|worlds_of_any_number_.*|collectives_between_.*)$'
# Rows of `bench` in the order of what is worth most: case, kind, and what compare.py gets besides.
BENCHMARKS=(
    "flux-2.6b bfloat16 --steps 8 --warm-up 4"
    "wan-1.3b bfloat16 --steps 6 --warm-up 3"
    "flux-71m bfloat16 --steps 30 --warm-up 10"
    "flux-71m float32 --steps 30 --warm-up 10"
    "wan-1.3b-720p bfloat16 --steps 1 --warm-up 1 --beside"
    "flux-2.6b float32 --steps 4 --warm-up 2 --beside peer"
    "wan-1.3b float32 --steps 4 --warm-up 2 --beside peer"
)

# Lines of a failed row's log that say nothing of its cause.
NO_CAUSE='^(\| |exit |stack backtrace|running 1 test|failures:|note: |test |test result:|==> )|^ +([0-9]+: |at |cuda::|done in )'

logs=target/test-gpu
again=
failed=0
deadline=0
mark=
program=target/release/fm-dist
tests=

gpus() { nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true; }

# How many of the machine's GPUs programs see.
visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .
    else
        gpus
    fi
}

# Every test that is ignored for want of a GPU lies in the tier of this name.
gpu_tests() { "$tests" --ignored --list 2>/dev/null | sed -n 's/^\(cuda::.*\): test$/\1/p'; }

tests_of() {
    case $1 in
        tests) gpu_tests | grep -vE "$OTHER_PARTS" ;;
        families | parity) gpu_tests | grep "^cuda::$1::" ;;
        runs) gpu_tests | grep -E "$OF_RUNS" ;;
        sanitizer) gpu_tests | grep -E '^cuda::(what_is_computed_before_and_after|the_kernel_of_adamw|operations::every_kernel)' ;;
    esac
}

row() { printf '%-88s %-8s %5s\n' "$1" "$2" "$3"; }

# Changes with the programs, the scripts and the machine.
fingerprint() {
    {
        sha256sum "$program" "$tests" tests/bench/*.py tests/oracle/*.py
        nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
        if is_packed; then cat packed; fi
    } | sha256sum | cut -c 1-16
}

log_of() { echo "$logs/$(echo "$1" | tr -c 'a-zA-Z0-9_.\n' '-').log"; }

passed_before() { [ -z "$again" ] && grep -qxF "$mark $1" "$logs/passed"; }

# Runs a command with its output in a file until the part's time is over; the file's last line is its exit code and seconds.
run_row() {
    local title=$1 log begin=$SECONDS left=$((deadline - SECONDS)) code=0
    shift
    log=$(log_of "$title")
    if [ "$left" -lt 5 ]; then
        echo "exit late 0" >"$log"
        return
    fi
    timeout --kill-after=5 "$left" "$@" >"$log" 2>&1 </dev/null || code=$?
    echo "exit $code $((SECONDS - begin))" >>"$log"
}

# The line of a row that was run, with the rows of figures that it printed, and the end of its output where it failed.
tell_row() {
    local title=$1 log code seconds
    log=$(log_of "$title")
    read -r _ code seconds < <(tail -n 1 "$log")
    # A name that fits no test runs none, which the test program calls a success.
    if [[ "$title" = cuda::* ]] && [ "$code" = 0 ] && ! grep -q '^test result: ok. 1 passed' "$log"; then code=empty; fi
    case $code in
        0) row "$title" passed "$seconds"; echo "$mark $title" >>"$logs/passed" ;;
        late) row "$title" "no time" - ;;
        absent) row "$title" absent - ;;
        124 | 137) row "$title" "TOO LONG" "$seconds" ;;
        *) row "$title" FAILED "$seconds" ;;
    esac
    # Figures, and not the lines of a Markdown table, which end by a bar.
    grep '^| .*[^|]$' "$log" | cut -c 1-260 | sed 's/^/    /' || true
    case $code in
        0 | late) ;;
        *) grep -vE "$NO_CAUSE" "$log" | grep . | tail -n 6 | cut -c 1-300 | sed 's/^/    > /' || true ;;
    esac
    [ "$code" = 0 ] || failed=1
}

# Rows one after the other.
one_row() {
    if passed_before "$1"; then row "$1" before -; return; fi
    run_row "$@"
    tell_row "$1"
}

test_rows() {
    local name
    for name in "$@"; do
        if [[ "$name" = *between_gpus* ]] && [ "$(visible_gpus)" -lt 2 ]; then
            row "$name" "1 GPU" -
            continue
        fi
        one_row "$name" "$tests" --ignored --exact "$name" --nocapture
    done
}

# Rows side by side, because most of their time is that of one core: as many as have two cores each.
test_rows_together() {
    local name most=$((($(nproc) + 1) / 2))
    for name in "$@"; do
        passed_before "$name" && continue
        while [ "$(jobs -rp | wc -l)" -ge "$most" ]; do wait -n || true; done
        run_row "$name" "$tests" --ignored --exact "$name" --nocapture &
    done
    wait
    for name in "$@"; do
        if passed_before "$name"; then row "$name" before -; else tell_row "$name"; fi
    done
}

attention() {
    if [[ "$("$program" doctor --help 2>/dev/null)" = *--gpu* ]]; then
        one_row "attention: fm-dist doctor --gpu" "$program" doctor --gpu
        grep -v '^| \|^exit ' "$(log_of "attention: fm-dist doctor --gpu")" | cut -c 1-260 | sed 's/^/    /' || true
    else
        row "attention: this fm-dist has no \`doctor --gpu\`" absent -
        failed=1
    fi
}

bench() {
    local benchmark case dtype options
    for benchmark in "${BENCHMARKS[@]}"; do
        read -r case dtype options <<<"$benchmark"
        # shellcheck disable=SC2086 # options are words
        one_row "bench: $case $dtype" .deps/oracle/bin/python tests/bench/compare.py steps --device cuda --pairs 1 --ranks 1 \
            --cases "$case" --dtypes "$dtype" $options
        if [ "$case $dtype" = "flux-2.6b bfloat16" ]; then
            if command -v ncu >/dev/null; then
                one_row "bench: kernels of $case" .deps/oracle/bin/python tests/bench/compare.py kernels --device cuda --cases "$case"
            else
                row "bench: kernels of $case (no ncu in PATH)" absent -
            fi
        fi
    done
}

offload() {
    one_row "offload: half of FLUX.1-dev" .deps/oracle/bin/python tests/bench/compare.py offload --device cuda --steps 2 --warm-up 1
}

sanitizer() {
    local name tool
    if ! command -v compute-sanitizer >/dev/null; then
        row "compute-sanitizer" absent -
        return
    fi
    for name in $(tests_of sanitizer); do
        tool=(compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1)
        [[ "$name" = *the_kernel_of* ]] || tool+=(--track-stream-ordered-races all)
        one_row "sanitizer: $name" "${tool[@]}" "$tests" --ignored --exact "$name" --nocapture
    done
}

run_part() {
    local part=$1 names begin=$SECONDS
    deadline=$((SECONDS + LIMIT[$part]))
    echo "== $part, at most ${LIMIT[$part]} s: ${PURPOSE[$part]}"
    mapfile -t names < <(tests_of "$part")
    case $part in
        tests | runs) test_rows "${names[@]}" ;;
        families | parity) test_rows_together "${names[@]}" ;;
        *) "$part" ;;
    esac
    echo "   $part took $((SECONDS - begin)) s"
}

list() {
    local part
    for part in "${PARTS[@]}"; do
        printf '%-10s %4s s   %s\n' "$part" "${LIMIT[$part]}" "${PURPOSE[$part]}"
        if [ -n "$tests" ]; then tests_of "$part" | sed 's/^/                    /' || true; fi
    done
}

# The test program: packed, or the newest that cargo has built.
find_tests() {
    if is_packed; then
        tests=target/release/tests
    else
        tests=$(find target/release/deps -name 'tests-*' -executable -type f -printf '%T@ %p\n' 2>/dev/null | sort -n | sed -n '$s/^[^ ]* //p' || true)
    fi
}

prepare() {
    if is_packed; then
        timed "what the pack needs: PyTorch, Open MPI, the peer" unpack
    else
        launch/setup.sh --oracle
        timed "build, optimized: the program" cargo build --release
        timed "build, optimized: its tests" cargo test --release --test tests --no-run
    fi
    find_tests
    [ -e .deps/torch/lib/libtorch_cuda.so ] || stop "no libtorch_cuda.so under .deps/torch/lib: launch/setup.sh saw no driver"
    export LD_LIBRARY_PATH="$PWD/.deps/links:$PWD/.deps/nvidia/nccl/lib:$PWD/.deps/nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    # As root Open MPI asks for both.
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error
}

chosen=()
for argument in "$@"; do
    case $argument in
        --again) again=1 ;;
        --list) find_tests; list; exit ;;
        *)
            [ -n "${LIMIT[$argument]:-}" ] || stop "usage: launch/test-gpu.sh [--again|--list] [PART…], of ${PARTS[*]}"
            chosen+=("$argument")
            ;;
    esac
done
[ "${#chosen[@]}" -gt 0 ] || chosen=("${PARTS[@]}")
command -v nvidia-smi >/dev/null || stop "no nvidia-smi found: this needs a machine with an NVIDIA driver"
[ "$(gpus)" -gt 0 ] || stop "nvidia-smi lists no GPU: is one there, and does the driver fit the kernel?"
[ "$(visible_gpus)" -gt 0 ] || stop "CUDA_VISIBLE_DEVICES names no GPU"
nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader | sed 's/^/    GPU /'
prepare
[ -n "$(gpu_tests)" ] || stop "$tests has no ignored test under cuda::: was the tier renamed?"
mkdir -p "$logs"
touch "$logs/passed"
mark=$(fingerprint)

row row result seconds
for part in "${chosen[@]}"; do run_part "$part"; done
[ "$failed" -eq 0 ] || { echo "not everything passed in $SECONDS s; logs are in $logs/"; exit 1; }
echo "everything passed in $SECONDS s"
