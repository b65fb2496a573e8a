from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from manifest_support import fill, manifest_of, randomise
from torch import nn

from weightwire.errors import ManifestMismatch, ProtocolError
from weightwire.manifest.catalogue import catalogue
from weightwire.manifest.leaves import canonical_order
from weightwire.manifest.plan import plan, validate, validate_manifest
from weightwire.manifest.records import DIGEST_BYTES, Entry, Layout, Manifest, View
from weightwire.types import TensorClass


def entry(name: str, shape: tuple[int, ...] = (4, 6), **fields: Any) -> Entry:
    count = 1
    for size in shape:
        count *= size
    given_ = {"order": tuple(range(len(shape))), "kind": TensorClass.WEIGHT, "nbytes": count * 4, "dtype": "float32"}
    return Entry(name=name, shape=shape, **{**given_, **fields})


def layout(*entries: Entry, **fields: Any) -> Layout:
    return Layout(entries=canonical_order(entries), **fields)


def offer(given_: Layout) -> Manifest:
    return Manifest(layout=given_, digests=bytes(DIGEST_BYTES * len(given_.leaves)))


def test_equal_layouts_plan_every_leaf_and_no_copy() -> None:
    derived = entry("d", kind=TensorClass.DERIVED)
    both = layout(entry("a", (1 << 19,)), entry("b"), derived, state={"m": {"alpha": 1.5}}, absent=("bias",))
    found = plan(both, offer(both))
    assert list(found.leaves) == [0, 1, 2, 3]
    assert (found.layout, found.copies) == (both, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int32"}, "a has dtype float32 here and int32 at the source"),
        ({"shape": (6, 4)}, "shape [4, 6] here and [6, 4] at the source"),
        ({"shape": (24,), "order": (0,)}, "shape [4, 6] here and [24] at the source"),
        ({"order": (1, 0)}, "element order [0, 1] here and [1, 0] at the source"),
        ({"kind": TensorClass.DERIVED}, "class weight here and derived at the source"),
    ],
)
def test_h19_equal_size_with_another_meaning_is_refused(change: dict[str, Any], message: str) -> None:
    mine, theirs = entry("a"), replace(entry("a"), **change)
    assert mine.nbytes == theirs.nbytes
    with pytest.raises(ManifestMismatch) as caught:
        plan(layout(mine, entry("z")), offer(layout(theirs, entry("z"))))
    assert message in str(caught.value)


def test_h21_names_on_one_side_only_are_an_error_with_names_and_counts() -> None:
    common = [entry(f"c{i}") for i in range(3)]
    mine = layout(*common, *(entry(f"mine{i}") for i in range(5)))
    theirs = layout(*common, entry("theirs"))
    with pytest.raises(ManifestMismatch) as caught:
        plan(mine, offer(theirs))
    assert "only here: mine0, mine1, mine2 and 2 more; only at the source: theirs" in str(caught.value)
    for one, other in ((layout(*common), theirs), (theirs, layout(*common))):
        with pytest.raises(ManifestMismatch, match="theirs"):
            plan(one, offer(other))


def test_differences_of_several_tensors_come_in_one_line() -> None:
    mine = layout(*(entry(f"t{i}") for i in range(6)))
    theirs = layout(*(entry(f"t{i}", (6, 4)) for i in range(6)))
    with pytest.raises(ManifestMismatch) as caught:
        plan(mine, offer(theirs))
    assert "t0" in str(caught.value)
    assert "(and 3 more)" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("here", [True, False])
def test_none_on_one_side_is_refused(here: bool) -> None:
    full, without = layout(entry("a"), entry("bias")), layout(entry("a"), absent=("bias",))
    mine, theirs = (without, full) if here else (full, without)
    with pytest.raises(ManifestMismatch, match=f"bias is None {'here' if here else 'at the source'}"):
        plan(mine, offer(theirs))
    with pytest.raises(ManifestMismatch, match="bias is an optional tensor"):
        plan(layout(entry("a")), offer(without))


def test_declared_state_is_compared() -> None:
    mine, theirs = (layout(entry("a"), state={"mlp": {"alpha": alpha, "beta": 0}}) for alpha in (1, 2))
    with pytest.raises(ManifestMismatch, match="state of mlp: alpha differ"):
        plan(mine, offer(theirs))
    with pytest.raises(ManifestMismatch, match="state of mlp"):
        plan(layout(entry("a")), offer(theirs))


