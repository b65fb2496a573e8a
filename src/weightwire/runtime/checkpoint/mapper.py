"""From a model's layers to checkpoint names, and the check that both sides name the same tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weightwire.errors import CheckpointError
from weightwire.runtime.checkpoint.protocol import TensorSource
from weightwire.runtime.layers.shards import Loadable, Part, Spread, TakesMore, part_names

# tensors that some checkpoints carry and no model needs
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class LoadTarget:
    """One layer, under its construction-time name, and the checkpoint modules that it is made of.

    ``elsewhere``: further modules of the checkpoint's layer, which other ranks hold, and ``wanted`` what this one needs
    of them all the same.
    """

    name: str
    layer: Loadable
    prefixes: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()

    def others_names(self) -> list[str]:
        """Every checkpoint tensor of the layer that other ranks need or may take."""
        leaves = (*self.layer.checkpoint_tensors(), *self.optional)
        return [f"{prefix}.{leaf}" for prefix in self.elsewhere for leaf in leaves]

    def tensor_names(self) -> list[str]:
        """Every checkpoint tensor that the layer needs."""
        leaves = self.layer.checkpoint_tensors()
        mine = [f"{prefix}.{leaf}" for prefix in self.prefixes for leaf in leaves]
        return mine + [f"{prefix}.{leaf}" for prefix in self.elsewhere for leaf in self.wanted if leaf in leaves]

    @property
    def optional(self) -> tuple[str, ...]:
        """Leaf names that each part may have."""
        return self.layer.optional_tensors() if isinstance(self.layer, TakesMore) else ()

    def optional_names(self) -> list[str]:
        """Every checkpoint tensor that the layer takes where there is one."""
        return [f"{prefix}.{leaf}" for prefix in self.prefixes for leaf in self.optional]


class HfWeightMapper:
    """Hugging Face names for the layers of a decoder.

    Args:
        optional: names that the checkpoint may have and this model does not use (``lm_head.weight`` of a tied one).
        unused: beginnings of such names (layers for multi-token prediction).
    """

    def __init__(self, optional: Iterable[str] = (), unused: tuple[str, ...] = ()) -> None:
        self._optional = frozenset(optional)
        self._unused = unused

    def targets(self, layers: Iterable[tuple[str, Loadable]]) -> list[LoadTarget]:
        """A target for every layer; fused layers get several prefixes, experts one each."""
        return [
            LoadTarget(
                name,
                layer,
                layer.checkpoint_prefixes(name),
                layer.checkpoint_elsewhere(name),
                layer.tensors_elsewhere(),
            )
            if isinstance(layer, Spread)
            else LoadTarget(name, layer, part_names(name))
            for name, layer in layers
        ]

    def check_names(self, targets: Iterable[LoadTarget], tensors: Mapping[str, TensorSource]) -> None:
        """Refuse, before the first byte, a checkpoint that lacks a tensor or has one that nobody takes.

        Raises:
            CheckpointError: naming the first tensor and counting the rest.
        """
        targets = list(targets)
        needed = {name for target in targets for name in target.tensor_names()}
        others = {name for target in targets for name in target.others_names()}
        optional = {name for target in targets for name in target.optional_names()} | self._optional
        missing = sorted(needed - set(tensors))
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks tensor {missing[0]}{_and_more(missing)}",
                "use a checkpoint that belongs to its config.json",
            )
        extra = sorted(set(tensors) - needed - others - optional)
        extra = [name for name in extra if not name.startswith(self._unused)]
        left_over = [name for name in extra if not name.endswith(_IGNORED_SUFFIXES)]
        if left_over:
            origin = tensors[left_over[0]].origin
            raise CheckpointError(
                f"{origin}: tensor {left_over[0]}{_and_more(left_over)} has no place in the model",
                "use a checkpoint that belongs to its config.json",
            )

    @staticmethod
    def parts(target: LoadTarget, tensors: Mapping[str, TensorSource]) -> list[Part]:
        """The tensors of one target, one mapping of leaf names for each prefix; then those wanted from elsewhere."""
        required, more = target.layer.checkpoint_tensors(), target.optional

        def part(prefix: str, leaves: Iterable[str]) -> Part:
            there = (leaf for leaf in leaves if leaf in required or f"{prefix}.{leaf}" in tensors)
            return {leaf: tensors[f"{prefix}.{leaf}"] for leaf in there}

        mine = [part(prefix, (*required, *more)) for prefix in target.prefixes]
        return mine + [part(prefix, target.wanted) for prefix in target.elsewhere if target.wanted]


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
