"""Gemma 2: norms of ``1 + weight`` before and after each block, a scaled embedding, caps on logits."""

from __future__ import annotations

import torch

from weightwire.runtime.config import ModelConfig
from weightwire.runtime.layers.attention import AttentionStep, CappedAttention, SelfAttention
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.norm import GemmaRMSNorm, RMSNorm
from weightwire.runtime.models.decoder import DecoderForCausalLM, DecoderLayer


class Gemma2DecoderLayer(DecoderLayer):
    """Four norms: what attention and the MLP add to the residual stream is normalised too."""

    def __init__(self, context: LayerContext, config: ModelConfig, layer: int) -> None:
        super().__init__(context, config, layer)
        self.pre_feedforward_layernorm = self.norm(context, config)
        self.post_feedforward_layernorm = self.norm(context, config)

    def norm(self, context: LayerContext, config: ModelConfig) -> RMSNorm:
        """Of ``1 + weight``."""
        return GemmaRMSNorm(context, config.hidden_size, config.rms_norm_eps)

    def attention(self, context: LayerContext, config: ModelConfig, layer: int) -> SelfAttention:
        """With caps and windows."""
        return CappedAttention(context, config, layer)

    def advance(self, normed: torch.Tensor, residual: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """As ``DecoderLayer.advance``."""
        residual = residual + self.post_attention_layernorm(self.self_attn(normed, step))
        inner = self.mlp(self.pre_feedforward_layernorm(residual))
        summed: torch.Tensor = residual + self.post_feedforward_layernorm(inner)
        return summed


class Gemma2ForCausalLM(DecoderForCausalLM):
    """A Gemma 2 language model."""

    family = "gemma2"
    layer_class = Gemma2DecoderLayer
