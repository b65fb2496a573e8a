"""Published raw bytes stay as they are while vLLM processes the weights: copy-on-transform around each module.

vLLM runs ``quant_method.process_weights_after_loading(module)`` over all modules by itself and has no hook in between.
So the two methods are shadowed by instance attributes for the time of the load; no class of vLLM's is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from weightwire.source.budget import RAW_BUDGET
from weightwire.source.snapshot import Snapshot, own_tensors, storages

METHOD = "process_weights_after_loading"
UNCHANGING = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""Methods that leave weights on a device as they are, and replace them on a CPU: they write into none."""


@contextlib.contextmanager
def guarded(model: nn.Module, snapshot: Snapshot) -> Iterator[None]:
    """Inside, whatever processing changes in place is changed in a copy."""
    shadowed: list[Any] = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and METHOD not in vars(method):
            setattr(method, METHOD, _by_layer(snapshot, method.process_weights_after_loading, method))
            shadowed.append(method)
        if is_deferred_attention_layer(module) and METHOD not in vars(module):
            object.__setattr__(module, METHOD, _by_owner(snapshot, module, getattr(module, METHOD)))
            shadowed.append(module)
    try:
        yield
    finally:
        for holder in shadowed:
            vars(holder).pop(METHOD, None)


def over_budget(model: nn.Module) -> str:
    """Why raw bytes must not be held beside processed ones here; empty where they may. Host memory is free."""
    held = [
        tensor for module in model.modules() for tensor in own_tensors(module).values() if tensor.device.type != "cpu"
    ]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in held)}
    touched = [
        tensor
        for module in model.modules()
        if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)
        and type(module.quant_method) not in UNCHANGING
        for tensor in own_tensors(module).values()
        if tensor.device.type != "cpu"
    ]
    cost, shard = sum(sizes[pointer] for pointer in storages(touched)), sum(sizes.values())
    if cost <= shard * RAW_BUDGET:
        return ""
    return f"holding raw weights could cost {cost} bytes of device memory, more than {RAW_BUDGET:.0%} of {shard}"


def _by_layer(snapshot: Snapshot, run: Callable[..., Any], method: QuantizeMethodBase) -> Callable[..., Any]:
    writes = type(method) not in UNCHANGING

    def process(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with snapshot.guard(layer, writes=writes):
            return run(layer, *args, **kwargs)

    return process


def _by_owner(snapshot: Snapshot, owner: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    def process(*args: Any, **kwargs: Any) -> Any:
        with snapshot.guard(owner):
            return run(*args, **kwargs)

    return process
