"""One rank filled from the ranks of a replica of another size, against whole tensors that torch cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_support import logical_bytes, manifest_of
from torch import nn

from weightwire.errors import CatalogueError, DigestMismatch, ManifestMismatch, ProtocolError
from weightwire.manifest.boxes import Box, byte_runs, flat_boxes
from weightwire.manifest.catalogue import Catalogue, catalogue
from weightwire.manifest.plan import plan
from weightwire.manifest.records import Entry, Manifest
from weightwire.manifest.reshard import ReshardPlan, leaf_runs, plan_reshard
from weightwire.manifest.scatter import Scatter
from weightwire.manifest.sharding import Cut, Piece, Sharding, opaque, scales, stacked, whole
from weightwire.runtime.mapping import TpCoordinates, replicated_tp, shard_range
from weightwire.types import Stage

ANY = 1e9
SIZES = [1, 2, 3, 4]


@dataclass(frozen=True)
class Spec:
    """One tensor of a model: parts of (rows, columns) stacked along dim 0, each cut along ``dim`` in ``units``."""

    rows: tuple[int, ...]
    columns: int
    dim: int | None = 0
    units: int = 0
    """Indivisible heads in each part, replicated where there are more ranks; 0 for a cut anywhere."""
    padded: bool = False
    transposed: bool = False
    dtype: torch.dtype = torch.bfloat16


def wholes(spec: Spec, seed: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 1 << 7, (rows, spec.columns), generator=made, dtype=torch.int64).to(spec.dtype)
        for rows in spec.rows
    ]


def bounds(spec: Spec, rows: int, tp: TpCoordinates) -> tuple[int, int]:
    if spec.dim is None:
        return 0, rows
    if spec.dim == 1:
        return shard_range(spec.columns, tp)
    return shard_range(rows, replicated_tp(tp, spec.units) if spec.units else tp)


def local(spec: Spec, parts: Sequence[torch.Tensor], tp: TpCoordinates) -> torch.Tensor:
    """What rank ``tp`` holds, cut by torch."""
    cuts = []
    for part in parts:
        begin, end = bounds(spec, part.shape[0], tp)
        cuts.append(part[:, begin:end] if spec.dim == 1 else part[begin:end])
    if spec.padded:
        cuts.append(torch.zeros(-(-parts[0].shape[0] // tp.size) - cuts[0].shape[0], spec.columns, dtype=spec.dtype))
    made = torch.cat(cuts)
    return made.t().contiguous().t() if spec.transposed else made.contiguous()


def declared(spec: Spec, tp: TpCoordinates) -> Sharding:
    cuts = [
        Cut((rows, spec.columns), spec.dim or 0, *bounds(spec, rows, tp), part=str(number))
        for number, rows in enumerate(spec.rows)
    ]
    return stacked(cuts, length=-(-spec.rows[0] // tp.size) if spec.padded else None)


class Model(nn.Module):
    def __init__(self, specs: Mapping[str, Spec], tp: TpCoordinates, *, empty: bool = False, seed: int = 7) -> None:
        super().__init__()
        self.shards = {name: declared(spec, tp) for name, spec in specs.items()}
        for name, spec in specs.items():
            tensor = local(spec, wholes(spec, seed), tp)
            if empty:
                tensor = tensor.clone(memory_format=torch.preserve_format).fill_(77)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("table", torch.arange(5), persistent=False)

    def tensor_shards(self) -> dict[str, Sharding]:
        return self.shards


def ranks(specs: Mapping[str, Spec], size: int, **options: Any) -> list[Catalogue]:
    return [catalogue(Model(specs, TpCoordinates(size, rank), **options)) for rank in range(size)]


def execute(planned: ReshardPlan, sources: Sequence[Catalogue], target: Catalogue, most: int = 1 << 20) -> None:
    """As a transfer does, but for the wire: only planned leaves are looked at."""
    scatter = Scatter(target, [source.layout for source in sources], planned)
    scatter.zero()
    for number, source in enumerate(sources):
        data, spans = logical_bytes(source.memory), [leaf.span for leaf in source.layout.leaves]
        for run in leaf_runs(spans, planned.ranks[number].leaves, most):
            begin, end = spans[run[0]].offset, spans[run[-1]].end
            scatter.take(number, begin, torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8))


def resharded(specs: Mapping[str, Spec], have: int, want: int) -> list[tuple[Catalogue, ReshardPlan]]:
    sources, made = ranks(specs, have), []
    for target in ranks(specs, want, empty=True):
        offered = [manifest_of(source) for source in sources]
        planned = plan_reshard(target.layout, offered, stage=Stage.LOADED, max_amplification=ANY)
        execute(planned, sources, target)
        made.append((target, planned))
    return made


def random_spec(draw: st.DrawFn) -> Spec:
    dim = draw(st.sampled_from([0, 0, 1, None]))
    padded = dim == 0 and draw(st.booleans())
    units = draw(st.sampled_from([0, 0, 2, 4, 12])) if dim == 0 and not padded else 0
    count = 1 if padded else draw(st.integers(1, 3))
    rows = [draw(st.integers(1, 3)) * units if units else draw(st.integers(1, 40)) for _ in range(count)]
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn]))
    columns = draw(st.integers(1, 40))
    return Spec(tuple(rows), columns, dim, units, padded, draw(st.booleans()), dtype)


specs_strategy = st.composite(random_spec)()
pairs = st.sampled_from([(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1), (3, 1), (1, 3), (3, 2), (4, 3)])


@settings(max_examples=80, deadline=None)
@given(st.lists(specs_strategy, min_size=1, max_size=5), pairs)
def test_random_models_are_filled_as_if_their_own_size_had_been_loaded(
    found: list[Spec], pair: tuple[int, int]
) -> None:
    have, want = pair
    usable = [spec for spec in found if all(not spec.units or spec.units % n == 0 or n % spec.units == 0 for n in pair)]
    specs = {f"t{at}": spec for at, spec in enumerate(usable)}
    if not specs:
        return
    for (target, planned), same in zip(resharded(specs, have, want), ranks(specs, want), strict=True):
        assert manifest_of(target).content_id == manifest_of(same).content_id
        assert planned.needed == sum(
            piece.box.volume * target.tensors[entry.name].element_size()
            for entry in target.layout.entries
            if entry.sharding
            for piece in entry.sharding.pieces
        )


BIG = {
    "qkv": Spec((1200, 240, 240), 1500, units=12),
    "down": Spec((700,), 2400, dim=1),
    "embed": Spec((4001,), 300, padded=True),
    "norm": Spec((1,), 1500, dim=None),
    "packed": Spec((900,), 1000, transposed=True),
}


@pytest.mark.parametrize(("have", "want"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 1)])
def test_large_tensors_are_read_by_the_leaves_that_hold_them(have: int, want: int) -> None:
    total = sum(source.layout.nbytes for source in ranks(BIG, have))
    for (target, planned), same in zip(resharded(BIG, have, want), ranks(BIG, want), strict=True):
        assert manifest_of(target).content_id == manifest_of(same).content_id
        assert planned.read <= total
        assert planned.amplification < (1.2 if want < have else 2.5)


def first(target: Catalogue, name: str) -> Entry:
    return next(entry for entry in target.layout.entries if entry.name == name)


def with_sharding(target: Catalogue, name: str, sharding: Sharding | None) -> Catalogue:
    entries = tuple(replace(e, sharding=sharding) if e.name == name else e for e in target.layout.entries)
    target.layout = replace(target.layout, entries=entries)
    return target


SMALL = {"a": Spec((8, 8), 6), "b": Spec((5,), 8, dim=1), "norm": Spec((1,), 9, dim=None)}


def refused(expected: Catalogue, sources: Sequence[Catalogue], **options: Any) -> str:
    given_: dict[str, Any] = {"stage": Stage.LOADED, "max_amplification": ANY} | options
    with pytest.raises(ManifestMismatch) as caught:
        plan_reshard(expected.layout, [manifest_of(source) for source in sources], **given_)
    return str(caught.value)


def cut_away(piece: Piece) -> Piece:
    return replace(piece, box=Box(piece.box.offset, (piece.box.size[0] - 1, piece.box.size[1])))


def test_what_is_not_declared_on_either_side_is_refused_by_name() -> None:
    (target,) = ranks(SMALL, 1)
    sources = ranks(SMALL, 2)
    assert "b does not say here" in refused(with_sharding(target, "b", None), sources)
    (target,) = ranks(SMALL, 1)
    with_sharding(sources[1], "a", None)
    assert "a does not say at source rank 1" in refused(target, sources)


def test_opaque_tensors_are_refused_by_name_and_reason() -> None:
    (target,), sources = ranks(SMALL, 1), ranks(SMALL, 2)
    with_sharding(sources[0], "a", opaque("its scales are swizzled"))
    assert "a cannot be resharded at source rank 0: its scales are swizzled" in refused(target, sources)


def test_only_raw_bytes_are_resharded() -> None:
    (target,), sources = ranks(SMALL, 1), ranks(SMALL, 2)
    assert "stage PROCESSED" in refused(target, sources, stage=Stage.PROCESSED)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_too_few_leaves_a_part_out(missing: int) -> None:
    (target,), sources = ranks(SMALL, 1), ranks(SMALL, 2)
    assert "source ranks hold only a part of 0 of a" in refused(target, [sources[1 - missing]])


def test_ranks_that_overlap_in_a_part_are_refused_and_equal_ones_are_not() -> None:
    (target,), sources = ranks(SMALL, 1), ranks(SMALL, 2)
    shifted = Sharding(
        tuple(
            replace(piece, box=Box((piece.box.offset[0] - 1, 0), piece.box.size)) if piece.part == "0" else piece
            for piece in first(sources[1], "a").sharding.pieces  # type: ignore[union-attr]
        )
    )
    with_sharding(sources[1], "a", shifted)
    assert "source ranks overlap in a part of 0 of a" in refused(target, sources)


def test_another_size_in_all_dtype_or_class_is_refused_by_name() -> None:
    (target,) = ranks(SMALL, 1)
    assert "0 of a is [8, 6] in all here and [10, 6] there" in refused(
        target, ranks(SMALL | {"a": Spec((10, 8), 6)}, 2)
    )
    floats = SMALL | {"b": replace(SMALL["b"], dtype=torch.float32)}
    assert "b is bfloat16 (weight) here and float32" in refused(target, ranks(floats, 2))
    assert "only at the source: c" in refused(target, ranks(SMALL | {"c": SMALL["b"]}, 2))


def test_too_much_to_read_is_refused_naming_the_worst_tensor() -> None:
    specs = {"row": Spec((1024,), 2048, dim=1), "column": Spec((2048,), 1024)}
    (source,), targets = ranks(specs, 1), ranks(specs, 4)
    said = refused(targets[1], [source], max_amplification=2.0)
    assert "2.5 times the bytes that are needed would be read, above all for row" in said
    found = plan_reshard(targets[1].layout, [manifest_of(source)], stage=Stage.LOADED, max_amplification=2.5)
    assert found.amplification == 2.5


def test_of_equal_parts_one_is_read_and_the_others_only_where_they_come_along() -> None:
    specs = {"norm": Spec((1,), 1 << 20, dim=None), "small": Spec((1,), 64, dim=None), "cut": Spec((4,), 64)}
    (target,), sources = ranks(specs, 1, empty=True), ranks(specs, 4)
    found = plan_reshard(target.layout, [manifest_of(source) for source in sources], stage=Stage.LOADED)
    big = sum(leaf in (0, 1) for rank in found.ranks for leaf in rank.leaves)
    assert big == 2  # two leaves of the large norm, from one rank
    assert sum(copy.check for rank in found.ranks for copy in rank.copies if copy.entry == "small") == 3
    with torch.no_grad():
        sources[2].tensors["small"][0, 3] += 1
    with pytest.raises(DigestMismatch, match="different bytes of small"):
        execute(found, sources, target)


def test_scales_follow_their_weights_or_are_opaque() -> None:
    weight = stacked([Cut((256, 512), 1, 128, 256)])
    found = scales(weight, (128, 128))
    assert found == stacked([Cut((2, 4), 1, 1, 2)])
    for begin, end in ((64, 192), (64, 256), (128, 192)):
        assert "lie across a cut" in scales(stacked([Cut((256, 512), 1, begin, end)]), (128, 128)).opaque
    short = scales(stacked([Cut((200, 8), 0, 128, 200)]), (128, 8))
    assert short == stacked([Cut((2, 1), 0, 1, 2)])
    assert scales(opaque("packed"), (1, 1)) == opaque("packed")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Sharding(), "leaves a part of it out"),
        (stacked([Cut((8, 6), 0, 0, 4)]), "leaves a part of it out"),
        (Sharding(whole((8, 6)).pieces * 2), "covers a part of it twice"),
        (Sharding(whole((8, 6)).pieces, (Box((0, 0), (9, 6)),)), "reaches beyond it"),
        (Sharding((Piece("", (8, 6), Box((1, 0), (8, 6)), (0, 0)),)), "no part of"),
        (Sharding((Piece("", (8,), Box((0,), (8,)), (0, 0)),)), "without a place"),
        (Sharding(whole((8, 6)).pieces, opaque="swizzled"), "opaque and has pieces"),
        (Sharding(whole((8, 6)).pieces * 65), "more than 64"),
    ],
)
def test_declarations_that_do_not_fit_are_refused_from_modules_and_from_peers(wrong: Sharding, said: str) -> None:
    model = Model({"a": Spec((8,), 6)}, TpCoordinates(1, 0))
    offered = manifest_of(catalogue(model))
    model.shards["a"] = wrong
    with pytest.raises(CatalogueError, match=said):
        catalogue(model)
    entries = tuple(replace(e, sharding=wrong) if e.name == "a" else e for e in offered.layout.entries)
    lying = Manifest(layout=replace(offered.layout, entries=entries), digests=offered.digests)
    with pytest.raises(ProtocolError, match=said):
        plan(offered.layout, lying)


def test_the_declaration_is_in_no_id_but_compared_where_both_sides_have_one() -> None:
    sources = ranks(SMALL, 2)
    mine, theirs = (manifest_of(source) for source in sources)
    bare = with_sharding(ranks(SMALL, 2)[0], "a", None)
    assert manifest_of(bare).content_id == mine.content_id
    assert plan(bare.layout, mine).manifest is mine
    assert mine.content_id != theirs.content_id
    with pytest.raises(ManifestMismatch, match="a is another part of the whole tensor"):
        plan(sources[0].layout, theirs)  # the same names, dtypes and shapes: another rank's


def test_derived_tensors_are_left_to_construction() -> None:
    (target,), sources = ranks(SMALL, 1, empty=True), ranks(SMALL, 2)
    for source in sources:
        source.tensors["table"].zero_()
    found = plan_reshard(target.layout, [manifest_of(source) for source in sources], stage=Stage.LOADED)
    execute(found, sources, target)
    assert target.tensors["table"].tolist() == [0, 1, 2, 3, 4]


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4)


@given(shapes, st.data())
def test_flat_runs_as_boxes(shape: list[int], data: st.DataObject) -> None:
    count = int(torch.tensor(shape, dtype=torch.int64).prod()) if shape else 1
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    numbers = torch.arange(count).reshape(shape)
    boxes = list(flat_boxes(shape, begin, end))
    found = [int(n) for box in boxes for n in _of(numbers, box).reshape(-1)]
    assert found == list(range(begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(shapes, st.integers(0, 30), st.data())
def test_byte_runs_hold_their_box(shape: list[int], near: int, data: st.DataObject) -> None:
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(data.draw(st.integers(1, full - at)) for full, at in zip(shape, offset, strict=True))
    count = int(torch.tensor(shape, dtype=torch.int64).prod()) if shape else 1
    held = {int(n) for n in _of(torch.arange(count).reshape(shape), Box(offset, size)).reshape(-1)}
    runs = list(byte_runs(shape, Box(offset, size), 2, near))
    bytes_ = {at for begin, end in runs for at in range(begin, end)}
    assert {2 * n + side for n in held for side in (0, 1)} <= bytes_
    assert runs == sorted(runs)
    if near == 0:
        assert len(bytes_) == 2 * len(held)


def _of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(at, at + size) for at, size in zip(box.offset, box.size, strict=True))]
