"""Small value types that every layer shares. Nothing here imports anything of ours but errors."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from weightwire.errors import ConfigError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
"""What declared state and build facts may hold."""

State = Mapping[str, Mapping[str, Json]]
"""Module path -> what ``module.export_state()`` returned."""


class Stage(enum.StrEnum):
    """When in a source's life its bytes were published; never mixed under one key."""

    LOADED = "LOADED"
    """After ``load_weights``, before ``post_load_weights``: the raw bytes."""
    PROCESSED = "PROCESSED"
    """After ``post_load_weights``: what kernels read."""


class TensorClass(enum.StrEnum):
    """What a tensor is for, which decides whether it travels."""

    WEIGHT = "weight"
    """Written by loading (or, in PROCESSED, transforming): travels, makes the weights id."""
    DERIVED = "derived"
    """Computed by construction (rotary caches): travels last, outside the weights id."""
    RUNTIME = "runtime"
    """KV cache, counters, workspaces: never published, in no manifest."""


class Role(enum.StrEnum):
    """Which model of a replica a shard belongs to."""

    TARGET = "target"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """Where one rank stands in its replica: rank and size along every axis, never a bare integer.

    Raises:
        ConfigError: a rank outside ``[0, size)``.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "ep", "dp"):
            rank, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            if not 0 <= rank < size:
                raise ConfigError(
                    f"{axis}_rank {rank} is outside {axis}_size {size}", "give ranks that count from 0 below the size"
                )

    def label(self) -> str:
        """Short text for logs and keys, for instance ``tp1/3 pp0/1 ep0/1 dp0/1``."""
        axes = ("tp", "pp", "ep", "dp")
        return " ".join(f"{axis}{getattr(self, f'{axis}_rank')}/{getattr(self, f'{axis}_size')}" for axis in axes)


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A run of bytes ``[offset, offset + nbytes)`` of a shard's logical byte string (see ``manifest.leaves``)."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.nbytes
