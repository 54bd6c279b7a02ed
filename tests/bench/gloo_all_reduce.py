"""The other side of `all_reduce.sh`: how long gloo's all-reduce of f32 takes between the ranks of `torchrun`.

`gloo_all_reduce.py BYTES REPEATS` prints one line of seconds, one number a repeat.
"""

import sys
import time

import torch
import torch.distributed as dist

num_bytes, repeats = map(int, sys.argv[1:])
torch.set_num_threads(1)
dist.init_process_group("gloo")
buffer = torch.zeros(num_bytes // 4)


def seconds() -> float:
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(buffer)
    return time.perf_counter() - began


seconds()  # A rehearsal.
measured = [seconds() for _ in range(repeats)]
if dist.get_rank() == 0:
    print("gloo", *(f"{each:.9f}" for each in measured))
dist.destroy_process_group()
