# shellcheck shell=bash
# A folder that launch/pack-gpu.sh has made, on the machine that it was made for. Source it after launch/env.sh:
#   unpack      puts PyTorch, Open MPI and the peer where the packed programs look for them; what is there already stays

# Folder of the packages of this machine's python3.
site_packages() { python3 -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))'; }

# The programs know PyTorch's libraries by the path at which they were built, and NCCL and NVRTC by names without a version.
link_libraries() {
    local build=$1 site=$2
    if [ -e "$build" ] && [ ! -L "$build" ]; then
        stop "$build is where this pack was built: here, use launch/test-gpu.sh of the checkout, or move that folder away"
    fi
    ln -sfn "$PWD" "$build"
    mkdir -p .deps/links
    ln -sfn "$site/torch" .deps/torch
    ln -sfn "$site/nvidia" .deps/nvidia
    ln -sf "$site/nvidia/nccl/lib/libnccl.so.2" .deps/links/libnccl.so
    ln -sf "$site"/nvidia/cu13/lib/libnvrtc.so.13 .deps/links/libnvrtc.so
}

unpack_mpi() {
    if command -v mpirun >/dev/null; then return; fi
    [ "$(id -u)" -eq 0 ] || stop "this machine has no mpirun, and only root can unpack the packed Open MPI below /usr"
    tar -xzf openmpi.tgz -C / --skip-old-files --keep-directory-symlink
    ldconfig
}

# The peer on this machine's PyTorch, under the name that it has in a checkout.
unpack_peer() {
    [ -x .deps/oracle/bin/python ] && return
    rm -rf .deps/site
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --root-user-action ignore --target .deps/site wheels/*.whl || stop "pip could not unpack the peer's wheels"
    mkdir -p .deps/oracle/bin
    printf '#!/bin/sh\nPYTHONPATH="%s" exec python3 "$@"\n' "$PWD/.deps/site" >.deps/oracle/bin/python
    chmod +x .deps/oracle/bin/python
}

unpack() {
    local build torch commit found
    # shellcheck source=/dev/null
    . ./packed
    found=$(python3 -c 'import torch; print(torch.__version__.split("+")[0])') || stop "python3 has no PyTorch here"
    [ "$found" = "$torch" ] || stop "packed for PyTorch $torch, this machine's is $found: run launch/pack-gpu.sh FOLDER $found in the checkout"
    echo "    packed at ${commit:?} for PyTorch $torch"
    link_libraries "${build:?}" "$(site_packages)"
    unpack_mpi
    unpack_peer
}