@pytest.mark.parametrize("change", [{"offset": 8}, {"stride": (1, 4)}, {"shape": (2, 2)}, {"dtype": "int32"}])
def test_views_are_compared(change: dict[str, Any]) -> None:
    view = View(name="v", dtype="float32", shape=(2, 3), stride=(6, 1), offset=4)
    mine = layout(entry("a", views=(view,)))
    assert not plan(mine, offer(mine)).copies
    with pytest.raises(ManifestMismatch, match="v shows other bytes of a"):
        plan(mine, offer(layout(entry("a", views=(replace(view, **change),)))))
    for one, other in ((mine, layout(entry("a"), entry("v"))), (layout(entry("a"), entry("v")), mine)):
        with pytest.raises(ManifestMismatch, match=r"v is a (view here|tensor of its own here)"):
            plan(one, offer(other))


def test_a_view_of_another_entry_is_refused() -> None:
    view = View(name="v", dtype="float32", shape=(2,), stride=(1,), offset=0)
    with pytest.raises(ManifestMismatch, match="v shows other bytes of a"):
        plan(layout(entry("a", views=(view,)), entry("b")), offer(layout(entry("a"), entry("b", views=(view,)))))


def test_h61_tied_here_but_separate_there_is_refused_by_name() -> None:
    mine = layout(entry("embed", aliases=("head",)))
    with pytest.raises(ManifestMismatch, match=r"embed and head are tied here, separate there: .* build facts"):
        plan(mine, offer(layout(entry("embed"), entry("head"))))


def test_one_tie_under_another_canonical_name_is_the_same_tie() -> None:
    mine, theirs = layout(entry("a", aliases=("b",))), layout(entry("b", aliases=("a",)))
    assert plan(mine, offer(theirs)).copies == ()


