"""vLLM takes its weights from a running vLLM: load format ``presharded``, a plugin without patches.

``register`` is the entry point (group ``vllm.general_plugins``); vLLM calls it in every process that it starts.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Tell vLLM of the load format and of the weight-transfer engine. Idempotent; does nothing without vLLM.

    Starts no thread and imports no gRPC: processes that call it may fork afterwards.
    """
    try:
        from weightwire.engines.vllm import plugin  # noqa: PLC0415  (vLLM is optional)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "vllm":
            return
        raise
    plugin.register()
