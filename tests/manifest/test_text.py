from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.errors import ManifestMismatch, ProtocolError
from weightwire.manifest.boxes import Box
from weightwire.manifest.leaves import canonical_order
from weightwire.manifest.offered import Offered
from weightwire.manifest.plan import TransferPlan, plan
from weightwire.manifest.records import DIGEST_BYTES, FORMAT, Entry, Layout, Manifest, View
from weightwire.manifest.sharding import Piece, Sharding, opaque
from weightwire.manifest.text import MAX_LISTS, read, write
from weightwire.types import TensorClass

VIEW = View(name='v"],[', dtype="int32", shape=(2,), stride=(3,), offset=4)
PIECE = Piece("q", (8, 4), Box((2, 0), (2, 4)), (0, 0))
SHARDINGS = (None, opaque("swizzled \\ \u00fc"), Sharding((PIECE,), (Box((2, 0), (1, 4)),)))

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=6)
entries = st.builds(
    Entry,
    name=names,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    shape=st.sampled_from([(), (0, 4), (3, 4), (1 << 19,)]),
    order=st.sampled_from([(), (0, 1), (1, 0)]),
    kind=st.sampled_from([TensorClass.WEIGHT, TensorClass.DERIVED]),
    nbytes=st.integers(0, 1 << 44),
    aliases=st.lists(names, max_size=2).map(tuple),
    views=st.sampled_from([(), (VIEW,), (VIEW, replace(VIEW, shape=(), stride=()))]),
    sharding=st.sampled_from(SHARDINGS),
)
layouts = st.lists(entries, max_size=6, unique_by=lambda entry: entry.name).map(
    lambda parts: Layout(entries=canonical_order(parts))
)


@given(layouts)
def test_a_layout_is_read_as_it_was_written(layout: Layout) -> None:
    assert read(write(layout)) == layout.entries


@given(layouts, layouts)
def test_texts_are_equal_exactly_where_layouts_are(one: Layout, other: Layout) -> None:
    assert (one.text == other.text) == (one == other)
    assert one.text == Layout(entries=one.entries).text


@given(layouts, st.data())
def test_h39_a_text_that_was_tampered_with_is_refused_or_means_what_it_says(
    layout: Layout, data: st.DataObject
) -> None:
    text = layout.text
    part = data.draw(st.sampled_from(["weights", "derived", "shardings"]))
    raw = bytearray(getattr(text, part))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    changed = replace(text, **{part: bytes(raw)})
    try:
        found = Layout(entries=read(changed))
    except ProtocolError:
        return
    assert (found.text.weights, found.text.derived) == (changed.weights, changed.derived)


def test_h39_lists_are_counted_before_any_is_made() -> None:
    text = replace(Layout(entries=()).text, weights=b"[" + b"[]," * MAX_LISTS + b"[]]")
    with pytest.raises(ProtocolError, match="too many lists"):
        read(text)


def test_ids_are_hashes_of_what_the_protocol_says() -> None:
    weight = Entry(
        name="w\u00fc", dtype="int8", shape=(2, 3), order=(1, 0), kind=TensorClass.WEIGHT, nbytes=6, aliases=("z",)
    )
    derived = replace(weight, name="d", kind=TensorClass.DERIVED, aliases=(), views=(replace(VIEW, name="v"),))
    layout = Layout(entries=(weight, derived), state={"m": {"b": 1.5, "a": None}}, absent=("bias",))
    manifest = Manifest(layout=layout, digests=b"1" * DIGEST_BYTES + b"2" * DIGEST_BYTES)

    def hashed(digest: bytes, row: list[object], **more: object) -> str:
        head = json.dumps({"format": FORMAT, **more}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256((head + json.dumps([row], separators=(",", ":"))).encode() + digest).hexdigest()

    told = {"kind": "weight", "state": {"m": {"a": None, "b": 1.5}}, "absent": ["bias"]}
    row = ["w\u00fc", "int8", [2, 3], [1, 0], 6, ["z"], []]
    assert manifest.content_id == hashed(b"1" * DIGEST_BYTES, row, **told)
    row = ["d", "int8", [2, 3], [1, 0], 6, [], [["v", "int32", [2], [3], 4]]]
    assert manifest.derived_id == hashed(b"2" * DIGEST_BYTES, row, kind="derived")
    assert Offered.of(manifest).ids == (manifest.content_id, manifest.derived_id)


small = st.dictionaries(
    st.sampled_from("abcd"),
    st.tuples(st.integers(0, 2), st.sampled_from(["float32", "int32"]), st.sampled_from(list(TensorClass)[:2])),
    max_size=4,
).map(
    lambda parts: Layout(
        entries=canonical_order(
            Entry(name=name, dtype=dtype, shape=(size,), order=(0,), kind=kind, nbytes=4 * size)
            for name, (size, dtype, kind) in parts.items()
        )
    )
)


def outcome(make: Callable[[], TransferPlan]) -> object:
    try:
        made = make()
    except ManifestMismatch as error:
        return str(error)
    return made.manifest, made.leaves, made.copies


@given(small, small)
def test_what_is_not_taken_apart_is_planned_as_what_is(expected: Layout, layout: Layout) -> None:
    manifest = Manifest(layout=layout, digests=bytes(DIGEST_BYTES * len(layout.leaves)))
    found = outcome(lambda: Offered.of(manifest).plan(expected))
    assert found == outcome(lambda: plan(expected, manifest))
    assert isinstance(found, tuple) == (expected == layout)


@pytest.mark.parametrize("digests", [b"", bytes(DIGEST_BYTES - 1), bytes(2 * DIGEST_BYTES)])
def test_h39_the_number_of_digests_must_fit_also_where_texts_are_equal(digests: bytes) -> None:
    layout = Layout(entries=(Entry(name="a", dtype="int8", shape=(6,), order=(0,), kind=TensorClass.WEIGHT, nbytes=6),))
    offered = replace(Offered.of(Manifest(layout=layout, digests=bytes(DIGEST_BYTES))), digests=digests)
    with pytest.raises(ProtocolError, match="digest bytes"):
        offered.plan(layout)
    with pytest.raises(ProtocolError, match="digest bytes"):
        _ = offered.manifest
