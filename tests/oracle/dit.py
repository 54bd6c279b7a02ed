"""The demo's transformer in plain PyTorch under NeMo AutoModel's flow matching: one step, its loss and every gradient.

    python dit.py CHECKPOINT.safetensors BATCH.safetensors OUT.safetensors --seed N --dtype float32 --depth 2 --heads 4 --patch 2 [--pipeline JSON]

Needs torch 2.13.0, nemo-automodel 0.5.0 and safetensors. Written from the paper (Peebles & Xie 2023) and the parameter names of
facebookresearch/DiT, independently of the Rust code. OUT has what `fm-dist step --grads` writes, under the same names.
"""

import argparse
import json
import math

import torch
import torch.nn.functional as F
from nemo_automodel.components.flow_matching.adapters import SimpleAdapter
from nemo_automodel.components.flow_matching.pipeline import FlowMatchingPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def sinusoidal(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines, then sines, at `width / 2` frequencies from 1 down to 1/10000."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """One vector a place, row by row: half for the row, half for the column."""
    row, column = (sinusoidal(torch.arange(length), width // 2) for length in (rows, columns))
    return torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=1)


class Block(torch.nn.Module):
    """Attention and feed-forward behind modulation and gates (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attn = torch.nn.ModuleDict({"qkv": torch.nn.Linear(width, 3 * width), "proj": torch.nn.Linear(width, width)})
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(width, hidden), "fc2": torch.nn.Linear(hidden, width)})
        self.adaLN_modulation = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(width, 6 * width))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Multi-head self-attention written out."""
        batch, tokens, width = x.shape
        q, k, v = self.attn["qkv"](x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(width // self.heads)
        return self.attn["proj"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(conditioning)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attend(normalized(x) * (1 + scale1) + shift1)
        hidden = F.gelu(self.mlp["fc1"](normalized(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.mlp["fc2"](hidden)


def normalized(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Dit(torch.nn.Module):
    """Takes what NeMo's SimpleAdapter gives: latents, timesteps on the scale of training, text embeddings."""

    def __init__(self, weights: dict[str, torch.Tensor], depth: int, heads: int, patch: int):
        super().__init__()
        width, features = weights["x_embedder.proj.weight"].shape
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        self.patch, self.channels = patch, features // patch**2
        self.x_embedder = torch.nn.ModuleDict({"proj": torch.nn.Linear(features, width)})
        layers = [torch.nn.Linear(256, width), torch.nn.SiLU(), torch.nn.Linear(width, width)]
        self.t_embedder = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(*layers)})
        self.y_embedder = torch.nn.Linear(weights["y_embedder.weight"].shape[1], width, bias=False)
        self.blocks = torch.nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        modulation = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(width, 2 * width))
        self.final_layer = torch.nn.ModuleDict({"linear": torch.nn.Linear(width, features), "adaLN_modulation": modulation})
        self.load_state_dict(weights, strict=True)

    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_kwargs, return_dict):
        batch, _, height, width = hidden_states.shape
        rows, columns, dtype = height // self.patch, width // self.patch, hidden_states.dtype
        tokens = F.unfold(hidden_states.float(), self.patch, stride=self.patch).transpose(1, 2).to(dtype)
        x = self.x_embedder["proj"](tokens)
        x = x + grid_positions(rows, columns, x.shape[-1]).to(dtype)
        conditioning = self.t_embedder["mlp"](sinusoidal(timestep, 256).to(dtype)) + self.y_embedder(encoder_hidden_states.mean(dim=1))
        for block in self.blocks:
            x = block(x, conditioning)
        shift, scale = self.final_layer["adaLN_modulation"](conditioning)[:, None].chunk(2, dim=-1)
        tokens = self.final_layer["linear"](normalized(x) * (1 + scale) + shift)
        folded = F.fold(tokens.transpose(1, 2).float(), (height, width), self.patch, stride=self.patch)
        return (folded.to(dtype),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("batch")
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    for name in ["--depth", "--heads", "--patch"]:
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--pipeline", type=json.loads, default={}, help="constructor arguments of FlowMatchingPipeline")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    model = Dit(load_file(arguments.checkpoint), arguments.depth, arguments.heads, arguments.patch).to(dtype)
    batch = dict(load_file(arguments.batch))
    with safe_open(arguments.batch, "pt") as file:
        batch["data_type"] = file.metadata()["data_type"]
    pipeline = FlowMatchingPipeline(SimpleAdapter(), device=torch.device("cpu"), **arguments.pipeline)
    torch.manual_seed(arguments.seed)
    weighted, average, _, metrics = pipeline.step(model, batch, torch.device("cpu"), dtype, 1, check_loss=False)
    average.backward()
    tensors = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    tensors |= {"weighted_loss": weighted.detach(), "average_weighted_loss": average.detach()}
    tensors["average_unweighted_loss"] = torch.tensor(metrics["unweighted_loss"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.out)


if __name__ == "__main__":
    main()
