"""Attention data-parallel: each rank attends to some rows of a batch; routed experts are shared and see all of them."""

from __future__ import annotations

import torch

from weightwire.runtime.distributed import TpGroup


class BatchShare:
    """The rows that are this rank's: as many for each, the last ones filled up with zeros.

    Args:
        group: who shares them; ``None`` where every rank has all rows.
    """

    def __init__(self, group: TpGroup | None) -> None:
        self._group = group

    def rows(self, batch: int) -> int:
        """Rows of each rank."""
        return batch if self._group is None else -(-batch // self._group.size)

    def mine(self, tensor: torch.Tensor) -> torch.Tensor:
        """(batch, ...) to this rank's rows of it."""
        if self._group is None:
            return tensor
        each = self.rows(tensor.shape[0])
        filled = tensor.new_zeros(each * self._group.size, *tensor.shape[1:])
        filled[: tensor.shape[0]] = tensor
        return filled.narrow(0, self._group.rank * each, each)

    def whole(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        """Every rank's rows together, (batch, ...) on every rank: undoes ``mine``."""
        return self.gather(tensor)[:batch]

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """Every rank's ``tokens``, equally many, one below the other."""
        return tokens if self._group is None else torch.cat(self._group.all_gather(tokens))

    def own(self, gathered: torch.Tensor) -> torch.Tensor:
        """Of what ``gather`` gave, or was made of it: this rank's part."""
        return gathered if self._group is None else gathered.chunk(self._group.size)[self._group.rank]
