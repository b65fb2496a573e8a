from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from manifest_support import entry_names, fill, logical_bytes, manifest_of, oracle_bytes, randomise, tensor_bytes
from torch import nn

from weightwire.errors import CatalogueError, ManifestMismatch
from weightwire.manifest.catalogue import capture, catalogue
from weightwire.manifest.plan import plan, validate
from weightwire.manifest.records import View
from weightwire.types import TensorClass

Pair = namedtuple("Pair", "left right")  # noqa: PYI024  (the untyped kind must be walked as well)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Chain(nn.Module):
    """Layers that know the next one's attention, as fused kernels want it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def wire(self) -> None:
        for this, following in zip(self.layers, list(self.layers)[1:], strict=False):
            this.next_attn = following.attn
            this.next_norm = following.norm


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        if how == "object":
            self.head.weight = self.embed.weight
        elif how == "storage":
            self.head.weight = nn.Parameter(self.embed.weight.data)


class Held(nn.Module):
    """Holds a tensor as ``scale`` and says what it is."""

    def __init__(self, tensor: Any, kind: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.scale = tensor
        self._kind = kind

    def tensor_classes(self) -> Mapping[str, str]:
        return {"scale": self._kind} if self._kind else {}


class WithView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj = nn.Linear(8, 6, bias=False)
        self.v_b_proj = nn.Parameter(self.kv_b_proj.weight.data[2:5, 1:7])


def test_h01_alias_wiring_after_construction_changes_no_name() -> None:
    source, target = Chain(), Chain()
    names, target_names = capture(source), capture(target)
    before = catalogue(source, names).layout
    source.wire()
    assert catalogue(source, names).layout == before == catalogue(target, target_names).layout
    assert len(before.entries) == 12
    assert all("next_" not in name for entry in before.entries for name in (entry.name, *entry.aliases))
    plan(catalogue(target, target_names).layout, manifest_of(catalogue(source, names)))


def test_h01_without_names_a_module_object_has_one_path_and_none_is_lost() -> None:
    source = Chain()
    source.wire()
    layout = catalogue(source).layout
    assert len(layout.entries) == 12
    assert not any(entry.aliases for entry in layout.entries)


def test_h01_a_shorter_path_wins_and_cycles_end() -> None:
    root = nn.Module()
    root.deep = nn.Module()
    root.deep.inner = nn.Linear(2, 2)
    root.short = root.deep.inner
    root.deep.inner.up = root
    assert entry_names(catalogue(root)) == {"short.weight", "short.bias"}


@pytest.mark.parametrize("wired", [False, True])
def test_h02_ties_by_object_and_by_storage_give_equal_ids(wired: bool) -> None:
    ids = set()
    for how in ("object", "storage"):
        module = Tied(how)
        names = capture(module)
        randomise(module)
        if wired:
            module.body.alias = module.head
        found = catalogue(module, names)
        (tied,) = [entry for entry in found.layout.entries if entry.aliases]
        assert (tied.name, tied.aliases) == ("embed.weight", ("head.weight",))
        ids.add(manifest_of(found).content_id)
    assert len(ids) == 1


@pytest.mark.parametrize("how", ["object", "storage"])
def test_h71_meta_construction_and_to_empty_keep_the_tie_and_the_id(how: str) -> None:
    built = Tied("object")
    randomise(built)
    source = catalogue(built)
    with torch.device("meta"):
        module = Tied(how)
    names = capture(module)
    module.to_empty(device="cpu")
    assert module.head.weight.data_ptr() != module.embed.weight.data_ptr()
    target = catalogue(module, names)
    assert target.layout == source.layout
    assert [mirror.name for mirror in target.mirrors] == ["head.weight"]
    target.poison()
    fill(target.bind(source.layout), source.memory)
    with pytest.raises(CatalogueError, match=r"head\.weight and embed\.weight"):
        target.check_mirrors()
    target.restore_references()
    target.check_mirrors()
    assert torch.equal(module.head.weight, built.head.weight)
    assert manifest_of(target).content_id == manifest_of(source).content_id


def test_h71_recomputed_buffers_and_gaps_do_not_enter_the_content_id() -> None:
    class Rotary(nn.Module):
        def __init__(self, step: float) -> None:
            super().__init__()
            store = torch.full((4, 10), step)
            self.weight = nn.Parameter(store[:, :6])
            self.register_buffer("inv_freq", torch.arange(8.0) * step, persistent=False)

    one, other = Rotary(1.0), Rotary(2.0)
    for module in (one, other):
        module.weight.data.fill_(3.0)
    first, second = manifest_of(catalogue(one)), manifest_of(catalogue(other))
    assert first.content_id == second.content_id
    assert first.derived_id != second.derived_id


def test_h01_references_added_after_construction_are_no_names() -> None:
    module = Tied("object")
    names = capture(module)
    before = catalogue(module, names).layout
    module.__dict__["fused"] = [module.body.weight, module.body.weight.data[2:]]
    module.body.register_parameter("again", module.body.bias)
    assert catalogue(module, names).layout == before
    assert catalogue(module).layout != before


def test_h01_the_first_name_at_construction_stays_the_canonical_one() -> None:
    module = nn.Module()
    module.register_parameter("b", nn.Parameter(torch.ones(2)))
    names = capture(module)
    held = module._parameters.pop("b")
    module.register_parameter("a", held)
    module.register_parameter("b", held)
    (entry,) = catalogue(module, names).layout.entries
    assert (entry.name, entry.aliases) == ("b", ())
    (entry,) = catalogue(module).layout.entries
    assert (entry.name, entry.aliases) == ("a", ("b",))


def test_a_weight_inside_a_derived_buffer_makes_the_whole_a_weight() -> None:
    module = Held(None)
    store = torch.zeros(6)
    module.register_buffer("made", store, persistent=False)
    module.bias = nn.Parameter(store[:2])
    assert {entry.kind for entry in catalogue(module).layout.entries} == {TensorClass.WEIGHT}


def test_h20_a_view_into_a_tensor_with_gaps_is_refused() -> None:
    store = torch.zeros(4, 6)
    module = Held(store[1:2, :2], "weight")
    module.weight = nn.Parameter(store[:, :3])
    with pytest.raises(CatalogueError, match="scale and weight share some bytes"):
        catalogue(module)


def test_h02_separate_storages_with_equal_bytes_are_two_entries() -> None:
    assert {"embed.weight", "head.weight"} < entry_names(catalogue(Tied("not")))


def test_h03_an_interior_view_is_sent_once_and_stays_a_view() -> None:
    source, target = WithView(), WithView()
    randomise(source)
    found = catalogue(source)
    (entry,) = found.layout.entries
    assert entry.views == (View(name="v_b_proj", dtype="float32", shape=(3, 6), stride=(8, 1), offset=17 * 4),)
    here = catalogue(target)
    fill(here.bind(plan(here.layout, manifest_of(found)).layout), found.memory)
    assert torch.equal(target.v_b_proj, source.v_b_proj)
    assert target.v_b_proj.data_ptr() == target.kv_b_proj.weight.data_ptr() + 17 * 4


def test_h03_a_view_that_to_empty_broke_is_filled_from_its_entry() -> None:
    source = WithView()
    randomise(source)
    with torch.device("meta"):
        target = WithView()
    names = capture(target)
    target.to_empty(device="cpu")
    here, there = catalogue(target, names), catalogue(source)
    assert here.layout == there.layout
    here.poison()
    fill(here.memory, there.memory)
    here.restore_references()
    assert torch.equal(target.v_b_proj, source.v_b_proj)
    assert torch.equal(target.kv_b_proj.weight, source.kv_b_proj.weight)


def test_views_of_another_dtype_or_shape_are_views() -> None:
    module = Held(None)
    module.flat = nn.Parameter(module.weight.data.view(-1))
    module.raw = module.weight.data.view(torch.int32).t()
    (entry,) = catalogue(module).layout.entries
    assert [view.name for view in entry.views] == ["flat", "raw"]
    validate(catalogue(module).layout)


def test_h08_buffers_and_attribute_tensors_have_a_class() -> None:
    module = Held(torch.ones(3), "weight")
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("made", torch.ones(2), persistent=False)
    kinds = {entry.name: entry.kind for entry in catalogue(module).layout.entries}
    weight, derived = TensorClass.WEIGHT, TensorClass.DERIVED
    assert kinds == {"weight": weight, "kept": weight, "made": derived, "scale": weight}
    assert catalogue(module).layout.entries[-1].name == "made"


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (torch.ones(3), "scale"),
        ([1, torch.ones(3)], r"scale\[1\]"),
        ({"a": (None, torch.ones(3))}, r"scale\[a\]\[1\]"),
        (Pair(1, torch.ones(3)), r"scale\[right\]"),
    ],
)
def test_h08_an_unclassified_tensor_refuses_by_name(held: Any, name: str) -> None:
    module = nn.Sequential(Held(held))
    with pytest.raises(CatalogueError, match=rf"^0\.{name} is a tensor of no class; declare 'scale'"):
        catalogue(module)
    for pattern in ("0.scale", "*.scale"):
        assert len(catalogue(module, classes={pattern: "derived"}).layout.entries) == 2


def test_h08_attributes_that_only_show_known_bytes_are_no_entries() -> None:
    module = Held(None)
    module.scale = [module.weight, module.weight.data[1:3], module.weight.t()]
    (entry,) = catalogue(module).layout.entries
    assert entry.aliases == ("scale[0]",)
    assert [view.name for view in entry.views] == ["scale[1]", "scale[2]"]


def test_h08_an_attribute_that_shows_more_than_is_known_is_refused() -> None:
    store = torch.zeros(6, 4)
    module = Held(store)
    module.weight = nn.Parameter(store[:4])
    with pytest.raises(CatalogueError, match="scale"):
        catalogue(module)
    (entry,) = catalogue(module, classes={"scale": "weight"}).layout.entries
    assert (entry.name, entry.views[0].name) == ("scale", "weight")


def test_modules_that_hide_in_plain_attributes_are_refused() -> None:
    module = Held([nn.Linear(2, 2)])
    with pytest.raises(CatalogueError, match=r"scale\[0\] is a module"):
        catalogue(module)
    module.registered = module.scale[0]
    assert entry_names(catalogue(module)) == {"weight", "registered.weight", "registered.bias"}


@pytest.mark.parametrize("kind", ["module", "exact", "pattern"])
def test_h60_h65_runtime_tensors_never_enter(kind: str) -> None:
    cache = torch.full((2, 1024), 7.0)
    module = Held([cache, cache[0]], "runtime" if kind == "module" else None)
    classes = {"exact": {"scale": "runtime"}, "pattern": {"*scale*": "runtime"}}.get(kind)
    found = catalogue(module, classes=classes)
    assert entry_names(found) == {"weight"}
    start, end = cache.data_ptr(), cache.data_ptr() + cache.nbytes
    assert not any(r.address < end and start < r.address + r.nbytes for r in found.memory.regions)


def test_h60_h65_what_shares_a_runtime_storage_is_runtime_or_refused() -> None:
    slab = torch.zeros(64)
    module = Held(slab[:32], "runtime")
    module.shown = slab[40:]
    assert entry_names(catalogue(module)) == {"weight"}
    module.weight = nn.Parameter(slab[48:])
    with pytest.raises(CatalogueError, match="weight shares a storage with scale"):
        catalogue(module)


def test_h65_a_cache_that_appears_after_construction_refuses_a_second_catalogue() -> None:
    module = Held(None)
    names = capture(module)
    catalogue(module, names)
    module.kv_cache = torch.zeros(4096)
    with pytest.raises(CatalogueError, match="kv_cache is a tensor of no class"):
        catalogue(module, names)


def test_h60_runtime_buffers_that_are_none_are_no_state() -> None:
    module = Held(None, "runtime")
    del module.scale
    module.register_buffer("scale", None)
    module.register_parameter("bias", None)
    assert catalogue(module).layout.absent == ("bias",)


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(CatalogueError, match="'weights'"):
        catalogue(Held(torch.ones(1), "weights"))


def shifted(tensor: torch.Tensor, *, size: tuple[int, ...], stride: tuple[int, ...], at: int = 0) -> torch.Tensor:
    return tensor.as_strided(size, stride, at)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(1).expand(4), "expanded"),
        (shifted(torch.zeros(8), size=(4, 2), stride=(1, 1)), "overlaps itself"),
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.eye(3).to_sparse(), "layout sparse_coo"),
        (torch.zeros(200_000, 2)[:, 0], "200000 separate runs"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "lazy conjugate"),
        (torch.empty(4, 4, dtype=torch.uint8).view(torch.bits8), "dtype bits8"),
    ],
)
def test_h20_what_cannot_be_described_is_refused_by_name(tensor: torch.Tensor, why: str) -> None:
    with pytest.raises(CatalogueError, match=f"^scale .*{why}"):
        catalogue(Held(tensor, "weight"))


def test_h20_quantized_lazy_and_distributed_tensors_are_refused_by_name() -> None:
    with pytest.raises(CatalogueError, match=r"^weight is not initialized"):
        catalogue(nn.LazyLinear(3))
    distributed = type("DTensor", (torch.Tensor,), {})
    with pytest.raises(CatalogueError, match="scale is a DTensor"):
        catalogue(Held(torch.ones(2).as_subclass(distributed), "weight"))


def test_h20_partial_overlap_is_refused_by_both_names() -> None:
    store = torch.zeros(10)
    module = Held(store[4:10], "weight")
    module.weight = nn.Parameter(store[:6])
    with pytest.raises(CatalogueError, match=r"scale and weight share some bytes|weight and scale share some bytes"):
        catalogue(module)


def test_h20_interleaved_tensors_without_a_common_byte_are_legal() -> None:
    store = torch.arange(24.0).view(4, 6)
    module = Held(store[:, 3:], "weight")
    module.weight = nn.Parameter(store[:, :3])
    found = catalogue(module)
    assert logical_bytes(found.memory) == oracle_bytes(found.layout, found.tensors)
    assert len(found.memory.segments) == 8
    assert len(found.memory.regions) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0, 4),
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(24.0).view(2, 3, 4)[:, 1:],
        torch.arange(48.0).view(2, 3, 8)[..., ::2].permute(1, 2, 0),
        torch.tensor(3.0),
        torch.arange(6.0).view(6, 1).expand(6, 1).t(),
        torch.arange(8.0).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.ones(2, dtype=torch.complex128),
    ],
)
def test_h20_odd_layouts_travel_exactly(tensor: torch.Tensor) -> None:
    module, other = Held(tensor, "weight"), Held(tensor.clone(), "weight")
    found, here = catalogue(module), catalogue(other)
    assert logical_bytes(found.memory) == oracle_bytes(found.layout, found.tensors)
    assert {entry.name for entry in here.layout.entries} == {"scale", "weight"}
    here.poison(0)
    if [entry.order for entry in here.layout.entries] == [entry.order for entry in found.layout.entries]:
        fill(here.bind(found.layout), found.memory)
        dims = tuple(range(tensor.dim()))
        assert tensor_bytes(here.tensors["scale"], dims) == tensor_bytes(tensor, dims)


def test_subclasses_count_by_their_plain_data() -> None:
    loud = False

    class Loud(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not loud, "the walk must not run a subclass's code"
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    module = Held(None)
    module.scale = Loud(torch.ones(3))
    loud = True
    names = capture(module)
    assert entry_names(catalogue(module, names)) == {"scale", "weight"}


def test_a_stale_meta_reference_keeps_its_place_in_the_layout() -> None:
    def build() -> Held:
        module = Held(None)
        module.scale = [module.weight, module.weight.data[1]]
        return module

    with torch.device("meta"):
        target = build()
    names = capture(target)
    target.to_empty(device="cpu")
    assert target.scale[0].is_meta
    assert catalogue(target, names).layout == catalogue(build()).layout
    with pytest.raises(CatalogueError, match=r"scale\[0\] is on the meta device"):
        catalogue(target)


def test_derived_bytes_are_saved_and_given_back() -> None:
    module, made = Held(None), torch.arange(6.0).view(2, 3).t()
    module.register_buffer("made", made, persistent=False)
    found, before = catalogue(module), made.clone()
    saved = found.save_derived()
    assert saved.nbytes == 24
    found.poison()
    found.restore_derived(saved)
    assert torch.equal(made, before)
    assert set(tensor_bytes(module.weight, (0, 1))) == {0xA5}


def test_bind_refuses_a_layout_that_is_not_this_module() -> None:
    found, other = catalogue(Tied("not")), catalogue(Chain())
    with pytest.raises(ManifestMismatch, match="has no such tensor here"):
        found.bind(other.layout)


def test_inference_tensors_can_be_filled() -> None:
    with torch.inference_mode():
        module = Tied("object")
    found = catalogue(module)
    found.poison(1)
    found.restore(found.save(found.tensors))
    assert set(tensor_bytes(module.body.bias, (0,))) == {1}
