# shellcheck shell=bash
# What the scripts of this folder share. Source it: it enters the project's root, puts cargo on PATH and defines
#   timed TEXT COMMAND…     says what is being done and why, does it, says how long it took
#   stop TEXT               ends the script with exit code 52: something is missing that only you can provide
#   mpi_run RANKS PROGRAM…  mpirun with what Open MPI asks for besides, as root or with more ranks than cores; says what it adds

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
