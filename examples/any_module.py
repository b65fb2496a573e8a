"""Any ``nn.Module``, one rank: one process publishes its weights, another receives them.

Start a metadata server (``weightwire serve --port 8470``), then, in two terminals:

    python examples/any_module.py publish 127.0.0.1:8470
    python examples/any_module.py receive 127.0.0.1:8470

Both print the same checksum of the model's output.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import weightwire


def build() -> nn.Module:
    """An image classifier; both sides build it from the same code."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(4096, 1000)
    ).eval()


def checksum(model: nn.Module) -> str:
    """Ten digits of the output for a fixed image."""
    with torch.no_grad():
        image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
        return f"{model(image).double().abs().sum().item():.10f}"


def main(role: str, url: str) -> None:
    """Publish until Enter is pressed, or receive once."""
    # What makes two copies interchangeable: name, class, dtype, config, and which weights (the revision).
    identity = weightwire.module_identity(
        "examples/classifier", "Sequential", "float32", {"classes": 1000}, revision="1"
    )
    model = build()
    if role == "publish":
        with weightwire.publish(model, identity, url=url) as published:
            print(f"serving {published.report.nbytes:,} bytes, checksum {checksum(model)}; Enter ends it", flush=True)
            sys.stdin.readline()
    else:
        report = weightwire.receive(model, identity, url=url)
        print(
            f"received {report.nbytes:,} bytes over {', '.join(report.paths)}, every byte verified: {report.verified}"
        )
        print(f"checksum {checksum(model)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
