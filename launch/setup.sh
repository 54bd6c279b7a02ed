#!/usr/bin/env bash
# Makes this machine ready to build, test and run fm-dist. Run it as often as you like: every step does only what is missing.
#
#   launch/setup.sh            system packages, Rust (checked, not installed), libtorch under .deps/
#   launch/setup.sh --oracle   also .deps/oracle: the Python packages that tests compare fm-dist with
#   launch/setup.sh --cuda     libtorch with CUDA libraries, as where an NVIDIA driver is found: on a login node of a cluster with GPUs
#   launch/setup.sh --slurm    also a Slurm for launch/test-slurm.sh, by root (the packages' services are not needed)
#
# Needs Debian or Ubuntu on x86_64 and the network; root only where a system package is missing.
# Takes half a minute on a fast network (three minutes with an NVIDIA driver), the oracle two more, and a second when nothing is missing.
# Disk: 1.6 GB, with an NVIDIA driver 3.8 GB; the oracle 5 GB more. Delete .deps/ to begin anew.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

# What Debian and Ubuntu call the programs and libraries that are missing here, one a line.
missing_packages() {
    command -v gcc >/dev/null || echo gcc
    command -v g++ >/dev/null || echo g++
    command -v make >/dev/null || echo make
    command -v pkg-config >/dev/null || echo pkg-config
    command -v mpirun >/dev/null || echo openmpi-bin
    command -v mpicc >/dev/null || echo libopenmpi-dev
    has_libclang || echo libclang-dev
    command -v python3 >/dev/null || echo python3
    python3 -m pip --version >/dev/null 2>&1 || echo python3-pip
    python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
}

# rsmpi's build reads mpi.h with libclang, which also needs the compiler's own headers beside it.
has_libclang() {
    PATH="$PATH:/sbin" ldconfig -p | grep -E 'libclang(-[0-9.]+)?\.so' >/dev/null ||
        compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || return 1
    compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stddef.h' >/dev/null || compgen -G '/usr/lib/clang/*/include/stddef.h' >/dev/null
}

# What launch/test-slurm.sh starts.
missing_packages_of_slurm() {
    local PATH=$PATH:/usr/sbin needed
    for needed in slurmctld slurmd sbatch srun; do
        command -v "$needed" >/dev/null || { echo slurm-wlm; break; }
    done
    command -v munged >/dev/null || echo munge
    # Of launch/test-nodes.sh.
    command -v ip >/dev/null || echo iproute2
}

# Installs what the given command finds missing.
system_packages() {
    local missing=$1 packages install
    mapfile -t packages < <("$missing")
    if [ "${#packages[@]}" -eq 0 ]; then
        echo "    nothing is missing"
        return
    fi
    install="apt-get install -y --no-install-recommends ${packages[*]}"
    command -v apt-get >/dev/null || stop "please install what Debian calls ${packages[*]} (this machine has no apt-get), then run me again"
    [ "$(id -u)" -eq 0 ] || stop "please run: sudo apt-get update && sudo $install    (then run me again)"
    echo "    $install"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || stop "apt-get update failed: is the network there?"
    $install -qq >/dev/null || stop "apt-get could not install ${packages[*]}: run the line above by hand to see why"
    mapfile -t packages < <("$missing")
    [ "${#packages[@]}" -eq 0 ] || stop "${packages[*]} was installed and its programs are still not found"
}

rust() {
    local needed found
    needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    command -v cargo >/dev/null || stop "no cargo found: install Rust $needed or newer with rustup (https://rustup.rs), then run me again"
    found=$(cargo --version | cut -d ' ' -f 2)
    [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -n 1)" = "$needed" ] ||
        stop "cargo is $found and Cargo.toml needs $needed: run \`rustup update stable\`, then run me again"
    echo "    cargo $found (at least $needed is needed)"
}

has_nvidia_driver() { [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; }

libtorch() {
    local requirements=launch/requirements/libtorch.txt fresh
    if [ "$arguments" = --cuda ] || has_nvidia_driver; then
        requirements=launch/requirements/cuda.txt
        echo "    with CUDA libraries"
    elif is_made_from .deps/torch launch/requirements/cuda.txt; then
        echo "    no NVIDIA driver found, but .deps/torch has the CUDA libraries of a machine that has one: they stay"
        return
    else
        echo "    no NVIDIA driver found: without CUDA libraries"
    fi
    if is_made_from .deps/torch "$requirements"; then
        echo "    .deps/torch is what $requirements asks for"
        return
    fi
    fresh=$(mktemp -d .deps/unfinished.XXXXXX)
    unpack_wheels "$requirements" "$fresh"
    # cudarc opens both by the name without a version first, which the wheels do not have; other versions may lie elsewhere.
    ln -s libnccl.so.2 "$fresh/nvidia/nccl/lib/libnccl.so"
    ln -s libnvrtc.so.13 "$fresh/nvidia/cu13/lib/libnvrtc.so"
    if ldd "$fresh/torch/lib/libtorch_cpu.so" | grep 'not found'; then stop "libtorch does not find the libraries named above"; fi
    sha256sum <"$requirements" >"$fresh/torch/made-from"
    # Compiled against the headers that were there, which cargo does not look at.
    [ ! -d target ] || { cargo clean --quiet -p torch-sys && cargo clean --quiet --release -p torch-sys; }
    rm -rf .deps/torch .deps/nvidia
    mv "$fresh/nvidia" .deps/nvidia
    mv "$fresh/torch" .deps/torch
    rm -r "$fresh"
}

oracle() {
    python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' ||
        stop "the oracle needs Python 3.10 to 3.14, this is $(python3 --version)"
    # NeMo's dependencies are many, and its flow matching imports few of them.
    python_packages launch/requirements/oracle.txt .deps/oracle
}

arguments=$*
case $arguments in
'' | --oracle | --slurm | --cuda) ;;
*) stop "usage: launch/setup.sh [--oracle|--slurm|--cuda]" ;;
esac
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || stop "only Linux on x86_64 is supported so far, this is $(uname -s) on $(uname -m)"

timed "system packages: Open MPI starts the ranks, libclang and pkg-config build its bindings, Python unpacks wheels" system_packages missing_packages
if [ "$*" = --slurm ]; then
    timed "Slurm: launch/test-slurm.sh runs jobs on it" system_packages missing_packages_of_slurm
fi
timed "Rust: compiles everything here" rust
mkdir -p .deps
exec 9>.deps/lock
flock --nonblock 9 || { echo '    waiting for another set-up to end'; flock 9; }
trap 'rm -rf .deps/unfinished.*' EXIT
rm -rf .deps/unfinished.*
timed "libtorch 2.13.0, out of the PyPI wheel: tensors and gradients" libtorch
if [ "$*" = --oracle ]; then
    timed "the oracle: PyTorch and NeMo AutoModel 0.5.0, which tests compare fm-dist with" oracle
fi
