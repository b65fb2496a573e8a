from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.errors import ConfigError
from weightwire.identity.config import COSMETIC, config_digest
from weightwire.identity.identity import Identity
from weightwire.identity.layout import layout_id
from weightwire.identity.revision import compatible, refusal
from weightwire.types import Stage

HARDWARE = {"kernel_backend": "torch", "device_architecture": "cpu", "transform_protocol": "1"}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5))
def test_config_digest_ignores_the_order_of_keys(config: dict[str, object]) -> None:
    assert config_digest(config) == config_digest(dict(reversed(config.items())))


def test_config_digest_ignores_cosmetic_keys_at_every_level() -> None:
    plain = {"hidden": 4, "text_config": {"layers": 2}}
    dressed = {**plain, "_name_or_path": "/a", "text_config": {"layers": 2, "transformers_version": "5"}}
    assert config_digest(plain) == config_digest(dressed)
    assert {"_name_or_path", "transformers_version"} <= COSMETIC


def test_config_digest_leaves_the_dtype_to_the_identity_at_the_top_only() -> None:
    plain = {"hidden": 4, "vision": {"dtype": "float32"}}
    assert config_digest(plain) == config_digest({**plain, "torch_dtype": "bfloat16", "dtype": "x"})
    assert config_digest(plain) != config_digest({**plain, "vision": {"dtype": "bfloat16"}})


def test_h43_config_digest_sees_every_other_value() -> None:
    plain = {"hidden": 4, "rope": {"theta": 1e4}, "tie_word_embeddings": True}
    for change in ({"hidden": 5}, {"rope": {"theta": 5e5}}, {"tie_word_embeddings": False}, {"new": None}):
        assert config_digest(plain) != config_digest({**plain, **change})


@pytest.mark.parametrize("config", [{"x": float("nan")}, {"x": object()}, {1: 2}, {"x": "y" * (5 << 20)}])
def test_config_digest_refuses_what_is_not_plain_json(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        config_digest(config)


def test_h66_undeclared_raw_bytes_name_their_hardware() -> None:
    ids = {
        layout_id(Stage.LOADED, **{**HARDWARE, "device_architecture": device}, raw_layouts=["plain@1", None])
        for device in ("cpu", "sm90", "sm100")
    }
    assert len(ids) == 3
    keys = {
        Identity(model_id="m", architecture="A", dtype="bfloat16", engine="e", layout_id=one).replica_key for one in ids
    }
    assert len(keys) == 3


def test_h66_declared_raw_bytes_are_shared_between_unlike_hardware_but_not_between_versions() -> None:
    def raw(device: str, *names: str | None) -> str:
        return layout_id(Stage.LOADED, **{**HARDWARE, "device_architecture": device}, raw_layouts=names)

    assert raw("cpu", "plain@1", "fp8@2") == raw("sm90", "fp8@2", "plain@1", "plain@1")
    assert raw("cpu", "plain@1") != raw("cpu", "plain@2")
    assert raw("cpu") == ""


def test_h66_processed_bytes_always_name_their_hardware() -> None:
    processed = layout_id(Stage.PROCESSED, **HARDWARE, raw_layouts=["plain@1"])
    assert "backend=torch" in processed
    assert "device=cpu" in processed
    assert len(layout_id(Stage.LOADED, **HARDWARE, raw_layouts=[f"m{i}@1" for i in range(500)])) < 100


@pytest.mark.parametrize(
    ("wanted", "offered", "unpinned", "taken"),
    [
        ("a", "a", False, True),
        ("a", "b", False, False),
        ("a", "b", True, False),
        ("a", None, True, False),
        (None, "a", False, False),
        (None, None, False, False),
        (None, "a", True, True),
        (None, None, True, True),
    ],
)
def test_revision_is_a_constraint(wanted: str | None, offered: str | None, unpinned: bool, taken: bool) -> None:
    assert compatible(wanted, offered, accept_unpinned=unpinned) is taken
    assert (refusal(wanted, offered, accept_unpinned=unpinned) == "") is taken
