#!/usr/bin/env bash
# Packs fm-dist for a GPU machine that has no network and no Rust, only Python with PyTorch for CUDA: the program, the tests, Open MPI,
# NeMo AutoModel and diffusers, and the scripts that use them.
#
#   launch/pack-gpu.sh [FOLDER [TORCH]]        into FOLDER (.gpu), for PyTorch of version TORCH (2.11.0) there
#   launch/pack-gpu.sh --check [TORCH]         nothing but: does the code still move to that version by the lines below?
#
# Carry the folder there, and run `bash FOLDER/launch/test-gpu.sh [PART…]`. It holds some 40 MB.
#
# Builds a copy of this checkout below the system's temporary folder, moved to that version of libtorch by the lines below; the first
# time takes 5 minutes on 2 cores, later ones build what has changed. A line of them that no longer fits the code stops the packing.
# Needs what launch/setup.sh needs, and Debian's or Ubuntu's Open MPI.
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"

# What mpirun and libmpi need at run time.
MPI_PACKAGES=(openmpi-bin openmpi-common libopenmpi3 libopenmpi40 libpmix2 libevent-core-2.1-7 libevent-pthreads-2.1-7 libhwloc15 libhwloc-plugins
    libucx0 libfabric1 libnl-3-200 libnl-route-3-200 librdmacm1 libibverbs1 libpsm-infinipath1 libpsm2-2 libmunge2 libnuma1 libltdl7)
# The peer: all that it imports and PyTorch's image for a GPU usually lacks.
PEER=(nemo-automodel diffusers importlib-metadata)

# Replaces lines that another version of PyTorch asks for. WHY PATTERN EXPRESSION FILE…: sed's expression, after which no line
# of the files matches the pattern any more.
substitute() {
    local why=$1 pattern=$2 expression=$3 files
    shift 3
    mapfile -t files < <(grep -lE -- "$pattern" "$@" || true)
    [ "${#files[@]}" -gt 0 ] || stop "the substitution for $why no longer fits: nothing matches $pattern"
    sed -E -i -- "$expression" "${files[@]}"
    if grep -nE -- "$pattern" "${files[@]}"; then stop "the substitution for $why left the lines above as they were"; fi
}

# Moves the copy in the current folder from the libtorch of this checkout to the given version.
move_to_torch() {
    local version=$1 ours sources nodes
    ours=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' launch/requirements/libtorch.txt)
    [ "$version" != "$ours" ] || return 0
    mapfile -t sources < <(find src -name '*.rs')
    mapfile -t nodes < <(find src -name '*.cpp')
    case $version in
        2.11.0)
            substitute "the bindings tch of libtorch 2.11" '^tch = "0\.26"' 's/^tch = "0\.26"/tch = "0.24"/' Cargo.toml
            substitute "the bindings torch-sys of libtorch 2.11" '^torch-sys = "0\.26"' 's/^torch-sys = "0\.26"/torch-sys = "0.24"/' Cargo.toml
            substitute "the headers of NCCL 2.28" 'nccl-02029' 's/nccl-02029/nccl-02028/' Cargo.toml
            substitute "fields that NCCL 2.28's configuration has not" '(graphUsageMode|numRmaCtx): ' '/(graphUsageMode|numRmaCtx): /d' "${sources[@]}"
            substitute "nodes of the graph, which libtorch 2.11 holds by shared_ptr" 'c10::make_intrusive<' \
                's/c10::intrusive_ptr<torch::autograd::Node> (\w+) = c10::make_intrusive<(\w+)>\((.*)\);/std::shared_ptr<torch::autograd::Node> \1(new \2(\3), torch::autograd::deleteNode);/' \
                "${nodes[@]}"
            ;;
        *) stop "PyTorch $version is not known here: this checkout is made for $ours, and launch/pack-gpu.sh moves it to 2.11.0" ;;
    esac
}

# Puts the checkout into a folder, without what is built and fetched.
copy_checkout() {
    tar -c --exclude=./.git --exclude=./target --exclude=./.deps --exclude=./runs --exclude="./${2#"$PWD/"}" . | tar -x -C "$1"
}

# Files of one folder in place of those of another, but for what was built and fetched there. Only files whose content differs are
# written: cargo builds again what is newer than its last build, and a checkout's files can be older than a build without them.
take_over() {
    local fresh=$1 build=$2 file
    mkdir -p "$build"
    (cd "$build" && find . \( -path ./target -o -path ./.deps \) -prune -o -type f -print0) | while IFS= read -r -d '' file; do
        [ -e "$fresh/$file" ] || rm "$build/$file"
    done
    (cd "$fresh" && find . -type f -print0) | while IFS= read -r -d '' file; do
        cmp -s "$fresh/$file" "$build/$file" && continue
        mkdir -p "$build/$(dirname "$file")"
        cp "$fresh/$file" "$build/$file"
    done
}

fetch_libtorch() {
    local version=$1 requirements=launch/requirements/libtorch-$1.txt fresh
    [ -f "$requirements" ] || requirements=launch/requirements/libtorch.txt
    grep -q "^torch==$version " "$requirements" || stop "no launch/requirements/libtorch-$version.txt pins the wheels of PyTorch $version"
    mkdir -p .deps
    if is_made_from .deps/torch "$requirements"; then return; fi
    fresh=$(mktemp -d .deps/unfinished.XXXXXX)
    unpack_wheels "$requirements" "$fresh"
    sha256sum <"$requirements" >"$fresh/torch/made-from"
    rm -rf .deps/torch .deps/nvidia
    mv "$fresh/nvidia" .deps/nvidia
    mv "$fresh/torch" .deps/torch
    rm -r "$fresh"
}

