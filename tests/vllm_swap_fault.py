"""Mixed into vLLM's workers (``--worker-extension-cls``): a swap fails after half of the layers have new weights."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader.reload import layerwise


class Extension:
    """Nothing: importing this is enough."""


def _fail(*_: Any) -> None:
    raise RuntimeError("made to fail")


assert hasattr(layerwise, "_finalize_attention_layer")
vars(layerwise)["_finalize_attention_layer"] = _fail
