"""What the layers of one rank's model share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weightwire.runtime.config import KernelLayout
from weightwire.runtime.distributed import TpGroup
from weightwire.runtime.mapping import Mapping, TpCoordinates

if TYPE_CHECKING:
    from weightwire.runtime.layers.latent import HeadsMethod, KeyValueMethod
    from weightwire.runtime.layers.linear import LinearMethod
    from weightwire.runtime.layers.method import WeightMethod
    from weightwire.runtime.layers.moe import MoeMethod


class Methods(Protocol):
    """What a checkpoint is quantized with: for each layer a method of its own, ``None`` where it leaves the layer out.

    A layer names the checkpoint modules that it is made of. Each raises ``ConfigError`` where layers of that kind are
    not computed with it, or some of the modules are left out and some are not.
    """

    def linear(self, parts: Sequence[str]) -> LinearMethod | None:
        """Of a linear layer."""

    def experts(self, parts: Sequence[str]) -> MoeMethod | None:
        """Of all routed experts of a layer."""

    def key_values(self, part: str) -> KeyValueMethod | None:
        """Of latent attention's ``kv_b_proj``."""

    def heads(self, part: str) -> HeadsMethod | None:
        """Of what is made of that."""

    def kinds(self, *, experts: bool, latent: bool, partly: bool) -> list[WeightMethod[Any]]:
        """One of each that layers have, in a model with or without experts and latent attention.

        ``partly``: layers are left out that could be quantized.
        """


@dataclass(frozen=True)
class LayerContext:
    """The rank's group, the dtype of its parameters and computation, the kernel layout asked for, and its place.

    ``path`` is where in the model the layer is that is constructed with it, as the model's modules are named.
    ``placement`` is the rank's whole mapping; ``None`` where ranks are parallel in tensors only.
    ``methods`` makes what the checkpoint is quantized with; ``None`` where it is not.
    ``pipeline`` is the stages; ``None`` where there is one. ``experts_group`` is who shares the routed experts where
    nothing else is shared (attention data-parallel); ``None`` where everything is cut by ``group``.
    """

    group: TpGroup
    dtype: torch.dtype
    layout: KernelLayout = KernelLayout.PLAIN
    placement: Mapping | None = None
    methods: Methods | None = None
    pipeline: TpGroup | None = None
    experts_group: TpGroup | None = None
    path: str = ""

    @classmethod
    def of(
        cls, ranks: TpGroup, mapping: Mapping, dtype: torch.dtype, layout: KernelLayout = KernelLayout.PLAIN
    ) -> LayerContext:
        """That of a rank at ``mapping`` among all ``ranks`` of its replica; all of them call it.

        Raises:
            RankLost: another rank did not come.
        """
        tp = ranks.part(f"tp{mapping.tp_size}/{mapping.pp_rank}", mapping.tp)
        pipeline = ranks.part(f"pp{mapping.pp_size}/{mapping.tp_rank}", mapping.pp) if mapping.pp_size > 1 else None
        if not mapping.attention_dp:
            return cls(tp, dtype, layout, mapping, pipeline=pipeline)
        return cls(TpGroup.single(), dtype, layout, mapping, pipeline=pipeline, experts_group=tp)

    def within(self, name: str) -> LayerContext:
        """The same for what is called ``name`` there."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    @property
    def experts(self) -> LayerContext:
        """The same for routed experts."""
        return self if self.experts_group is None else replace(self, group=self.experts_group, experts_group=None)

    @property
    def mapping(self) -> Mapping:
        """The rank's coordinates along every axis."""
        return self.placement or Mapping.for_tp(self.tp.rank, self.tp.size)

    @property
    def tp(self) -> TpCoordinates:
        """By which this rank's parameters are shaped."""
        return self.group.coordinates
