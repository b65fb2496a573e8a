"""A model that is not a language model, for the library's tests: convolutions, buffers, a tie, a view, an alias."""

from __future__ import annotations

import torch
from torch import nn

from weightwire.identity.identity import Identity, module_identity


class Encoder(nn.Module):
    """Convolution, norm with running statistics, two tied heads, a projection seen through a view, and a None bias."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 640, bias=True)
        self.big = nn.Linear(1024, 1100, bias=False)
        self.tied = nn.Linear(width, 640, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            assert isinstance(self.norm.running_mean, torch.Tensor)
            self.norm.running_mean.copy_(torch.randn(width, generator=generator))
        self.tied.weight = self.head.weight
        self.window = self.big.weight.detach()[:550]
        self.register_buffer("steps", torch.arange(7) * seed)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(batch, 3, h, w) -> (batch, 640)."""
        features = self.norm(self.conv(image)).mean(dim=(2, 3))
        scores: torch.Tensor = self.head(features) + self.tied(features) + self.window.sum()
        return scores


def identity(revision: str | None = "r1", **fields: object) -> Identity:
    return module_identity("tests/encoder", "Encoder", "float32", {"width": 8}, revision=revision, **fields)
