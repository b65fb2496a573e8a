from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weightwire.errors import CatalogueError, ManifestMismatch, ProtocolError
from weightwire.manifest import state
from weightwire.manifest.catalogue import catalogue
from weightwire.manifest.records import Manifest
from weightwire.types import Json


class Scaled(nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.values = values

    def export_state(self) -> dict[str, Json]:
        return dict(self.values)

    def import_state(self, state: dict[str, Json]) -> None:
        self.values = dict(state)


def test_state_is_collected_by_canonical_path_and_applied() -> None:
    source, target = (nn.Sequential(Scaled(alpha=alpha), nn.ReLU(), Scaled()) for alpha in (2.5, 1.0))
    found = catalogue(source).layout.state
    assert found == {"0": {"alpha": 2.5}}
    assert state.differences(catalogue(target).layout.state, found) == ["state of 0: alpha differ"]
    state.apply(dict(target.named_modules()), found)
    assert catalogue(target).layout.state == found


def test_state_is_part_of_the_content_id() -> None:
    ids = {Manifest(layout=catalogue(Scaled(alpha=a)).layout, digests=b"").content_id for a in (1, 2, 1.0, True)}
    assert len(ids) == 4


@pytest.mark.parametrize(
    "bad",
    [
        {"x": float("nan")},
        {"x": object()},
        {"x": "y" * 70_000},
        {1: 2},
        {"x": 1 << 80},
        {"x": (1, 2)},
        {"x": [[[[[[[[[[1]]]]]]]]]]},
    ],
)
def test_state_that_is_not_small_finite_json_is_refused(bad: Any) -> None:
    module = Scaled()
    module.values = bad
    with pytest.raises(CatalogueError, match="state of the root module"):
        catalogue(module)
    with pytest.raises(ProtocolError):
        state.check({"m": bad})


def test_state_in_total_is_bounded() -> None:
    with pytest.raises(ProtocolError, match="too large"):
        state.check({f"m{i}": {"x": "y" * 65_000} for i in range(300)})


def test_nothing_is_applied_where_one_module_takes_none() -> None:
    target = nn.Sequential(Scaled(alpha=1), nn.ReLU())
    with pytest.raises(ManifestMismatch, match="state of 1, which takes none"):
        state.apply(dict(target.named_modules()), {"0": {"alpha": 2}, "1": {"x": 1}})
    assert catalogue(target).layout.state == {"0": {"alpha": 1}}


values = st.recursive(st.none() | st.booleans() | st.integers(-9, 9), lambda v: st.lists(v, max_size=2), max_leaves=4)
states = st.dictionaries(st.sampled_from("ab"), st.dictionaries(st.sampled_from("xy"), values, min_size=1, max_size=2))


@given(states, states)
def test_differences_are_found_exactly(one: Any, other: Any) -> None:
    assert bool(state.differences(one, other)) == (repr(sorted_deep(one)) != repr(sorted_deep(other)))


def sorted_deep(value: dict[str, dict[str, Any]]) -> list[Any]:
    return sorted((path, sorted(inner.items(), key=lambda item: item[0])) for path, inner in value.items())
