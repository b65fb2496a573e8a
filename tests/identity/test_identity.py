from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.errors import ConfigError, IdentityMismatch, ProtocolError
from weightwire.identity.explain import render
from weightwire.identity.identity import Identity, module_identity
from weightwire.types import Coordinates, Role, Stage

BASE: dict[str, Any] = {
    "model_id": "org/model",
    "architecture": "LlamaForCausalLM",
    "dtype": "bfloat16",
    "engine": "native",
    "engine_version": "1",
    "config_digest": "aa",
    "quantization": "fp8",
    "quantization_digest": "bb",
    "role": Role.TARGET,
    "stage": Stage.LOADED,
    "layout_id": "backend=torch",
    "expert_map_digest": "cc",
    "extra": {"k": "v"},
    "tp_size": 2,
    "pp_size": 2,
    "ep_size": 2,
    "dp_size": 2,
    "dp_decides_bytes": True,
    "revision": "r1",
}
CHANGES: dict[str, Any] = {
    "model_id": "org/other",
    "architecture": "Other",
    "dtype": "float16",
    "engine": "vllm",
    "engine_version": "2",
    "config_digest": "ab",
    "quantization": None,
    "quantization_digest": "bc",
    "role": Role.DRAFT,
    "stage": Stage.PROCESSED,
    "layout_id": "backend=cutlass",
    "expert_map_digest": "cd",
    "extra": {"k": "w"},
    "tp_size": 4,
    "pp_size": 4,
    "ep_size": 4,
    "dp_size": 4,
    "dp_decides_bytes": False,
}
text = st.text(st.characters(categories=["L", "N", "P"], exclude_characters="/\\:~."), min_size=1, max_size=12)
optional = st.none() | text
identities = st.builds(
    Identity,
    model_id=text,
    architecture=text,
    dtype=st.sampled_from(["bfloat16", "float32"]),
    engine=text,
    engine_version=text,
    quantization=optional,
    layout_id=text,
    role=st.sampled_from(Role),
    stage=st.sampled_from(Stage),
    extra=st.dictionaries(text, text, max_size=3),
    tp_size=st.integers(1, 8),
    dp_size=st.integers(1, 8),
    dp_decides_bytes=st.booleans(),
    revision=optional,
)


def test_the_table_of_changes_has_every_field() -> None:
    assert {one.name for one in dataclasses.fields(Identity)} == {*CHANGES, "revision"}


@pytest.mark.parametrize("field", CHANGES)
def test_h43_every_field_changes_the_key_and_is_explained(field: str) -> None:
    ours, theirs = Identity(**BASE), Identity(**{**BASE, field: CHANGES[field]})
    assert ours.replica_key != theirs.replica_key
    assert ours.canonical_json() != theirs.canonical_json()
    (difference,) = ours.explain(theirs)
    assert difference.field.startswith(field)
    assert difference.hashed
    with pytest.raises(IdentityMismatch, match=field):
        ours.require_match(theirs)


@given(identities, identities)
def test_h43_keys_are_equal_only_where_no_hashed_field_differs(one: Identity, other: Identity) -> None:
    hashed = [difference for difference in one.explain(other) if difference.hashed]
    assert (one.replica_key == other.replica_key) == (not hashed)


def test_revision_is_not_hashed_but_explained() -> None:
    ours, theirs = Identity(**BASE), Identity(**{**BASE, "revision": "r2"})
    assert ours.replica_key == theirs.replica_key
    ours.require_match(theirs)
    assert render(ours.explain(theirs)) == "revision: r1 here, r2 there (not part of the key)"
    assert render(ours.explain(ours)) == "the identities are equal"


def test_dp_counts_only_where_it_decides_bytes() -> None:
    ours, theirs = (Identity(**{**BASE, "dp_decides_bytes": False, "dp_size": size}) for size in (1, 4))
    assert ours.replica_key == theirs.replica_key
    assert [one.hashed for one in ours.explain(theirs)] == [False]
    ranks = [Coordinates(tp_size=2, pp_size=2, ep_size=2, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    assert len({ours.shard_key(rank) for rank in ranks}) == 1
    assert len({Identity(**BASE).shard_key(rank) for rank in ranks}) == 2


@pytest.mark.parametrize("axis", ["tp", "pp", "ep", "dp"])
def test_family_key_leaves_sizes_out(axis: str) -> None:
    other = Identity(**{**BASE, f"{axis}_size": 4})
    assert other.family_key == Identity(**BASE).family_key
    assert other.replica_key != Identity(**BASE).replica_key


def test_shard_keys_differ_by_coordinate() -> None:
    identity = Identity(**{**BASE, "dp_decides_bytes": False})
    keys = {
        identity.shard_key(Coordinates(tp_rank=t, tp_size=2, pp_rank=p, pp_size=2, ep_rank=e, ep_size=2))
        for t in (0, 1)
        for p in (0, 1)
        for e in (0, 1)
    }
    assert len(keys) == 8
    with pytest.raises(ConfigError, match="tp_size"):
        identity.shard_key(Coordinates(tp_size=3, pp_size=2, ep_size=2))


@given(identities)
def test_round_trips(identity: Identity) -> None:
    assert Identity.from_dict(identity.to_dict()) == identity
    assert hash(pickle.loads(pickle.dumps(identity))) == hash(identity)
    assert copy.deepcopy(identity).shard_key(_rank(identity)) == identity.shard_key(_rank(identity))


def _rank(identity: Identity) -> Coordinates:
    return Coordinates(tp_size=identity.tp_size, dp_size=identity.dp_size)


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": ""},
        {"model_id": "/data/model"},
        {"model_id": "../model"},
        {"model_id": "~/model"},
        {"model_id": "C:\\model"},
        {"architecture": "a\nb"},
        {"dtype": "x" * 2000},
        {"tp_size": 0},
        {"tp_size": True},
        {"tp_size": 1.0},
        {"stage": "LOADED"},
        {"stage": Stage.PROCESSED, "layout_id": ""},
        {"quantization": ""},
        {"extra": {"k": 1}},
        {"extra": {"k\0": "v"}},
        {"extra": {str(i): "" for i in range(100)}},
        {"dp_decides_bytes": 1},
        {"revision": 7},
    ],
)
def test_illegal_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Identity(**{**BASE, **change})


@pytest.mark.parametrize("change", [{"stage": "RAW"}, {"role": None}, {"tp_size": "2"}, {"surplus": 1}, {"extra": []}])
def test_from_dict_refuses_what_a_stranger_may_send(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Identity.from_dict({**Identity(**BASE).to_dict(), **change})
    with pytest.raises(ProtocolError):
        Identity.from_dict("nonsense")
    with pytest.raises(ProtocolError):
        Identity.from_dict({"model_id": "only"})


def test_with_stage_changes_the_key_and_needs_a_layout() -> None:
    raw = module_identity("m", "Net", "float32", {"width": 3}, revision="a")
    assert raw.stage is Stage.LOADED
    with pytest.raises(ConfigError, match="layout_id"):
        raw.with_stage(Stage.PROCESSED)
    processed = raw.with_stage(Stage.PROCESSED, "backend=torch")
    assert processed.replica_key != raw.replica_key
    assert processed.revision == "a"


def test_module_identity_digests_the_config() -> None:
    one, other = (module_identity("m", "Net", "float32", {"width": width}) for width in (3, 4))
    assert [difference.field for difference in one.explain(other)] == ["config_digest"]
