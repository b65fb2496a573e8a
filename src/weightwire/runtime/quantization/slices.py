"""This rank's part of a quantized checkpoint tensor, cut with the weight that it belongs to.

Weights and every kind of scale take their coordinates from here: a tensor that was cut before is taken whole, all
others are cut, by one rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightwire.errors import CheckpointError, ConfigError
from weightwire.runtime.checkpoint.protocol import TensorSource
from weightwire.runtime.layers.linear import Linear, OutPart, TensorParallelMode
from weightwire.runtime.layers.shards import Part
from weightwire.runtime.mapping import WHOLE, TpCoordinates, shard_range


@dataclass(frozen=True)
class Grid:
    """How a tensor lies over its (rows, columns) weight: one element for so many rows and so many columns.

    ``None``: the tensor does not have that dimension.
    """

    rows: int | None = 1
    columns: int | None = 1

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the tensor for a weight of that size."""
        pairs = ((rows, self.rows), (columns, self.columns))
        return tuple(-(-size // step) for size, step in pairs if step is not None)


SCALAR = Grid(None, None)
ROWS = Grid(1, None)
COLUMNS = Grid(None, 1)


@dataclass(frozen=True)
class Weight:
    """A (rows, columns) weight of the whole model, and how ranks share it.

    ``dim`` is shared by ``tp``; ``None``: nothing is.
    """

    rows: int
    columns: int
    dim: int | None
    tp: TpCoordinates

    @property
    def local(self) -> tuple[int, int]:
        """This rank's rows and columns."""
        sizes = [self.rows, self.columns]
        if self.dim is not None:
            start, stop = shard_range(sizes[self.dim], self.tp)
            sizes[self.dim] = stop - start
        return sizes[0], sizes[1]

    def _step(self, grid: Grid) -> int | None:
        """Weights along ``dim`` for each element of a tensor; ``None`` where ranks do not share it."""
        return None if self.dim is None else (grid.rows, grid.columns)[self.dim]

    def bounds(self, grid: Grid, what: str) -> tuple[int, int, int] | None:
        """Dimension and bounds of this rank's part of the tensor; ``None``: all of it.

        Raises:
            ConfigError: the ranks' cut goes through an element.
        """
        step = self._step(grid)
        if step is None or self.dim is None:
            return None
        size = (self.rows, self.columns)[self.dim]
        start, stop = shard_range(size, self.tp)
        if start != stop and (start % step or (stop % step and stop != size)):
            raise ConfigError(
                f"{what}: rank {self.tp.rank} of {self.tp.size} would cut through {step} weights that are stored "
                "together",
                "use another number of ranks",
            )
        return 0 if grid.rows is None else self.dim, -(-start // step), -(-stop // step)

    def read(
        self, source: TensorSource, grid: Grid, dtypes: Sequence[torch.dtype], *, cut_before: bool = False
    ) -> torch.Tensor:
        """This rank's part of a tensor that lies over the weight as ``grid`` says: of shape ``grid.shape(*local)``.

        Args:
            source: the tensor; one of more dimensions than ``grid`` says may have a last one of size 1.
            grid: how it lies over the weight.
            dtypes: those that it may have.
            cut_before: it is one rank's part already.

        Raises:
            CheckpointError: a wrong shape or dtype.
            ConfigError: the ranks' cut goes through an element.
        """
        mine = grid.shape(*self.local)
        full = mine if cut_before else grid.shape(self.rows, self.columns)
        if source.shape not in (full, (*full, 1)):
            raise CheckpointError(
                f"{source.origin}: tensor {source.name} has shape {list(source.shape)}, the model needs {list(full)}",
                "use a checkpoint that belongs to its config.json",
            )
        bounds = None if cut_before else self.bounds(grid, source.name)
        values = source.read(*(bounds or (0, 0, source.shape[0] if source.shape else 1)))
        if values.numel() and values.dtype not in dtypes:
            raise CheckpointError(
                f"{source.origin}: tensor {source.name} is {values.dtype}, not {' or '.join(map(str, dtypes))}",
                "use a checkpoint that is quantized as its config.json says",
            )
        return values.to(dtypes[0] if not values.numel() else values.dtype).reshape(mine)


def weight_of(layer: Linear, part: OutPart) -> Weight:
    """Of one part of a linear layer."""
    match layer.mode:
        case TensorParallelMode.COLUMN:
            return Weight(part.size, layer.in_features, 0, part.coordinates(layer.context.tp))
        case TensorParallelMode.ROW:
            return Weight(part.size, layer.in_features, 1, layer.context.tp)
    return Weight(part.size, layer.in_features, None, WHOLE)


def check_cuts(layer: Linear, grid: Grid, what: str) -> None:
    """Refuse a layer whose cuts, or whose parts but the last, go through an element of ``grid``.

    Raises:
        ConfigError: they do.
    """
    for number, part in enumerate(layer.parts, 1):
        weight_of(layer, part).bounds(grid, what)
        ragged = grid.rows is not None and layer.local_rows(part) % grid.rows
        if ragged and number < len(layer.parts):
            raise ConfigError(
                f"{what}: {layer.local_rows(part)} rows of a fused layer are no multiple of {grid.rows}",
                "use another number of ranks",
            )


def read_part(
    layer: Linear, number: int, tensors: Part, leaf: str, grid: Grid, dtypes: Sequence[torch.dtype], tp: TpCoordinates
) -> torch.Tensor:
    """This rank's part of ``leaf`` of part ``number`` of a linear layer, as ``Weight.read``.

    ``tp`` is as of ``Loadable.load_weights``.
    """
    weight = weight_of(layer, layer.parts[number])
    return weight.read(tensors[leaf], grid, dtypes, cut_before=tp != layer.context.tp)
