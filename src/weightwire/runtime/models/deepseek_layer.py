"""A layer of DeepSeek-V3: latent attention, shared and routed experts."""

from __future__ import annotations

import torch
from torch import nn

from weightwire.runtime.config import ModelConfig
from weightwire.runtime.layers.attention import SelfAttention
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.mla import MlaAttention
from weightwire.runtime.layers.mlp import GatedMLP
from weightwire.runtime.models.decoder import DecoderLayer
from weightwire.runtime.models.qwen3 import SparseMLP


class SharedAndRoutedMLP(SparseMLP):
    """Routed experts, and shared ones that every token goes through."""

    shared_experts: GatedMLP | None

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        super().__init__(context, config)
        assert config.moe is not None
        width = config.moe.intermediate_size * config.moe.shared_experts
        shared, sizes = context.within("shared_experts"), (config.hidden_size, width)
        self.shared_experts = GatedMLP(shared, *sizes, bias=False, activation=config.activation) if width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) to the same, summed over ranks."""
        routed = super().forward(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class DeepseekV3DecoderLayer(DecoderLayer):
    """Latent attention, and experts but in the first layers."""

    def attention(self, context: LayerContext, config: ModelConfig, layer: int) -> SelfAttention:
        """Latent."""
        return MlaAttention(context, config, layer)

    def feed_forward(self, context: LayerContext, config: ModelConfig, layer: int) -> nn.Module:
        """Experts, or an MLP."""
        assert config.moe is not None
        dense = layer in config.moe.dense_layers
        return super().feed_forward(context, config, layer) if dense else SharedAndRoutedMLP(context, config)
