"""What makes two vLLM replicas interchangeable, read off vLLM's configuration before the model exists."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
from vllm.model_executor.model_loader.utils import get_architecture_class_name
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from weightwire.engines.vllm.options import Options
from weightwire.errors import ConfigError
from weightwire.identity.config import config_digest
from weightwire.identity.identity import Identity
from weightwire.identity.layout import layout_id
from weightwire.types import Coordinates, Role, Stage

ENGINE = "vllm"
TRANSFORMS = "vllm-process_weights_after_loading"
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where a quantization keeps its settings beside ``config.json``."""


def identities(
    config: VllmConfig, model_config: ModelConfig, options: Options, coordinates: Coordinates, role: Role
) -> dict[Stage, Identity]:
    """The identity at each stage; the same whether the replica has weight files or not.

    Raises:
        ConfigError: a model without a name or without ``config.json``.
    """
    if config.offload_config.uva.cpu_offload_gb > 0 or config.offload_config.prefetch.offload_group_size > 0:
        raise ConfigError("weights that are offloaded to host memory are not carried yet", "turn offloading off")
    raw = _file("config.json", model_config)
    if raw is None:
        raise ConfigError(f"{model_config.model} has no config.json", "load this model with another load format")
    fields: dict[str, Any] = {
        "model_id": _model_id(model_config, options, role),
        "architecture": get_architecture_class_name(model_config),
        "config_digest": config_digest(raw),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "quantization": model_config.quantization,
        "quantization_digest": _quantization(model_config),
        "role": role,
        "engine": ENGINE,
        "engine_version": vllm.__version__,
        "revision": _revision(model_config, options),
        "extra": _extra(config, model_config),
        "tp_size": coordinates.tp_size,
        "pp_size": coordinates.pp_size,
        "ep_size": coordinates.ep_size,
    }
    # vLLM's quantization methods say nothing about whether the bytes that they load depend on the device: it counts
    layouts = {stage: _layout(stage, config) for stage in Stage}
    return {stage: Identity(stage=stage, layout_id=layouts[stage], **fields) for stage in Stage}


def _layout(stage: Stage, config: VllmConfig) -> str:
    return layout_id(
        stage,
        kernel_backend="vllm" if stage is Stage.LOADED else _kernels(config),
        device_architecture=_device(),
        transform_protocol="" if stage is Stage.LOADED else f"{TRANSFORMS}-{vllm.__version__}",
        raw_layouts=[None],
    )


def _device() -> str:
    capability = current_platform.get_device_capability()
    return f"{current_platform.device_type}{f' {capability.as_version_str()}' if capability else ''}"


def _kernels(config: VllmConfig) -> str:
    """Whatever chooses kernels, and with them the layout of processed bytes: torch, CPU features, vLLM's switches."""
    switches = sorted(
        f"{name}={value}" for name, value in os.environ.items() if name.startswith("VLLM_") and _decides(name)
    )
    cpu = torch.backends.cpu.get_cpu_capability() if current_platform.is_cpu() else ""
    kernel = getattr(config, "kernel_config", None)
    return f"torch {torch.__version__} {cpu} {kernel} {' '.join(switches)}"


def _decides(name: str) -> bool:
    return any(word in name for word in ("USE_", "BACKEND", "KERNEL", "MARLIN", "CUTLASS", "_FP8_", "_MOE_", "CPU_SGL"))


def _model_id(model_config: ModelConfig, options: Options, role: Role) -> str:
    named = options.model_id if role is Role.TARGET else None
    if named:
        return named
    path = str(model_config.model)
    if Path(path).is_dir():
        if role is Role.DRAFT and options.model_id:
            return f"{options.model_id}#draft"  # the config digest tells drafts of one name apart
        raise ConfigError(f"{path} is a directory, which is no name of a model", 'give "model_id" in the extra config')
    return path


def _revision(model_config: ModelConfig, options: Options) -> str | None:
    """The operator's word, else the commit that the Hub resolved the name to, else what vLLM was told."""
    if options.revision:
        return options.revision
    # of a Hub model this is a str that says "main" and knows the commit
    found = getattr(model_config.revision, "resolved", None) or model_config.revision
    return str(found) if found else None


def _quantization(model_config: ModelConfig) -> str:
    if not model_config.quantization:
        return ""  # and the Hub is not asked for files that nobody has
    found = {name: content for name in QUANTIZATION_FILES if (content := _file(name, model_config))}
    return config_digest(found) if found else ""


def _file(name: str, model_config: ModelConfig) -> dict[str, Any] | None:
    found = get_hf_file_to_dict(name, model_config.model, model_config.revision or "main")
    return found if isinstance(found, dict) else None


def _extra(config: VllmConfig, model_config: ModelConfig) -> dict[str, str]:
    overrides = getattr(model_config, "hf_overrides", None)
    if overrides is SpeculativeConfig.hf_config_override:
        overrides = {
            "by": "SpeculativeConfig.hf_config_override"
        }  # every draft's: decided by config and vLLM's version
    elif callable(overrides):
        raise ConfigError("hf_overrides is a function, which cannot be compared between replicas", "give a mapping")
    return {
        "hf_overrides": config_digest(dict(overrides)) if overrides else "",
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "runner": str(model_config.runner_type),
        "convert": str(model_config.convert_type),
        "model_impl": str(model_config.model_impl),
    }
