"""Token embedding and output head, cut over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.manifest.sharding import Cut, Sharding, stacked
from weightwire.runtime.checkpoint.protocol import TensorSource
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.shards import Part, copy_slice, copy_whole, new_parameter
from weightwire.runtime.mapping import TpCoordinates, shard_range


class VocabParallel(nn.Module):
    """A weight of shape (``ceil(vocab / ranks)``, hidden): one row for each token of this rank, then padding rows.

    Every rank's weight has the same shape. Padding rows (on the last ranks only) are zero once loaded; they are part
    of the tensor like any other row.
    """

    def __init__(self, context: LayerContext, vocab_size: int, hidden: int) -> None:
        super().__init__()
        self.context = context
        self.vocab_size = vocab_size
        self.hidden = hidden
        self.vocab_start, self.vocab_stop = shard_range(vocab_size, context.tp)
        self.weight = new_parameter(-(-vocab_size // context.tp.size), hidden, dtype=context.dtype)

    @property
    def real_rows(self) -> int:
        """Rows of the local weight that stand for a token; the rest is padding."""
        return self.vocab_stop - self.vocab_start

    def checkpoint_tensors(self) -> tuple[str, ...]:
        """Leaf names in the checkpoint."""
        return ("weight",)

    def tensor_shards(self) -> dict[str, Sharding]:
        """The rows of this rank's tokens, then padding."""
        rows = Cut((self.vocab_size, self.hidden), 0, self.vocab_start, self.vocab_stop)
        return {"weight": stacked([rows], length=self.weight.shape[0])}

    def load_weights(self, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """As ``Loadable.load_weights``; tensors that were cut before bring their padding rows with them."""
        source = parts[0]["weight"]
        if tp != self.context.tp:
            copy_whole(self.weight, source)
            return frozenset({"weight"})
        rows = shard_range(self.vocab_size, tp)
        copy_slice(self.weight[: self.real_rows], source, (self.vocab_size, self.hidden), 0, rows)
        self.zero_padding()
        return frozenset({"weight"})

    def holds(self, source: TensorSource, tp: TpCoordinates) -> bool:
        """Whether ``source``, cut by ``tp`` as in ``load_weights``, has the bytes that were loaded."""
        cut = tp == self.context.tp
        rows = shard_range(self.vocab_size, tp) if cut else (0, self.weight.shape[0])
        full = (self.vocab_size if cut else self.weight.shape[0], self.hidden)
        mine = self.weight[: self.real_rows] if cut else self.weight
        return source.shape == full and torch.equal(source.read(0, *rows).to(self.weight), mine)

    def zero_padding(self) -> None:
        """Write zeros to the padding rows, which no checkpoint tensor has."""
        self.weight[self.real_rows :].zero_()


class Embedding(VocabParallel):
    """Token ids to vectors."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) of token ids to (batch, length, hidden), the same on every rank."""
        local = tokens - self.vocab_start
        elsewhere = (local < 0) | (local >= self.real_rows)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.context.group.all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0))


class LMHead(VocabParallel):
    """Vectors to the logits of this rank's tokens, which ``cap`` bounds where there is one (Gemma 2)."""

    def __init__(self, context: LayerContext, vocab_size: int, hidden: int, cap: float | None = None) -> None:
        super().__init__(context, vocab_size, hidden)
        self.cap = cap

    def tie(self, embedding: Embedding) -> None:
        """Share the embedding's parameter: one object, one storage, two names."""
        assert embedding.weight.shape == self.weight.shape
        self.weight = embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to (..., local rows): the logits of padding rows are minus infinity."""
        logits = F.linear(x, self.weight)
        logits = logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        logits[..., self.real_rows :] = float("-inf")
        return logits

    def gather(self, local_logits: torch.Tensor) -> torch.Tensor:
        """Local logits of every rank to (..., vocab), on every rank."""
        return torch.cat(self.context.group.all_gather(local_logits), dim=-1)[..., : self.vocab_size]

    def greedy(self, local_logits: torch.Tensor) -> torch.Tensor:
        """The token with the highest logit over all ranks, the lowest id among equals.

        (batch, local rows) to (batch), the same on every rank.
        """
        best, index = local_logits.to(torch.float64).max(dim=-1)
        mine = torch.stack([best, (index + self.vocab_start).to(torch.float64)])
        values, tokens = torch.stack(self.context.group.all_gather(mine)).unbind(1)
        # ranks hold ascending ids, so the first rank among equals has the lowest one
        winner = values.max(dim=0).values == values
        first = winner.to(torch.int8).argmax(dim=0, keepdim=True)
        return tokens.gather(0, first).squeeze(0).to(torch.int64)
