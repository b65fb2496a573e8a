"""Things that a model may do to its own tensors, planted into vLLM's for the tests of what must come of them.

Each plant is a function of no argument that changes vLLM in this process, before anything is loaded.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

EPSILON = 0.25
"""Changes every answer."""


def _around(owner: Any, name: str, what: Callable[..., Any]) -> None:
    """``what(real, *args)`` runs in place of ``owner.name``."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return what(functools.partial(real, **kwargs), *args)

    setattr(owner, name, replaced)


def _on_construction(change: Callable[[Any], None]) -> None:
    from weightwire.engines.vllm.loader import PreshardedLoader

    def create(real: Callable[..., Any], *args: Any) -> Any:
        model = real(*args)
        change(model)
        return model

    _around(PreshardedLoader, "create_model", create)


def _on_disk_load(change: Callable[[Any], None]) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def load(real: Callable[..., Any], loader: Any, model: Any, *args: Any) -> None:
        real(loader, model, *args)
        change(model)

    _around(DefaultModelLoader, "load_weights", load)


def optional() -> None:
    """Construction makes a buffer ``late_scale`` that is not in the checkpoint."""
    import torch

    def add(model: Any) -> None:
        model.model.norm.register_buffer("late_scale", torch.ones(8))

    _on_construction(add)


def optional_dropped() -> None:
    """As ``optional``, and loading drops it: ``None`` means another kernel."""
    optional()

    def drop(model: Any) -> None:
        model.model.norm.late_scale = None

    _on_disk_load(drop)


def number() -> None:
    """Loading sets a plain number that decides what a kernel computes."""

    def change(model: Any) -> None:
        model.model.norm.variance_epsilon = EPSILON

    _on_disk_load(change)


def undeclared() -> None:
    """Construction hangs a tensor on a module that nobody knows anything about."""
    import torch

    def add(model: Any) -> None:
        model.model.norm.scratch = torch.zeros(8)

    _on_construction(add)


def references() -> None:
    """Construction keeps a list of references to what the model consists of; the embedding is looked up through it."""
    from torch.nn.functional import embedding

    def keep(model: Any) -> None:
        table = model.model.embed_tokens
        table.kept = [table.weight.detach()]
        object.__setattr__(table, "forward", lambda ids: embedding(ids, table.kept[0]))

    _on_construction(keep)


def in_place() -> None:
    """Processing enlarges every INT8 weight's scale where it is."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsLinearMethod,
    )

    def process(real: Callable[..., Any], method: Any, layer: Any) -> None:
        layer.weight_scale.data.mul_(1.25)
        real(method, layer)

    _around(CompressedTensorsLinearMethod, "process_weights_after_loading", process)


def watch() -> None:
    """Says in the log whether random numbers were made, or anything processed, before the peer's bytes had come."""
    import torch
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from weightwire.target.receiver import Receiver

    filled: list[bool] = []

    def say(what: str) -> None:
        if not filled:
            print(f"watched: {what}", file=sys.stderr, flush=True)

    def random(real: Callable[..., Any], tensor: Any, *args: Any) -> Any:
        say(f"random numbers for {tuple(tensor.shape)}")
        return real(tensor, *args)

    for name in ("normal_", "uniform_", "random_", "trunc_normal_", "kaiming_uniform_"):
        if hasattr(torch.Tensor, name):
            _around(torch.Tensor, name, random)

    def process(real: Callable[..., Any], *args: Any) -> None:
        say("processing")
        real(*args)

    def fill(real: Callable[..., Any], *args: Any) -> Any:
        done = real(*args)
        say("filled")
        filled.append(True)
        return done

    _around(UnquantizedLinearMethod, "process_weights_after_loading", process)
    _around(Receiver, "fill", fill)


PLANTS = {
    plant.__name__: plant for plant in (optional, optional_dropped, number, undeclared, references, in_place, watch)
}
