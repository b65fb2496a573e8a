"""Programs that start together: one reads the file, the others take it from that one, also while it is reading.

Start a metadata server (``weightwire serve --port 8470``), then, in as many terminals as you like:

    python examples/start_together.py 127.0.0.1:8470 /tmp/weights.safetensors

Each says where it got its weights, and prints the same checksum. The file is made if it is not there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import weightwire


def build() -> nn.Module:
    """All programs build it from the same code."""
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16)))


def main(url: str, where: str) -> None:
    """Take the weights from whoever has them, else read the file; serve them until Enter is pressed."""
    if not Path(where).exists():
        save_file(build().state_dict(), f"{where}.{os.getpid()}")
        Path(f"{where}.{os.getpid()}").replace(where)  # whole, whoever else makes it just now
    model = build()
    identity = weightwire.module_identity("examples/tower", "Sequential", "float32", {"layers": 16}, revision="1")

    def read(disk: weightwire.Filling) -> None:
        with safe_open(where, "pt") as file, torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(name))
                disk.final([name])  # nothing writes it again: others may have it

    with weightwire.relay(model, identity, url=url, disk=read) as published:
        assert published.received is not None
        total = sum(parameter.double().sum().item() for parameter in model.parameters())
        print(f"weights from: {published.received.source}, checksum {total:.10f}; Enter ends it", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
