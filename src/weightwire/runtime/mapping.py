"""Rank coordinates: who this rank is in every kind of parallelism, and which slice of a tensor is its own."""

from __future__ import annotations

from dataclasses import dataclass

from weightwire.errors import ConfigError


def _check_coordinate(kind: str, rank: object, size: object) -> None:
    for name, value in ((f"{kind} rank", rank), (f"{kind} size", size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}", "give a whole number")
    assert isinstance(rank, int)
    assert isinstance(size, int)
    if size < 1:
        raise ConfigError(f"{kind} size is {size}", "it must be at least 1")
    if not 0 <= rank < size:
        raise ConfigError(f"{kind} rank {rank} is not in 0..{size - 1}", "ranks count from 0 and are below the size")


@dataclass(frozen=True)
class TpCoordinates:
    """Rank ``rank`` of ``size`` tensor-parallel ranks.

    Raises:
        ConfigError: a size below 1, a rank outside the size, or no whole number.
    """

    size: int
    rank: int

    def __post_init__(self) -> None:
        _check_coordinate("tp", self.rank, self.size)


WHOLE = TpCoordinates(size=1, rank=0)
"""Nothing is cut: one rank holds the whole tensor, or what is read was cut before."""


@dataclass(frozen=True)
class Mapping:
    """The coordinates of one rank of a replica. Order of ranks: dp outermost, then pp, then tp.

    Raises:
        ConfigError: coordinates out of range, or sizes and ranks that contradict one another.
    """

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    pp_size: int = 1
    pp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    dp_size: int = 1
    dp_rank: int = 0

    def __post_init__(self) -> None:
        _check_coordinate("world", self.rank, self.world_size)
        _check_coordinate("tp", self.tp_rank, self.tp_size)
        _check_coordinate("pp", self.pp_rank, self.pp_size)
        _check_coordinate("ep", self.ep_rank, self.ep_size)
        _check_coordinate("dp", self.dp_rank, self.dp_size)
        if self.tp_size * self.pp_size * self.dp_size != self.world_size:
            raise ConfigError(
                f"tp {self.tp_size} x pp {self.pp_size} x dp {self.dp_size} is not the world size {self.world_size}",
                "make the sizes multiply to the number of ranks",
            )
        expected = (self.dp_rank * self.pp_size + self.pp_rank) * self.tp_size + self.tp_rank
        if expected != self.rank:
            raise ConfigError(
                f"rank {self.rank} contradicts its coordinates, which give rank {expected}",
                "ranks count tp fastest, then pp, then dp",
            )

    @classmethod
    def for_tp(cls, rank: int, tp_size: int) -> Mapping:
        """The mapping of a replica that is parallel in tensors only."""
        return cls(world_size=tp_size, rank=rank, tp_size=tp_size, tp_rank=rank)

    @property
    def tp(self) -> TpCoordinates:
        """The tensor-parallel part of this mapping."""
        return TpCoordinates(size=self.tp_size, rank=self.tp_rank)


def effective_tp(coordinates: Mapping | TpCoordinates, *, presharded: bool) -> TpCoordinates:
    """The coordinates by which *source* tensors are cut during one load.

    The only place that knows what presharded means: tensors that were cut before are taken whole. Weights, biases,
    KV heads and vocabulary padding all take their coordinates from here, as an argument, for one load only.
    """
    if presharded:
        return WHOLE
    return coordinates.tp if isinstance(coordinates, Mapping) else coordinates


def replicated_tp(tp: TpCoordinates, units: int) -> TpCoordinates:
    """The coordinates for a tensor of ``units`` indivisible units (KV heads): replicated where ranks outnumber them.

    With 2 heads on 4 ranks, ranks 0 and 1 hold head 0, ranks 2 and 3 head 1. ``tp.size`` and ``units`` must divide
    one another (checked when the model is built).
    """
    if units >= tp.size:
        return tp
    return TpCoordinates(size=units, rank=tp.rank * units // tp.size)


def shard_range(width: int, tp: TpCoordinates) -> tuple[int, int]:
    """The half-open range of ``width`` that a rank owns: ``ceil(width / size)`` each, the last ones short or empty."""
    per_rank = -(-width // tp.size)
    start = min(tp.rank * per_rank, width)
    return start, min(start + per_rank, width)
