from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from weightwire.engines.vllm import state
from weightwire.errors import CatalogueError, ManifestMismatch


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.alpha: float | None = 1.0
        self.input_scale: float | None = 0.5
        self.quant_method = SimpleNamespace(kernel_name="a", cache=[1])


def loaded() -> Layer:
    layer = Layer()
    layer.alpha, layer.input_scale = 2.0, None
    layer.quant_method.kernel_name = "b"
    return layer


def test_h05_h06_what_loading_set_travels_and_is_equal_afterwards() -> None:
    source, target = loaded(), Layer()
    decided = state.changed(state.plain(Layer()), state.plain(source))
    assert decided == {"": {"alpha": 2.0, "input_scale": None, "quant_method.kernel_name": "b"}}
    built = state.plain(target)
    state.apply(target, decided)
    assert (target.alpha, target.input_scale, target.quant_method.kernel_name) == (2.0, None, "b")
    assert state.changed(built, state.plain(target)) == decided


def test_nothing_is_decided_where_nothing_changed() -> None:
    assert state.changed(state.plain(Layer()), state.plain(Layer())) == {}


def test_what_vanished_cannot_be_told() -> None:
    layer = Layer()
    before = state.plain(layer)
    del layer.alpha
    with pytest.raises(CatalogueError, match="alpha"):
        state.changed(before, state.plain(layer))


@pytest.mark.parametrize(
    "offered",
    [
        {"nowhere": {"alpha": 2.0}},
        {"": {"beta": 2.0}},
        {"": {"linear": 2.0}},
        {"": {"quant_method": None}},
        {"": {"quant_method.cache": None}},
        {"": {"forward": None}},
        {"": {"__class__": "x"}},
        {"": {"alpha": 3.0}, "linear": {"weight": None}},
    ],
)
def test_only_plain_values_are_set_and_otherwise_nothing(offered: dict[str, dict[str, float | str | None]]) -> None:
    target = Layer()
    with pytest.raises(ManifestMismatch):
        state.apply(target, offered)
    assert target.alpha == 1.0
