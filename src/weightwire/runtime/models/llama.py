"""Llama: rotary embedding, RMS norm, grouped-query attention and a gated MLP; nothing that other families lack."""

from __future__ import annotations

from weightwire.runtime.models.decoder import DecoderForCausalLM


class LlamaForCausalLM(DecoderForCausalLM):
    """A Llama language model, as ``DecoderForCausalLM`` is without changes."""

    family = "llama"
