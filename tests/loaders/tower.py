"""A module of several leaves, its file, and how a program of its own reads that: tensor by tensor, in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import weightwire

LAYERS = 8
IDENTITY = weightwire.module_identity("tests/tower", "Tower", "float32", revision="r1")


class Tower(nn.Module):
    """4 MiB a layer; nothing in it means anything."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(LAYERS))
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))


def write(path: Path, seed: int = 1) -> Path:
    """A file of weights that differ everywhere."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in Tower().state_dict().items()}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path)
    return path


def read(path: Path, module: Tower, disk: weightwire.Filling, between: Callable[[int], None]) -> None:
    """Layer after layer; ``between(n)`` once ``n`` of them are final."""
    with safe_open(path, "pt") as file, torch.no_grad():
        for at in range(LAYERS):
            names = [f"layers.{at}.{kind}" for kind in ("weight", "bias")]
            for name in names:
                module.get_parameter(name).copy_(file.get_tensor(name))
            disk.final(names)
            between(at + 1)


def digest(module: nn.Module) -> str:
    """Of all bytes."""
    found = hashlib.sha256()
    for tensor in module.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
