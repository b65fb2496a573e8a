"""A plugin of vLLM for the benchmark: writes down when a model is constructed, has its weights, and is processed.

No loader of vLLM says all three. Nothing is changed but that a line is written to standard error.
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def register() -> None:
    """The entry point; idempotent."""
    from vllm.model_executor.model_loader import base_loader

    _around(base_loader, "initialize_model", "construction began", "constructed")
    _around(base_loader, "process_weights_after_loading", "weights in place", "processed")


def write_site(root: Path) -> Path:
    """A directory to put on the Python path, which makes this a plugin of vLLM."""
    info = root / "vllm_marks-0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(__file__, root / "vllm_marks.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-marks\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nmarks = vllm_marks:register\n")
    return root


def _around(module: Any, name: str, before: str, after: str) -> None:
    inner: Callable[..., Any] = getattr(module, name)
    if hasattr(inner, "marked"):
        return

    @functools.wraps(inner)
    def marked(*args: Any, **kwargs: Any) -> Any:
        _mark(before)
        try:
            return inner(*args, **kwargs)
        finally:
            _mark(after)

    vars(marked)["marked"] = True
    setattr(module, name, marked)


def _mark(name: str) -> None:
    sys.stderr.write(f"bench mark {name} {time.monotonic():.4f}\n")
    sys.stderr.flush()
