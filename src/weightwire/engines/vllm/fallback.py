"""vLLM's own loaders, for replicas that no peer can serve: on the very model that a peer's bytes did not reach."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from weightwire.engines.vllm.facts import WEIGHT_FILES
from weightwire.errors import ConfigError

HUB_S = 5.0
"""Seconds that the Hub has to say how large a model is."""


def make(load_config: LoadConfig, load_format: str) -> BaseModelLoader:
    """VLLM's loader of ``load_format``.

    Raises:
        ConfigError: there is none, or it builds the model by itself, which would build it twice.
    """
    try:
        other = dataclasses.replace(load_config, load_format=load_format, model_loader_extra_config={})
        loader = get_model_loader(other)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"fallback_load_format {load_format}: {reason}", "name one of vLLM's, such as auto"
        ) from error
    if type(loader).load_model is not BaseModelLoader.load_model:
        raise ConfigError(
            f"fallback_load_format {load_format} builds models by itself",
            "name auto, runai_streamer or fastsafetensors",
        )
    return loader


def load(
    loader: BaseModelLoader, model: nn.Module, model_config: ModelConfig, progress: Callable[[int, int], None] | None
) -> None:
    """Fill ``model`` from where vLLM would; ``progress`` is told bytes read and the bytes of this rank's shard."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    reading: Any = getattr(loader, "get_all_weights", None)
    if reading is not None and progress is not None:

        def counted(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
            done = 0
            for name, tensor in reading(*args, **kwargs):
                done += tensor.numel() * tensor.element_size()
                progress(min(done, total - 1), total)
                yield name, tensor

        vars(loader)["get_all_weights"] = counted
    loader.load_weights(model, model_config)


def download_size(model_config: ModelConfig, load_config: LoadConfig) -> int:
    """At most so many bytes of weight files reading "the disk" will fetch from the Hub.

    0 for a directory, for what is in the Hub's cache already, and where the Hub cannot be asked.
    """
    import huggingface_hub  # noqa: PLC0415  (only where a peer was missed)
    from huggingface_hub.errors import HTTPError  # noqa: PLC0415

    model = str(model_config.model)
    if Path(model).is_dir():
        return 0
    try:
        info = huggingface_hub.HfApi().model_info(
            model, revision=model_config.revision, files_metadata=True, timeout=HUB_S
        )
    except (HTTPError, OSError, ValueError):  # no Hub, no such model: the loader itself will say so
        return 0
    sizes: dict[str, int] = {}
    for file in info.siblings or []:
        ending = Path(file.rfilename).suffix
        own = (
            f"*{ending}" in WEIGHT_FILES and "/" not in file.rfilename and not file.rfilename.startswith("consolidated")
        )
        cached = huggingface_hub.try_to_load_from_cache(
            model, file.rfilename, revision=info.sha, cache_dir=load_config.download_dir
        )
        if own and not isinstance(cached, str):
            sizes[ending] = sizes.get(ending, 0) + (file.size or 0)
    return sizes.get(".safetensors") or max(sizes.values(), default=0)


def layers(config: VllmConfig) -> tuple[dict[str, Any], list[str]]:
    """What construction has registered so far, for ``forget``."""
    compilation = config.compilation_config
    return dict(compilation.static_forward_context), list(compilation.static_all_moe_layers)


def forget(config: VllmConfig, before: tuple[dict[str, Any], list[str]]) -> None:
    """Let a model that is given up be built once more, without "duplicate layer" or doubled memory (hazard H37)."""
    compilation = config.compilation_config
    compilation.static_forward_context.clear()
    compilation.static_forward_context.update(before[0])
    compilation.static_all_moe_layers[:] = before[1]
    gc.collect()  # vLLM's parameters and modules hold each other
