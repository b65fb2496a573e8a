"""Per-rank checkpoint files in Hugging Face's names, as another engine would write them, and a loader that reads them.

Cut by rules of their own, name by name, that know nothing of the runtime's layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from weightwire.runtime import LoadRequest, SafetensorsLoader, Weights

Tensors = dict[str, torch.Tensor]

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_b_proj", "kv_b_proj")
BY_COLUMNS = ("o_proj", "down_proj")
UNCUT = ("weight_scale_2", "input_scale")


def rank_tensors(config: dict[str, Any], tensors: Tensors, tp: int, rank: int, ep: int = 1) -> Tensors:
    """What rank ``rank`` of ``tp`` has of a checkpoint: its part of each tensor, and its own experts alone."""
    numbers = {name: int(name.split(".experts.")[1].split(".")[0]) for name in tensors if ".experts." in name}
    each = (1 + max(numbers.values(), default=0)) // ep
    found = {}
    for name, tensor in tensors.items():
        if name not in numbers:
            found[name] = _part(config, name, tensor, tp, rank).contiguous()
        elif numbers[name] // each == rank % ep or name.endswith(".input_scale"):  # the largest of all experts counts
            found[name] = _part(config, name, tensor, tp // ep, rank // ep).contiguous()
    return found


def _part(config: dict[str, Any], name: str, tensor: torch.Tensor, size: int, at: int) -> torch.Tensor:
    module, leaf = name.split(".")[-2:]
    if module in ("embed_tokens", "lm_head"):
        rows = -(-tensor.shape[0] // size)
        padded = torch.cat([tensor, tensor.new_zeros(rows * size - tensor.shape[0], tensor.shape[1])])
        return padded[at * rows : (at + 1) * rows]
    by_row = leaf == "bias" or (leaf == "weight_scale" and tensor.shape[-1:] == (1,))
    if leaf in UNCUT or not tensor.dim():
        return tensor
    if module in BY_ROWS and leaf != "pre_quant_scale":
        heads = config["num_key_value_heads"]
        repeated = module in ("k_proj", "v_proj") and heads < size  # each head on several ranks
        return _cut(tensor, 0, heads, at * heads // size) if repeated else _cut(tensor, 0, size, at)
    return _cut(tensor, tensor.dim() - 1, size, at) if module in BY_COLUMNS and not by_row else tensor


def _cut(tensor: torch.Tensor, dim: int, size: int, at: int) -> torch.Tensor:
    width = -(-tensor.shape[dim] // size)
    return tensor.narrow(dim, min(at * width, tensor.shape[dim]), max(0, min(width, tensor.shape[dim] - at * width)))


def write_ranks(checkpoint: Path, target: Path, tp: int, ep: int = 1) -> Path:
    """A directory with a config and one file for each rank."""
    target.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(checkpoint / "model.safetensors")
    for rank in range(tp):
        save_file(rank_tensors(config, tensors, tp, rank, ep), target / f"rank{rank}.safetensors")
    return target


class RankFiles(SafetensorsLoader):
    """A checkpoint loader that returns what its own rank's file holds; ``presharded`` is what it says of it."""

    def __init__(self, *, presharded: bool = True) -> None:
        super().__init__()
        self.presharded = presharded

    def load_weights(self, request: LoadRequest) -> Weights:
        path = request.checkpoint_dir / f"rank{request.mapping.tp_rank}.safetensors"
        return Weights.of(load_file(path), presharded=self.presharded)
