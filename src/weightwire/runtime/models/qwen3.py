"""Qwen3: heads of queries and keys are normalised; and its sparse sibling, with routed experts."""

from __future__ import annotations

import torch
from torch import nn

from weightwire.runtime.config import ModelConfig
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.data_parallel import BatchShare
from weightwire.runtime.layers.moe import FusedMoE, Router
from weightwire.runtime.models.decoder import DecoderForCausalLM, DecoderLayer


class Qwen3ForCausalLM(DecoderForCausalLM):
    """A dense Qwen3 language model; ``qk_norm`` of its config makes the difference."""

    family = "qwen3"


class SparseMLP(nn.Module):
    """Routed experts alone."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.gate = Router(context, config.hidden_size, config.moe)
        self.experts = FusedMoE(context.experts.within("experts"), config.hidden_size, config.moe)
        self.share = BatchShare(context.experts_group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) to the same, summed over ranks."""
        tokens = self.share.gather(x.flatten(0, -2))
        routed: torch.Tensor = self.experts(tokens, *self.gate(tokens))
        return self.share.own(routed).view_as(x)


class Qwen3MoeDecoderLayer(DecoderLayer):
    """Routed experts in place of the MLP, but for the dense layers."""

    def feed_forward(self, context: LayerContext, config: ModelConfig, layer: int) -> nn.Module:
        """Experts, or an MLP."""
        assert config.moe is not None
        dense = layer in config.moe.dense_layers
        return super().feed_forward(context, config, layer) if dense else SparseMLP(context, config)


class Qwen3MoeForCausalLM(DecoderForCausalLM):
    """A Qwen3 language model with routed experts."""

    family = "qwen3-moe"
    layer_class = Qwen3MoeDecoderLayer
