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

    Experts are shared within the tensor-parallel ranks: ``ep_size`` groups of experts, and the width of each expert cut
    by the ``tp_size / ep_size`` ranks that hold the same group. Of the ranks of one tensor-parallel group, neighbours
    hold different experts: ``ep_rank`` is ``tp_rank`` modulo ``ep_size``.

    Layers are shared by the pipeline's stages, neighbouring ones together. Under ``attention_dp`` the ranks of one
    tensor-parallel group share the rows of a batch, not heads: of all but the routed experts each holds the whole.

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
    attention_dp: bool = False

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

        if self.tp_size % self.ep_size or self.ep_rank != self.tp_rank % self.ep_size:
            raise ConfigError(
                f"ep rank {self.ep_rank} of {self.ep_size} contradicts tp rank {self.tp_rank} of {self.tp_size}",
                "ep ranks share the tp ranks: ep size divides tp size, and ep rank is tp rank modulo ep size",
            )

    @classmethod
    def for_tp(cls, rank: int, tp_size: int, ep_size: int = 1) -> Mapping:
        """The mapping of a replica that is parallel in tensors, and in experts within them."""
        return cls.of_rank(rank, tp_size, ep_size=ep_size)

    @classmethod
    def of_rank(
        cls, rank: int, world_size: int, *, pp_size: int = 1, ep_size: int = 1, attention_dp: bool = False
    ) -> Mapping:
        """The mapping of rank ``rank`` of so many: what the stages of a pipeline leave is parallel in tensors.

        Raises:
            ConfigError: the ranks cannot be shared by so many stages, or as the constructor.
        """
        for kind, size in (("world", world_size), ("pp", pp_size), ("ep", ep_size)):
            _check_coordinate(kind, 0, size)
        if world_size % pp_size:
            raise ConfigError(
                f"{world_size} ranks cannot be shared by {pp_size} pipeline stages", "start tp x pp ranks"
            )
        tp_size = world_size // pp_size
        _check_coordinate("world", rank, world_size)
        return cls(
            world_size=world_size,
            rank=rank,
            tp_size=tp_size,
            tp_rank=rank % tp_size,
            pp_size=pp_size,
            pp_rank=rank // tp_size,
            ep_size=ep_size,
            ep_rank=rank % tp_size % ep_size,
            attention_dp=attention_dp,
        )

    @property
    def moe_tp(self) -> TpCoordinates:
        """By which the width of each expert is cut."""
        return TpCoordinates(size=self.tp_size // self.ep_size, rank=self.tp_rank // self.ep_size)

    @property
    def moe_ep(self) -> TpCoordinates:
        """Which experts are this rank's."""
        return TpCoordinates(size=self.ep_size, rank=self.ep_rank)

    @property
    def tp(self) -> TpCoordinates:
        """The tensor-parallel part of this mapping."""
        return TpCoordinates(size=self.tp_size, rank=self.tp_rank)

    @property
    def attention_tp(self) -> TpCoordinates:
        """By which everything but the routed experts is cut."""
        return WHOLE if self.attention_dp else self.tp

    @property
    def pp(self) -> TpCoordinates:
        """Which stage of the pipeline this is."""
        return TpCoordinates(size=self.pp_size, rank=self.pp_rank)

    @property
    def first_stage(self) -> bool:
        """Whether tokens come in here."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether logits are made here."""
        return self.pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers: int) -> range:
        """The layers of this stage: as many for each, the first ones have one more where they do not divide.

        Raises:
            ConfigError: there are fewer layers than stages.
        """
        if num_layers < self.pp_size:
            raise ConfigError(
                f"{num_layers} layers cannot be shared by {self.pp_size} pipeline stages",
                f"use at most {num_layers} stages",
            )
        each, more = divmod(num_layers, self.pp_size)
        start = self.pp_rank * each + min(self.pp_rank, more)
        return range(start, start + each + (self.pp_rank < more))


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
