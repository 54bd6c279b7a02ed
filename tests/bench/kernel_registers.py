#!/usr/bin/env python3
"""Registers, spills and memory of our own GPU kernels, as the assembler counts them. Needs no GPU.

    tests/bench/kernel_registers.py [ARCHITECTURE ...]

Compiles every kernel.cu by the NVRTC of `launch/setup.sh` as the program does, for sm_80, sm_90, sm_100 and sm_120 unless others are named, and
prints a table of what is not alike in all of them: registers of a thread, bytes that spill, bytes of stack. Ends with code 1 if a kernel spills.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / ".deps/nvidia/cu13/lib"
OPERATIONS = ROOT / "src/ops"
OPTIONS = ["--std=c++17", "--fmad=false", "--ptxas-options=-v"]
COUNTS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads|Used (\d+) registers")


def texts() -> dict[str, str]:
    """Name and text of each file of kernels."""
    prelude = (OPERATIONS / "launch/prelude.cu").read_text()
    found = {"adamw": (ROOT / "src/optim/adamw/kernel.cu").read_text()}
    for path in [OPERATIONS / "launch/column_sums.cu", *sorted(OPERATIONS.glob("*/kernel.cu"))]:
        name = path.stem if path.parent.name == "launch" else path.parent.name
        found[name] = prelude + path.read_text()
    return found


def assembled(nvrtc: ctypes.CDLL, text: str, architecture: str) -> str:
    """What the assembler says of a text."""
    program, options = ctypes.c_void_p(), [f"--gpu-architecture={architecture}", *OPTIONS]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    code = nvrtc.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if code != 0:
        sys.exit(f"{architecture}: {log.value.decode()}")
    return log.value.decode()


def counts(log: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and bytes of stack of each kernel."""
    found = {}
    for piece in log.split("Compiling entry function '")[1:]:
        kernel, registers, spilled, stack = piece.split("'")[0], 0, 0, 0
        for match in COUNTS.finditer(piece):
            if match[4]:
                registers = int(match[4])
            else:
                stack, spilled = int(match[1]), int(match[2]) + int(match[3])
        found[kernel] = (registers, spilled, stack)
    return found


def main() -> None:
    architectures = sys.argv[1:] or ["sm_80", "sm_90", "sm_100", "sm_120"]
    ctypes.CDLL(next(LIBRARIES.glob("libnvrtc-builtins.so*")), ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(LIBRARIES / "libnvrtc.so")
    spills = False
    print("| kernel | " + " | ".join(f"{each}: registers, spilled, stack" for each in architectures) + " |")
    print("|" + " --- |" * (1 + len(architectures)))
    for text in texts().values():
        found = [counts(assembled(nvrtc, text, architecture)) for architecture in architectures]
        for kernel in found[0]:
            row = [each[kernel] for each in found]
            spills |= any(spilled for _, spilled, _ in row)
            print(f"| {kernel} | " + " | ".join(", ".join(map(str, each)) for each in row) + " |")
    sys.exit(spills)


if __name__ == "__main__":
    main()
