"""Which class builds which architecture."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weightwire.errors import ConfigError
from weightwire.runtime.config import ModelConfig, Scalar
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.models.llama import LlamaForCausalLM

MODELS: dict[str, type[LlamaForCausalLM]] = {"LlamaForCausalLM": LlamaForCausalLM}


def construct(
    config: ModelConfig, build_facts: Mapping[str, Scalar], context: LayerContext, device: str = "meta"
) -> LlamaForCausalLM:
    """Build the model of ``config`` as ``build_facts`` correct it, its parameters uninitialised, on ``device``.

    Raises:
        ConfigError: an unknown architecture or build fact, or ranks that cannot share the heads.
    """
    model_class = MODELS.get(config.architecture)
    if model_class is None:
        raise ConfigError(
            f"architecture {config.architecture!r} is not supported", f"this runtime knows {', '.join(sorted(MODELS))}"
        )
    with torch.device(device):
        return model_class(config.with_build_facts(build_facts), context, dict(build_facts))
