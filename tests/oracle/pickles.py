"""Pickles as people have them: what torch.save made of a dictionary with texts, tuples and further dictionaries beside its tensors.

    python pickles.py FOLDER

Writes cache.pt and cache.meta in today's format, legacy.pt in the one before, and bare.pt, which is one tensor. Needs torch 2.13.0.
"""

import sys
from pathlib import Path

import torch

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
