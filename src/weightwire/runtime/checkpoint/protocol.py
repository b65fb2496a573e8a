"""The contract between the model loader and whatever brings the bytes: a disk, or anything else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

from weightwire.errors import CheckpointError
from weightwire.runtime.config import BuildFacts, ModelConfig
from weightwire.runtime.mapping import Mapping as RankMapping

Progress = Callable[[int, int], None]
"""``progress(bytes_done, bytes_total)`` for this rank's shard; called in order, the last time with both equal."""


Final = Callable[[Collection[str]], None]
"""``final(names)``: these parameters, by construction-time name, were written in full and are not written again in
this load. Called on the loading thread, at most once for each name; a loader that cannot know never names one."""


class TensorSource(Protocol):
    """One tensor that can be read in slices, so that a rank never reads what it does not hold."""

    @property
    def name(self) -> str:
        """Name in the checkpoint."""

    @property
    def origin(self) -> str:
        """Where it is read from, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """The slice ``start:stop`` of dimension ``dim``, all of the others. ``CheckpointError`` where it cannot.

        A tensor without dimensions is read whole.
        """


@dataclass(frozen=True)
class MemorySource:
    """A tensor in memory as a ``TensorSource``."""

    name: str
    tensor: torch.Tensor
    origin: str = "memory"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.tensor.shape)

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """A view of the slice; all of a tensor without dimensions."""
        return self.tensor.narrow(dim, start, stop - start) if self.shape else self.tensor


@dataclass(frozen=True)
class Weights:
    """Tensors by checkpoint name, for the model to cut and copy.

    ``presharded``: they hold one rank's part already and are copied whole, vocabulary padding included.

    Raises:
        CheckpointError: there is no tensor. An empty dict never means "done"; ``Injected`` says that.
    """

    tensors: Mapping[str, TensorSource]
    presharded: bool = False

    def __post_init__(self) -> None:
        if not self.tensors:
            raise CheckpointError("the checkpoint holds no tensors", "give a checkpoint with weights")

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], *, presharded: bool = False) -> Weights:
        """Weights from tensors in memory."""
        sources: dict[str, TensorSource] = {name: MemorySource(name, tensor) for name, tensor in tensors.items()}
        return cls(sources, presharded)


Stage = Literal["LOADED", "PROCESSED"]


@dataclass(frozen=True)
class Injected:
    """The weights are complete and in place in the live model: every tensor of the named stage, verified.

    ``report`` is the loader's own account of it and passes through unread.
    """

    stage: Stage
    report: object = None


@dataclass(frozen=True)
class LoadRequest:
    """What a checkpoint loader is given. ``model`` is materialised (its parameters hold no meaning yet)."""

    checkpoint_dir: Path
    mapping: RankMapping
    model: nn.Module
    config: ModelConfig
    progress: Progress | None = None


@runtime_checkable
class CheckpointLoader(Protocol):
    """Brings configuration, build facts and weights. Called in this order; ``cleanup`` always, and last."""

    def load_config(self, checkpoint_dir: Path) -> ModelConfig:
        """The model's configuration."""

    def build_facts(self, checkpoint_dir: Path, config: ModelConfig) -> BuildFacts:
        """What only the weights' files (or a peer that saw them) can tell about construction; often empty."""

    def load_weights(self, request: LoadRequest) -> Injected | Weights:
        """Put the weights in place, or hand them over for the model to cut.

        To inject the ``PROCESSED`` stage, call ``post_load.prepare_processed(request.model)`` first: it wires aliases
        and gives transformed parameters their shapes. If that then fails, call ``post_load.prepare_raw`` before
        returning ``Weights``. Either all of the stage's bytes are in place on return, or it raises.
        """

    def cleanup(self) -> None:
        """Release files and connections. Idempotent."""
