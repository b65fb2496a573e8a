"""What vLLM is told of us: by name only, so that nothing of ours is imported before it is used."""

from __future__ import annotations

import os

from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor import model_loader

from weightwire.engines.vllm.loader import PreshardedLoader
from weightwire.engines.vllm.readiness import mark_launch

LOAD_FORMAT = "presharded"
TRANSFER_BACKEND = "weightwire"
SLEEP_BACKEND = "weightwire"


def register() -> None:
    """Register everything once a process; a second call, and a vLLM that knows us already, changes nothing."""
    mark_launch(os.environ)
    known: dict[str, type] = model_loader._LOAD_FORMAT_TO_MODEL_LOADER  # noqa: SLF001  (vLLM offers no way to ask)
    if known.get(LOAD_FORMAT) is not PreshardedLoader:
        model_loader.register_model_loader(LOAD_FORMAT)(PreshardedLoader)
    if SLEEP_BACKEND not in SleepModeBackendFactory._registry:  # noqa: SLF001  (as above)
        module = "weightwire.engines.vllm.sleep"
        SleepModeBackendFactory.register_backend(SLEEP_BACKEND, module, "PublishingSleepBackend")
    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:  # noqa: SLF001  (as above)
        WeightTransferEngineFactory.register_engine(
            TRANSFER_BACKEND, "weightwire.engines.vllm.refresh", "RefreshEngine"
        )
