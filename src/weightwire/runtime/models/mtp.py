"""Multi-token prediction: layers behind a model's last one that draft further tokens from its hidden states."""

from __future__ import annotations

import torch
from torch import nn

from weightwire.runtime.config import ModelConfig
from weightwire.runtime.layers.attention import AttentionStep
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.embedding import Embedding, LMHead
from weightwire.runtime.layers.linear import Linear, OutPart, UnquantizedLinearMethod
from weightwire.runtime.layers.norm import RMSNorm
from weightwire.runtime.models.deepseek_layer import DeepseekV3DecoderLayer


class SharedHead(nn.Module):
    """A norm of its own, and the head of the model."""

    head: LMHead

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)


class MtpLayer(DeepseekV3DecoderLayer):
    """One depth of prediction: ``layer`` is counted on from the model's last one.

    ``embed_tokens`` and ``shared_head.head`` are the model's own, which ``share`` hands to it: they are loaded,
    published and received once, under the model's names.
    """

    embed_tokens: Embedding

    def __init__(self, context: LayerContext, config: ModelConfig, layer: int) -> None:
        super().__init__(context, config, layer)
        self.enorm = self.norm(context, config)
        self.hnorm = self.norm(context, config)
        # checkpoints leave it unquantized, whatever the rest is
        parts, method = [OutPart(config.hidden_size)], UnquantizedLinearMethod()
        self.eh_proj = Linear(context.within("eh_proj"), 2 * config.hidden_size, parts, method=method)
        self.shared_head = SharedHead(context, config)

    def share(self, embed_tokens: Embedding, head: LMHead) -> None:
        """Wire what is the model's. References only; idempotent; legal on meta."""
        self.embed_tokens, self.shared_head.head = embed_tokens, head

    def draft(self, tokens: torch.Tensor, hidden: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """What was computed of each position so far, (batch, length, hidden), to the same one token further on.

        ``tokens`` (batch, length): for each position the token that follows all that ``hidden`` has seen there.
        """
        joined = torch.cat((self.enorm(self.embed_tokens(tokens)), self.hnorm(hidden)), dim=-1)
        residual = self.eh_proj(joined)
        return self.advance(self.input_layernorm(residual), residual, step)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What ``draft`` gave, (batch, hidden), to logits (batch, vocab), on every rank of the stage."""
        head = self.shared_head.head
        return head.gather(head(self.shared_head.norm(hidden)))
