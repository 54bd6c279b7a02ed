# shellcheck shell=bash
# What the scripts of this folder share. Source it: it enters the project's root, puts cargo on PATH and defines
#   timed TEXT COMMAND…     says what is being done and why, does it, says how long it took
#   stop TEXT               ends the script with exit code 52: something is missing that only you can provide
#   mpi_run RANKS PROGRAM…  mpirun with what Open MPI asks for besides, as root or with more ranks than cores; says what it adds
#   unpack_wheels REQUIREMENTS FOLDER   the libraries of pinned wheels, each checked against its hash
#   python_packages REQUIREMENTS FOLDER a virtual environment with pinned packages, each checked against its hash, unless it is there
#   is_made_from FOLDER REQUIREMENTS    true if the folder was made from this very file
#   is_packed               true in a folder that launch/pack-gpu.sh has made, where there is no cargo
#   cluster_environment     exports what ranks on a cluster want from NCCL, UCX and OpenMP

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
command -v cargo >/dev/null || PATH="$HOME/.cargo/bin:$PATH"

timed() {
    local text=$1 begin=$SECONDS
    shift
    echo "==> $text"
    "$@"
    echo "    done in $((SECONDS - begin)) s"
}

stop() {
    echo "$0: $*" >&2
    exit 52
}

# A folder under .deps/ carries the hash of the requirement file that it was made from, and gets its name only when it is complete.
is_made_from() { [ -f "$1/made-from" ] && [ "$(cat "$1/made-from")" = "$(sha256sum <"$2")" ]; }

# Fetches the wheels that a requirement file pins (for Python 3.11 whatever Python is here: only the libraries inside are used),
# each checked against its hash, and unpacks them into one folder.
unpack_wheels() {
    local requirements=$1 folder=$2 wheels platforms=() tag wheel
    wheels=$(mktemp -d .deps/unfinished.XXXXXX)
    for tag in 2_28 2_27 2_25 2_18 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
    python3 -m pip download --no-deps --require-hashes --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 \
        "${platforms[@]}" --platform manylinux2014_x86_64 --no-cache-dir --disable-pip-version-check --progress-bar off --quiet \
        --requirement "$requirements" --dest "$wheels" || stop "pip could not fetch the wheels of $requirements: its message stands above"
    for wheel in "$wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$folder"; done
    rm -r "$wheels"
}

# Every package is pinned, so pip need not look at dependencies.
python_packages() {
    local requirements=$1 folder=$2 fresh
    if is_made_from "$folder" "$requirements"; then
        echo "    $folder is what $requirements asks for"
        return
    fi
    fresh=$(mktemp -d .deps/unfinished.XXXXXX)
    python3 -m venv "$fresh"
    "$fresh/bin/python" -m pip install --no-deps --require-hashes --only-binary=:all: --no-compile --no-cache-dir \
        --disable-pip-version-check --progress-bar off --quiet --requirement "$requirements" ||
        stop "pip could not install $requirements: its message stands above"
    sha256sum <"$requirements" >"$fresh/made-from"
    rm -rf "$folder"
    mv "$fresh" "$folder"
}

is_packed() { [ -f packed ]; }

# Open MPI counts cores, not hardware threads, and only those that this process may use.
num_cores() {
    local allowed cores
    allowed=$(nproc)
    cores=$(lscpu --parse=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l)
    echo $((cores > 0 && cores < allowed ? cores : allowed))
}

mpi_run() {
    local ranks=$1 flags=()
    shift
    if mpirun --version 2>/dev/null | grep 'Open MPI' >/dev/null; then
        if [ "$(id -u)" -eq 0 ]; then
            echo "    as root Open MPI asks for OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1: exported"
            export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        fi
        if [ "$ranks" -gt "$(num_cores)" ]; then
            echo "    with $ranks ranks on $(num_cores) cores Open MPI asks for --oversubscribe: added"
            flags+=(--oversubscribe)
        fi
    fi
    mpirun "${flags[@]}" -n "$ranks" "$@"
}

# What you or the site exported before stays; `srun` and `mpirun` of a job hand all of it on. Nothing here makes a run faster or
# safer on one machine, so only slurm.sbatch calls it.
#
# Left alone, because their own choice is right until a network is odd; export them where it is:
#   NCCL_SOCKET_IFNAME   interfaces that GPUs' ranks meet over: ib*, then any but lo and docker*. =eth0 where ranks wait for one
#                        another at the start because another interface (virbr0, cni0) has an address that leads nowhere.
#   NCCL_IB_HCA          InfiniBand cards: all. =mlx5_0:1,mlx5_1:1 where others serve storage or have no cable.
#   NCCL_IB_TIMEOUT      20: with 7 retries a lost packet fails after 30 s. 22 (2 minutes) on very large networks that fail with
#                        error 12 of ibv_poll_cq; then raise watchdog.step_seconds above it.
#   UCX_NET_DEVICES      devices of MPI between machines: all, the fastest first. mlx5_0:1 or eth0, as NCCL's.
#   UCX_TLS              ways of MPI's bytes: all. tcp,sm,self to find out whether InfiniBand is what fails.
cluster_environment() {
    # NCCL says why it failed, and nothing else. INFO says which interfaces and cards it took: for one run that puzzles you.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # UCX says why it failed, and its warnings at every start stay out of the log. info says which devices it took.
    export UCX_LOG_LEVEL=${UCX_LOG_LEVEL:-error}
    # fm-dist sets the threads of its computation itself, from parallel.num_threads, which outranks this; 1 keeps other libraries
    # from starting one thread a core in every rank. Never change it here.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Threads stay within the cores that the launcher gave their rank, and move among them: pinned, the threads of ranks that
    # share cores would all sit on the first. close, where srun binds each rank to cores of its own (--cpu-bind=cores).
    export OMP_PROC_BIND=${OMP_PROC_BIND:-false}
}
