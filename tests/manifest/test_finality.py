"""Which leaves are final while a shard is being read, and the manifest that grows with them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.errors import ProtocolError
from weightwire.manifest.finality import Finality
from weightwire.manifest.leaves import LEAF_BYTES, canonical_order
from weightwire.manifest.provisional import Provisional
from weightwire.manifest.records import DIGEST_BYTES, Entry, Layout, Manifest, View
from weightwire.types import TensorClass


def entry(name: str, nbytes: int, kind: TensorClass = TensorClass.WEIGHT, aliases: tuple[str, ...] = ()) -> Entry:
    return Entry(
        name=name, dtype="uint8", shape=(nbytes,), order=(0,), kind=kind, nbytes=nbytes, aliases=aliases, views=()
    )


def layout(*entries: Entry) -> Layout:
    return Layout(entries=canonical_order(entries))


SIZES = st.sampled_from([0, 1, 100, LEAF_BYTES // 2, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES])


@given(sizes=st.lists(SIZES, max_size=12), derived=st.lists(SIZES, max_size=3), data=st.data())
def test_a_leaf_is_final_when_the_last_tensor_in_it_is_and_not_before(
    sizes: list[int], derived: list[int], data: st.DataObject
) -> None:
    named = {f"w{n:02d}": size for n, size in enumerate(sizes)}
    shard = layout(
        *(entry(name, size) for name, size in named.items()),
        *(entry(f"d{n}", size, TensorClass.DERIVED) for n, size in enumerate(derived)),
    )
    finality, final, told = Finality(shard), set[str](), list[int]()
    for name in data.draw(st.permutations(sorted(named))):
        final.add(name)
        told += finality.final([name])
        assert sorted(told) == _expected(shard, final)
        assert finality.final([name, "nobody's"]) == []
    told += finality.rest()
    assert sorted(told) == list(range(len(shard.leaves)))
    assert (finality.open, finality.rest()) == (0, [])


def _expected(shard: Layout, final: set[str]) -> list[int]:
    """By brute force: a leaf is final when every entry with bytes in it is."""
    ends = list(itertools.accumulate(each.nbytes for each in shard.entries))
    spans = [(end - each.nbytes, end, each.name) for end, each in zip(ends, shard.entries, strict=True)]
    return [
        index
        for index, leaf in enumerate(shard.leaves)
        if all(
            name in final
            for begin, end, name in spans
            if begin < end and begin < leaf.span.end and end > leaf.span.offset
        )
    ]


def test_an_alias_is_as_good_as_the_name_and_a_view_says_nothing() -> None:
    view = View(name="part", dtype="uint8", shape=(1,), stride=(1,), offset=0)
    shard = Layout(
        entries=(
            Entry(
                name="embed",
                dtype="uint8",
                shape=(5,),
                order=(0,),
                kind=TensorClass.WEIGHT,
                nbytes=5,
                aliases=("head",),
                views=(view,),
            ),
        )
    )
    assert Finality(shard).final(["part"]) == []
    assert Finality(shard).final(["head"]) == [0]


def test_derived_tensors_are_final_at_the_end_whatever_is_said_of_them() -> None:
    finality = Finality(layout(entry("w", 10), entry("cos", 10, TensorClass.DERIVED)))
    assert finality.final(["w", "cos"]) == [0]
    assert finality.rest() == [1]


# ---- the manifest


def digests(*leaves: int) -> bytes:
    return b"".join(leaf.to_bytes(DIGEST_BYTES, "little") for leaf in leaves)


def test_a_provisional_manifest_becomes_the_ordinary_one() -> None:
    shard = layout(entry("w", 4 * LEAF_BYTES), entry("v", 10))
    growing = Provisional(shard)
    growing.tell(2, digests(12, 13))
    growing.tell(2, digests(12, 13))
    assert (growing.known, growing.complete, growing.digest(3)) == (0b1100, False, digests(13))
    with pytest.raises(ProtocolError, match="3 leaves were never told"):
        growing.manifest()
    growing.tell(0, digests(10, 11, 12, 13, 14))
    made = Manifest(layout=shard, digests=digests(10, 11, 12, 13, 14))
    assert growing.manifest() == made
    assert growing.manifest().content_id == made.content_id


def test_a_digest_that_was_told_never_changes_and_none_is_taken_from_a_refused_message() -> None:
    growing = Provisional(layout(entry("w", 4 * LEAF_BYTES)))
    growing.tell(1, digests(1))
    with pytest.raises(ProtocolError, match="leaf 1 was final with another digest"):
        growing.tell(0, digests(7, 8, 9))
    assert growing.known == 0b10
    assert growing.between(0, 4) == digests(0, 1, 0, 0)


@pytest.mark.parametrize(("first", "told"), [(-1, b"x" * 16), (4, b"x" * 16), (3, b"x" * 32), (0, b"x" * 15)])
def test_digests_of_leaves_that_are_not_there_are_refused(first: int, told: bytes) -> None:
    growing = Provisional(layout(entry("w", 4 * LEAF_BYTES)))
    with pytest.raises(ProtocolError, match="digest bytes"):
        growing.tell(first, told)
    assert growing.known == 0


def test_a_layouts_digest_says_what_a_read_means_and_nothing_of_the_bytes() -> None:
    one = layout(entry("w", 10), entry("cos", 3, TensorClass.DERIVED))
    assert one.digest == layout(entry("w", 10), entry("cos", 3, TensorClass.DERIVED)).digest
    others = [
        layout(entry("w", 10)),
        layout(entry("w", 11), entry("cos", 3, TensorClass.DERIVED)),
        layout(entry("w", 10), entry("cos", 3)),
        Layout(entries=one.entries, state={"m": {"alpha": 2}}),
        Layout(entries=one.entries, absent=("bias",)),
    ]
    assert len({each.digest for each in (one, *others)}) == 6


def test_a_manifest_without_digests_is_provisional_and_nobodys() -> None:
    shard = layout(entry("w", 10))
    assert Manifest(layout=shard, digests=b"").provisional
    assert not Manifest(layout=shard, digests=digests(0)).provisional
    assert not Manifest(layout=layout(), digests=b"").provisional
