"""Whether processed bytes may travel: never by declaration alone (the CPU declares it of weights that it removes)."""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from weightwire.manifest.records import Layout
from weightwire.types import TensorClass


def undeclared(model: nn.Module) -> str:
    """The first module whose method does not support processed weights; empty where all do."""
    for path, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and not method.supports_pre_processed_weights:
            return f"{path or 'the model'} uses {type(method).__name__}, which does not support processed weights"
    return ""


def lost(raw: Layout, processed: Layout) -> str:
    """The first weight of ``raw`` that processing emptied, removed or changed the shape of; empty where none was."""
    after = {entry.name: entry for entry in processed.entries}
    for entry in raw.entries:
        if entry.kind is not TensorClass.WEIGHT:
            continue
        now = after.get(entry.name)
        if now is None:
            return f"{entry.name} vanished when it was processed"
        if now.nbytes == 0 and entry.nbytes > 0:
            return f"{entry.name} became empty when it was processed"
        if (now.shape, now.dtype) != (entry.shape, entry.dtype):
            return f"{entry.name} changed its shape when it was processed"
    return ""
