"""New raw weights into a running model, through vLLM's layerwise reload. Every private call of vLLM's is in this file.

vLLM noted at construction what each layer's tensors were before they were processed. ``initialize_layerwise_reload``
puts ``meta`` tensors of those shapes into the layers and keeps the tensors that kernels read. Each layer is then
filled, processed as at load, and copied into the kept tensors, whose addresses stay (captured graphs go on working).
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import vllm
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload, layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, materialize_layer
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.utils.torch_utils import set_default_torch_dtype

from weightwire.engines.vllm.transforms import METHOD, UNCHANGING
from weightwire.errors import ConfigError, ManifestMismatch

SUPPORTED = ("0.32",)
"""Releases of vLLM whose private parts these are."""

NEW_REPLICA = "start a new replica from the new weights"

RENEWED_ON_CPU = (
    "UnquantizedLinearMethod",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "CompressedTensorsW8A8Int8",
    "CompressedTensorsKVCacheMethod",
)
"""Methods (or their schemes) whose kernels were seen to use the new weights afterwards."""

Tensors = Mapping[str, torch.Tensor]

_pointed_at: WeakKeyDictionary[nn.Module, list[torch.Tensor]] = WeakKeyDictionary()


def check_version(version: str = vllm.__version__) -> None:
    """Check that vLLM is one whose private parts are known.

    Raises:
        ConfigError: it is another; names it.
    """
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise ConfigError(
            f"live refresh does not know vLLM {version}, only {', '.join(SUPPORTED)}",
            "start new replicas instead, or install a release that is known",
        )


@dataclass(frozen=True, slots=True)
class Fill:
    """What one layer gets: raw tensor by the name that the layer holds it under."""

    path: str
    layer: nn.Module
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def plan(model: nn.Module, weights: Tensors) -> list[Fill]:
    """Which layer gets what; changes nothing.

    Args:
        model: running.
        weights: raw tensor of every name (aliases too) that loading wrote.

    Raises:
        ManifestMismatch: this model cannot be filled from them; says why.
    """
    if hasattr(model, "process_weights_after_loading"):
        raise ManifestMismatch(f"{type(model).__name__} has a post-load step of its own", NEW_REPLICA)
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[module].append(path)
    fills: list[Fill] = []
    reached: set[int] = set()
    for layer, names in paths.items():
        fill = Fill(names[0], layer, dict(_staged(layer, names, weights)))
        if fill.tensors:
            fills.append(fill)
            reached.update(tensor.data_ptr() for tensor in fill.tensors.values())
    for name, tensor in weights.items():
        if tensor.numel() and tensor.data_ptr() not in reached:
            raise ManifestMismatch(f"{name} is no parameter or buffer that vLLM reloads", NEW_REPLICA)
    _check_ties(fills)
    for fill in fills:
        _check_method(fill)
    return fills


def swap(model: nn.Module, model_config: ModelConfig, fills: list[Fill]) -> None:
    """Carry out what ``plan`` said. Legal while nothing is computed; after an exception the model is unusable.

    Raises:
        Exception: whatever processing raises.
    """
    with torch.no_grad(), set_default_torch_dtype(model_config.dtype):
        initialize_layerwise_reload(model)
        for fill in fills:
            if is_deferred_attention_layer(fill.layer):
                _offer(fill)
            else:
                _fill(fill)
        _put_back(model)
        finalize_layerwise_reload(model, model_config)
    left = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{left[0]} was left without memory")


def _staged(layer: nn.Module, paths: list[str], weights: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Checked against what the layer will hold when it is restored."""
    params, buffers = layerwise.get_layerwise_info(layer).restore_metadata
    live = {name: tensor for name, tensor in get_layer_tensors(layer).items() if name in SKIP_TENSORS}
    missing = []
    for name, shape in (params | buffers | live).items():
        dotted = [f"{path}.{name}" if path else name for path in paths]
        found = next((weights[each] for each in dotted if each in weights), None)
        if found is None:
            kept = name in layer._non_persistent_buffers_set or name in live  # noqa: SLF001
            missing += [] if kept else dotted[:1]
            continue
        processed = name in live  # its dtype may not be what it was
        if tuple(found.shape) != tuple(shape.shape) or not (processed or found.dtype == shape.dtype):
            raise ManifestMismatch(
                f"{dotted[0]} is {list(found.shape)} {found.dtype}, vLLM reloads {list(shape.shape)} {shape.dtype}",
                NEW_REPLICA,
            )
        yield name, found
    lone = len(missing) == len(params | buffers) and not params  # of buffers alone: vLLM puts them back as they are
    if missing and not lone:
        raise ManifestMismatch(f"nothing is offered for {missing[0]}", NEW_REPLICA)


