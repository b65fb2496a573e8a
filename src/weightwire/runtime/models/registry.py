"""Which class builds which architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from weightwire.errors import ConfigError
from weightwire.runtime.config import ModelConfig, Scalar
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.models.decoder import DecoderForCausalLM
from weightwire.runtime.models.deepseek_v3 import DeepseekV3ForCausalLM
from weightwire.runtime.models.gemma2 import Gemma2ForCausalLM
from weightwire.runtime.models.llama import LlamaForCausalLM
from weightwire.runtime.models.qwen3 import Qwen3ForCausalLM, Qwen3MoeForCausalLM
from weightwire.runtime.quantization.methods import QuantizedMethods

MODELS: dict[str, type[DecoderForCausalLM]] = {
    "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
}


def construct(
    config: ModelConfig, build_facts: Mapping[str, Scalar], context: LayerContext, device: str = "meta"
) -> DecoderForCausalLM:
    """Build the model of ``config`` as ``build_facts`` correct it, its parameters uninitialised, on ``device``.

    Raises:
        ConfigError: an unknown architecture or build fact, or ranks that cannot share the heads or the experts.
    """
    model_class = MODELS.get(config.architecture)
    if model_class is None:
        raise ConfigError(
            f"architecture {config.architecture!r} is not supported", f"this runtime knows {', '.join(sorted(MODELS))}"
        )
    if config.moe is None and context.mapping.ep_size > 1:
        raise ConfigError(f"{config.architecture} has no experts to share", "leave ep at 1")
    if config.moe is None and context.mapping.attention_dp:
        raise ConfigError(
            f"{config.architecture} has no experts to share", "leave attention-dp out, or start more replicas"
        )
    if config.quantization is not None:
        context = replace(context, methods=QuantizedMethods(config.quantization))
    with torch.device(device):
        return model_class(config.with_build_facts(build_facts), context, dict(build_facts))
