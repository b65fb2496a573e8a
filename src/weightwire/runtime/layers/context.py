"""What the layers of one rank's model share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weightwire.runtime.config import KernelLayout
from weightwire.runtime.distributed import TpGroup
from weightwire.runtime.mapping import TpCoordinates


@dataclass(frozen=True)
class LayerContext:
    """The rank's group, the dtype of its parameters and computation, and the kernel layout asked for."""

    group: TpGroup
    dtype: torch.dtype
    layout: KernelLayout = KernelLayout.PLAIN

    @property
    def tp(self) -> TpCoordinates:
        """By which this rank's parameters are shaped."""
        return self.group.coordinates