# The lines of a requirement file that pin one package.
pinned() { sed -n "/^$1==/,/[^\\\\]\$/p" launch/requirements/oracle.txt; }

fetch_peer() {
    local folder=$1 package requirements
    requirements=$(mktemp)
    for package in "${PEER[@]}"; do pinned "$package"; done >"$requirements"
    [ "$(grep -c '==' "$requirements")" -eq "${#PEER[@]}" ] || stop "launch/requirements/oracle.txt does not pin all of ${PEER[*]}"
    python3 -m pip download --quiet --no-deps --require-hashes --only-binary=:all: --disable-pip-version-check \
        --requirement "$requirements" --dest "$folder" || stop "pip could not fetch the peer's wheels"
    rm "$requirements"
}

# Files of the packages, and the libraries that their programs and libraries are linked with, but for those of any system.
mpi_files() {
    local list
    # Later releases of Debian and Ubuntu have the second name.
    list=$(for package in "${MPI_PACKAGES[@]}"; do
        { dpkg -L "$package" || dpkg -L "${package}t64"; } 2>/dev/null | grep -v '/share/doc\|/share/man\|lintian' || true
    done)
    {
        printf '%s\n' "$list" /etc/alternatives/mpirun /usr/bin/mpirun
        printf '%s\n' "$list" | grep '\.so\|/bin/' | while read -r file; do
            # Scripts among them are no dynamic executables.
            if [ -f "$file" ]; then { ldd "$file" 2>/dev/null || true; } | awk '/=> \//{print $3}'; fi
        done
    } | sort -u | while read -r file; do printf '%s\n' "$file" "$(readlink -f "$file")"; done |
        sed 's#^/lib/#/usr/lib/#; s#^/##' | sort -u |
        grep -Ev '^$|icudata|/(libc|libm|libdl|libpthread|librt|libgcc_s|libstdc\+\+|libutil|libresolv)\.so' |
        while read -r file; do if [ -L "/$file" ] || [ -f "/$file" ]; then echo "$file"; fi; done
}

pack_mpi() {
    local archive=$1 files needed
    files=$(mktemp)
    mpi_files >"$files"
    for needed in mpirun 'libmpi\.so\.' mca_btl_; do
        grep -q "$needed" "$files" ||
            stop "found nothing like $needed in Debian's or Ubuntu's Open MPI, which launch/setup.sh installs: is it in a package unknown here?"
    done
    tar -czf "$archive" -C / --no-recursion --files-from "$files"
    rm "$files"
}

build_copy() {
    local told
    export LIBTORCH=$PWD/.deps/torch
    cargo build --quiet --release
    told=$(cargo test --release --test tests --no-run 2>&1) || {
        echo "$told" >&2
        stop "the tests do not compile for PyTorch $version: cargo's messages stand above"
    }
    sed -n 's/.*Executable .*(\(.*\))$/\1/p' <<<"$told" >"$1"
    [ -s "$1" ] || stop "cargo named no test program: $told"
}

if [ "$#" -gt 2 ] || [[ "${1:-}" = -* && "$1" != --check ]]; then stop "usage: launch/pack-gpu.sh [FOLDER|--check [TORCH]]"; fi
checkout=$PWD
folder=$(realpath --canonicalize-missing -- "${1:-.gpu}")
version=${2:-2.11.0}
# It is deleted for the new one.
[ ! -e "$folder" ] || [ -f "$folder/packed" ] || stop "$folder is there, and is no pack of an earlier call: name a new folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ "${1:-}" = --check ]; then
    cp -r Cargo.toml src launch "$scratch/"
    cd "$scratch"
    move_to_torch "$version"
    echo "the code moves to PyTorch $version"
    exit
fi
build=${TMPDIR:-/tmp}/fm-dist-gpu-$version
commit=$(git describe --always --dirty --exclude '*' 2>/dev/null || echo "no commit")

copy_checkout "$scratch" "$folder"
cd "$scratch"
move_to_torch "$version"
timed "copy of the checkout at $build" take_over "$scratch" "$build"
cd "$build"
timed "libtorch $version" fetch_libtorch "$version"
timed "build, optimized: program and tests" build_copy "$build/target/test-program"

rm -rf "$folder"
mkdir -p "$folder/target/release" "$folder/wheels" "$folder/tests"
# First, so that the next call may replace a pack that was interrupted.
printf "torch='%s'\nbuild='%s'\ncommit='%s'\n" "$version" "$build" "$commit" >"$folder/packed"
strip -o "$folder/target/release/fm-dist" target/release/fm-dist
strip -o "$folder/target/release/tests" "$(cat target/test-program)"
cp -r "$checkout/launch" "$checkout/configs" "$folder/"
cp -r "$checkout/tests/bench" "$checkout/tests/oracle" "$folder/tests/"
find "$folder" -name __pycache__ -prune -exec rm -rf {} +
timed "NeMo AutoModel and diffusers" fetch_peer "$folder/wheels"
timed "Open MPI" pack_mpi "$folder/openmpi.tgz"
du -sh "$folder"
echo "carry $folder to the GPU machine, and run there: bash $(basename "$folder")/launch/test-gpu.sh [PART…]"