def _check_method(fill: Fill) -> None:
    """On a CPU, kernels keep weights in packed forms of their own, which vLLM's reload forgets: silently wrong."""
    method = getattr(fill.layer, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase) or not _on_cpu(fill):
        return
    name = type(getattr(fill.layer, "scheme", None) or method).__name__
    if name not in RENEWED_ON_CPU:
        raise ManifestMismatch(f"live refresh was not tried with {name} on a CPU ({fill.path})", NEW_REPLICA)


def _on_cpu(fill: Fill) -> bool:
    tensor: torch.Tensor = next(iter(get_layer_tensors(fill.layer).values()))
    return tensor.device.type == "cpu"


def _check_ties(fills: list[Fill]) -> None:
    """What kernels share must get equal bytes: vLLM ties ``lm_head`` where a checkpoint's copy equals the embedding."""
    shared: dict[tuple[str, int], tuple[str, torch.Tensor]] = {}
    for fill in fills:
        live = get_layer_tensors(fill.layer)
        for name, new in fill.tensors.items():
            held = live.get(name)
            if held is None or not held.numel():
                continue
            where = (str(held.device), held.data_ptr())
            label = f"{fill.path}.{name}"
            other, first = shared.setdefault(where, (label, new))
            if first.data_ptr() != new.data_ptr() and not torch.equal(first, new):
                raise ManifestMismatch(
                    f"{label} and {other} share memory here and differ in the new weights", NEW_REPLICA
                )


def _fill(fill: Fill) -> None:
    info = layerwise.get_layerwise_info(fill.layer)
    materialize_layer(fill.layer, info)
    _keep_transient(fill, info)
    for name, new in fill.tensors.items():
        getattr(fill.layer, name).data.copy_(new)
    method = getattr(fill.layer, "quant_method", None)
    if isinstance(method, UnquantizedFusedMoEMethod) and _on_cpu(fill):
        method.moe_kernel = None  # vLLM packs experts only where there is no kernel yet, as at load
    with _kept_alive(fill.layer):
        layerwise._layerwise_process(fill.layer, info)  # noqa: SLF001


@contextlib.contextmanager
def _kept_alive(layer: nn.Module) -> Iterator[None]:
    """Keep what processing made, where vLLM copies it and lets go of it although a kernel still points there.

    oneDNN's handle for quantized linear layers keeps the address of the scales that it was made with.
    """
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, LinearMethodBase) or isinstance(method, UNCHANGING):
        yield
        return
    process = method.process_weights_after_loading

    def processed(*args: Any, **kwargs: Any) -> None:
        process(*args, **kwargs)
        _pointed_at[layer] = list(get_layer_tensors(layer).values())

    vars(method)[METHOD] = processed
    try:
        yield
    finally:
        del vars(method)[METHOD]


def _put_back(model: nn.Module) -> None:
    """Layers that hold nothing of a checkpoint get back what they had; vLLM does so as well, but warns of each."""
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load() and not info.loaded_weights and not is_deferred_attention_layer(layer):
            layerwise._place_kernel_tensors(layer, info)  # noqa: SLF001
            info.reset()


def _keep_transient(fill: Fill, info: Any) -> None:
    """Buffers that no checkpoint holds are undefined in the new memory; processing may read them."""
    kept = info.kernel_tensors[1]
    for name in info.kernel_non_persistent_buffers:
        now, old = getattr(fill.layer, name, None), kept.get(name)
        if name in fill.tensors or now is None or old is None or now is old:
            continue
        if (now.shape, now.dtype) == (old.shape, old.dtype):
            now.data.copy_(old)


def _offer(fill: Fill) -> None:
    """Attention's scales are loaded by vLLM itself, at the end."""
    info = layerwise.get_layerwise_info(fill.layer)
    for name, new in fill.tensors.items():
        bound = inspect.signature(default_weight_loader).bind(param=getattr(fill.layer, name), loaded_weight=new)
        info.loaded_weights.append((name, bound))
        info.load_numel += new.numel()


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