class Embedded(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.c = nn.Linear(4, 4, bias=False)
        if tied:
            self.c.weight = self.b.weight


def test_tied_there_but_separate_here_is_copied_after_verification() -> None:
    source, target = Embedded(tied=True), Embedded(tied=False)
    randomise(source)
    there, here = catalogue(source), catalogue(target)
    found = plan(here.layout, manifest_of(there))
    assert found.copies == (("b.weight", "c.weight"),)
    here.poison()
    fill(here.bind(found.layout), there.memory)
    here.apply_copies(found.copies)
    assert torch.equal(target.a.weight, source.a.weight)
    assert torch.equal(target.c.weight, source.b.weight)
    assert torch.equal(target.b.weight, source.b.weight)
    assert target.c.weight.data_ptr() != target.b.weight.data_ptr()


GOOD = layout(
    entry("a", aliases=("z",), views=(View(name="v", dtype="float32", shape=(2, 3), stride=(6, 1), offset=4),)),
    entry("b", (3,)),
    absent=("bias",),
)


def hostile() -> Iterator[Any]:
    view = GOOD.entries[0].views[0]

    def first(**fields: Any) -> Layout:
        return Layout(entries=(replace(GOOD.entries[0], **fields), GOOD.entries[1]), absent=GOOD.absent)

    for name in ("", "b", "v", "z", "bias", "x" * 5000, "a\0", "a\n", 7, None):
        yield pytest.param(first(name=name), id=f"name {str(name)[:8]!r}")
    for fields in (
        {"dtype": "object"},
        {"dtype": None},
        {"dtype": "float64"},
        {"nbytes": 97},
        {"nbytes": -96},
        {"nbytes": 96.0},
        {"nbytes": 1 << 70},
        {"shape": (-4, -6)},
        {"shape": (4, 6.0)},
        {"shape": (True, 24)},
        {"shape": (1 << 40, 1 << 40), "nbytes": 1 << 82},
        {"shape": (1,) * 65, "order": tuple(range(65)), "nbytes": 4},
        {"order": (0,)},
        {"order": (0, 0)},
        {"order": (0, 2)},
        {"order": (0, "1")},
        {"shape": (24, 1), "order": (1, 0)},
        {"kind": TensorClass.RUNTIME},
        {"kind": "weight"},
        {"aliases": ("z", "y")},
        {"aliases": ("z", "z")},
        {"aliases": ("b",)},
        {"views": (replace(view, offset=-4),)},
        {"views": (replace(view, offset=1 << 62),)},
        {"views": (replace(view, offset=64),)},
        {"views": (replace(view, stride=(6,)),)},
        {"views": (replace(view, stride=(-6, 1)),)},
        {"views": (replace(view, shape=(1 << 50, 3)),)},
        {"views": (replace(view, dtype="void"),)},
        {"views": (view, view)},
        {"views": (replace(view, name="w"), view)},
    ):
        yield pytest.param(first(**fields), id=str(fields)[:60])
    yield pytest.param(replace(GOOD, entries=tuple(reversed(GOOD.entries))), id="order of entries")
    yield pytest.param(replace(GOOD, absent=("d", "c")), id="unsorted absent")
    yield pytest.param(replace(GOOD, absent=("a",)), id="absent is there")
    yield pytest.param(replace(GOOD, state={"m": {"x": float("inf")}}), id="infinite state")
    yield pytest.param(replace(GOOD, state={"m": {"x": "y" * 100_000}}), id="large state")
    yield pytest.param(replace(GOOD, state={"m": "text"}), id="state is text")  # type: ignore[dict-item]
    huge = tuple(entry(f"h{i:03}", (1 << 40,)) for i in range(8))
    yield pytest.param(Layout(entries=huge), id="16 TiB and more")


def test_the_layout_that_hostile_ones_are_made_from_is_good() -> None:
    validate_manifest(offer(GOOD))


@pytest.mark.parametrize("bad", list(hostile()))
def test_h39_a_hostile_layout_is_refused_before_anything_is_allocated(bad: Layout) -> None:
    with pytest.raises(ProtocolError, match="offered"):
        validate(bad)
    with pytest.raises(ProtocolError):
        plan(GOOD, Manifest(layout=bad, digests=b""))


@pytest.mark.parametrize("digests", [b"", bytes(DIGEST_BYTES - 1), bytes(2 * DIGEST_BYTES)])
def test_h39_the_number_of_digests_must_fit_before_leaves_are_cut(digests: bytes) -> None:
    with pytest.raises(ProtocolError, match="digest"):
        plan(GOOD, Manifest(layout=GOOD, digests=digests))
    claimed = layout(entry("a", (1 << 41,)))
    with pytest.raises(ProtocolError, match="digest"):
        plan(claimed, Manifest(layout=claimed, digests=digests))
    assert "leaves" not in claimed.__dict__


names = st.sampled_from("abcdef")
layouts = st.dictionaries(names, st.tuples(st.integers(0, 3), st.sampled_from(["float32", "int32"])), max_size=5).map(
    lambda parts: layout(*(entry(name, (size,), dtype=dtype) for name, (size, dtype) in parts.items()))
)


@given(layouts, layouts)
def test_h61_only_equal_untied_layouts_make_a_plan(one: Layout, other: Layout) -> None:
    if one.entries == other.entries:
        assert plan(one, offer(other)).layout == one
    else:
        with pytest.raises(ManifestMismatch):
            plan(one, offer(other))


def partitioned(partition: dict[str, int]) -> Layout:
    groups: dict[int, list[str]] = {}
    for name, group in sorted(partition.items()):
        groups.setdefault(group, []).append(name)
    return layout(*(entry(first, aliases=tuple(rest)) for first, *rest in groups.values()))


same_names = st.fixed_dictionaries({name: st.integers(0, 3) for name in "abcd"})


@given(same_names, same_names)
def test_h61_a_target_may_be_tied_less_than_its_source_never_more(here: dict[str, int], there: dict[str, int]) -> None:
    pairs = [(x, y) for x in "abcd" for y in "abcd" if x < y]
    finer = all(there[x] == there[y] for x, y in pairs if here[x] == here[y])
    mine, theirs = partitioned(here), partitioned(there)
    if not finer:
        with pytest.raises(ManifestMismatch, match="tied here, separate there"):
            plan(mine, offer(theirs))
        return
    filled = {e.name for e in mine.entries}
    copies = plan(mine, offer(theirs)).copies
    assert len(copies) == len(mine.entries) - len(theirs.entries)
    assert {to for _, to in copies} | {start for start, _ in copies} <= filled
    assert all(there[start] == there[to] for start, to in copies)
