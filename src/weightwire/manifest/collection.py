"""Python's cycle collector, kept away from work that makes many small objects and no cycles."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pause the cycle collector, for a bounded piece of work; also a decorator.

    Descriptions of thousands of tensors are many small objects, none of them in a cycle, and a full collection of a
    heap with torch and a model in it (0.15 to 0.2 s) costs more than such work itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
