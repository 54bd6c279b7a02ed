"""Pickles as people have them: what torch.save made of a dictionary with texts, tuples and further dictionaries beside its tensors.

    python pickles.py FOLDER

Writes cache.pt and cache.meta in today's format, legacy.pt in the one before, bare.pt, which is one tensor, and kinds.pt with a tensor of
each kind, the same as kinds.safetensors, and eights.pt with floats of 8 bits, whose bytes are those of eights.safetensors. Needs torch 2.13.0 and safetensors 0.8.0.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

folder = Path(sys.argv[1])
row = torch.arange(6.0)
cache = {
    "latent": row.view(1, 2, 3).to(torch.float16),
    "turned": row.view(2, 3).t(),
    "view": row[2:4],
    "learned": torch.nn.Parameter(torch.ones(2)),
    "prompt": "a cat",
    "crop_offset": (0, 8),
    "nothing": None,
    "by place": {"first/second": torch.ones(1), "list": [torch.zeros(1), "text", (torch.full((1,), 2.0),)]},
}
torch.save(cache, folder / "cache.pt")
torch.save(cache, folder / "cache.meta")
torch.save(cache, folder / "legacy.pt", _use_new_zipfile_serialization=False)
torch.save(row, folder / "bare.pt")
kinds = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
of_each = {str(kind).removeprefix("torch."): row.view(3, 2).t().to(kind)[:, 1:] for kind in kinds}
torch.save(of_each, folder / "kinds.pt")
save_file({name: tensor.contiguous() for name, tensor in of_each.items()}, folder / "kinds.safetensors")
eights = {str(kind).removeprefix("torch."): row.view(3, 2).t().to(kind)[:, 1:] for kind in (torch.float8_e4m3fn, torch.float8_e5m2)}
torch.save(eights, folder / "eights.pt")
save_file({name: tensor.contiguous().view(torch.uint8) for name, tensor in eights.items()}, folder / "eights.safetensors")
