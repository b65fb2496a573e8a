"""Random module trees, built in three ways, against an oracle that is written down while the tree is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifest_support import fill, logical_bytes, manifest_of, tensor_bytes
from torch import nn

from weightwire.manifest.catalogue import capture, catalogue
from weightwire.manifest.plan import plan, validate_manifest

KINDS = [
    "param",
    "permuted",
    "gappy",
    "empty",
    "buffer",
    "transient",
    "none",
    "none_buffer",
    "attribute",
    "derived",
    "runtime",
    "list",
    "dict",
    "tie",
    "view",
    "shown",
]
SHAPES = [(), (1,), (7,), (3, 4), (2, 1, 5), (1, 1), (300, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.complex64]


@dataclass(frozen=True)
class Spec:
    slots: tuple[tuple[str, int, int, int], ...]
    children: tuple[Spec, ...] = ()


slots = st.tuples(st.sampled_from(KINDS), st.integers(0, 6), st.integers(0, 3), st.integers(0, 99))
leaf_specs = st.builds(Spec, st.lists(slots, max_size=6).map(tuple))
specs = st.recursive(
    leaf_specs,
    lambda inner: st.builds(Spec, st.lists(slots, max_size=6).map(tuple), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=8,
)


class Node(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.declared: dict[str, str] = {}

    def tensor_classes(self) -> Mapping[str, str]:
        return self.declared


@dataclass
class Oracle:
    """What the catalogue has to find."""

    how: str
    entries: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    params: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    """Registered ones that may be tied to, outermost and earliest first."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def fresh(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The same values in the same order on every way of building; attributes are never on meta."""
        data = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=self.generator)
        return data.contiguous().view(dtype).reshape(shape)

    def register(self, name: str, tensor: torch.Tensor, kind: str = "weight") -> torch.Tensor:
        self.entries[name] = (kind, tensor)
        return tensor.to("meta") if self.how == "meta" else tensor


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def build(spec: Spec, oracle: Oracle, path: str = "") -> Node:
    node = Node()
    for at, slot in enumerate(spec.slots):
        place(node, f"{slot[0]}{at}", path, slot, oracle)
    for at, child in enumerate(spec.children):
        node.add_module(f"c{at}", build(child, oracle, f"{path}c{at}."))
    return node


def place(node: Node, local: str, path: str, slot: tuple[str, int, int, int], oracle: Oracle) -> None:
    kind, shape_index, dtype_index, pick = slot
    shape, dtype, name = SHAPES[shape_index], DTYPES[dtype_index], path + local
    if kind == "param":
        made = parameter(oracle.register(name, oracle.fresh(shape, dtype)))
        node.register_parameter(local, made)
        oracle.params.append((name, made))
    elif kind in ("permuted", "gappy", "empty"):
        wide = oracle.fresh((2, 3, 4), dtype)
        tensor = {"permuted": wide.permute(2, 0, 1), "gappy": wide[:, :, 1:3], "empty": wide[:, :0]}[kind]
        node.register_parameter(local, parameter(oracle.register(name, tensor)))
    elif kind in ("buffer", "transient"):
        tensor = oracle.register(name, oracle.fresh(shape, dtype), "weight" if kind == "buffer" else "derived")
        node.register_buffer(local, tensor, persistent=kind == "buffer")
    elif kind in ("none", "none_buffer"):
        oracle.absent.append(name)
        node.register_parameter(local, None) if kind == "none" else node.register_buffer(local, None)
    elif kind in ("tie", "view", "shown"):
        share(node, local, name, kind, pick, oracle)
    else:
        attach(node, local, name, kind, oracle.fresh(shape, dtype), oracle)


def share(node: Node, local: str, name: str, kind: str, pick: int, oracle: Oracle) -> None:
    """A second name for what an earlier parameter holds, or for a part of it."""
    dense = [pair for pair in oracle.params if kind != "view" or (pair[1].dim() == 2 and len(pair[1]) > 1)]
    if not dense:
        return
    home, tensor = dense[pick % len(dense)]
    if kind == "shown":
        node.__dict__[local] = [tensor]
        oracle.aliases[f"{name}[0]"] = home
    elif kind == "tie":
        node.register_parameter(local, tensor if oracle.how == "object" else parameter(tensor.data))
        oracle.aliases[name] = home
    else:
        node.register_parameter(local, parameter(tensor.data[1:]))
        oracle.views[name] = home


def attach(node: Node, local: str, name: str, kind: str, tensor: torch.Tensor, oracle: Oracle) -> None:
    """A declared plain attribute, always on the CPU: ``to_empty`` does not know it."""
    node.declared[local] = {"derived": "derived", "runtime": "runtime"}.get(kind, "weight")
    held, suffix = {"list": ([None, tensor], "[1]"), "dict": ({"k": (tensor,)}, "[k][0]")}.get(kind, (tensor, ""))
    setattr(node, local, held)
    if kind != "runtime":
        oracle.entries[name + suffix] = (node.declared[local], tensor)


def memory_order(tensor: torch.Tensor) -> list[int]:
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def expected_bytes(oracle: Oracle) -> bytes:
    def rank(item: tuple[str, tuple[str, torch.Tensor]]) -> tuple[bool, bool, str]:
        name, (kind, tensor) = item
        return kind != "weight", tensor.numel() * tensor.element_size() < 1 << 20, name

    ordered = sorted(oracle.entries.items(), key=rank)
    return b"".join(tensor_bytes(tensor, memory_order(tensor)) for _, (_, tensor) in ordered)


@settings(deadline=None, max_examples=150)
@given(specs)
def test_layout_and_bytes_are_what_was_built(spec: Spec) -> None:
    oracle = Oracle("object")
    found = catalogue(build(spec, oracle))
    layout = found.layout
    assert {entry.name: entry.kind.value for entry in layout.entries} == {n: k for n, (k, _) in oracle.entries.items()}
    assert {alias: entry.name for entry in layout.entries for alias in entry.aliases} == oracle.aliases
    assert {view.name: entry.name for entry in layout.entries for view in entry.views} == oracle.views
    assert list(layout.absent) == sorted(oracle.absent)
    assert logical_bytes(found.memory) == expected_bytes(oracle)
    manifest = manifest_of(found)
    validate_manifest(manifest)
    assert plan(layout, manifest).copies == ()


@settings(deadline=None, max_examples=100)
@given(specs)
def test_h02_h71_three_ways_of_building_give_equal_ids(spec: Spec) -> None:
    built, shared, empty = (build(spec, Oracle(how)) for how in ("object", "storage", "meta"))
    source, tied = catalogue(built, capture(built)), catalogue(shared, capture(shared))
    names = capture(empty)
    empty.to_empty(device="cpu")
    target = catalogue(empty, names)
    assert source.layout == tied.layout == target.layout
    manifest = manifest_of(source)
    assert manifest_of(tied) == manifest
    target.poison()
    fill(target.bind(plan(target.layout, manifest).layout), source.memory)
    target.restore_references()
    target.check_mirrors()
    assert manifest_of(target) == manifest
    held = dict(empty.named_parameters(remove_duplicate=False))
    for name, tensor in built.named_parameters(remove_duplicate=False):
        assert tensor_bytes(held[name], range(tensor.dim())) == tensor_bytes(tensor, range(tensor.dim())), name


@settings(deadline=None, max_examples=60)
@given(specs)
def test_h60_h65_runtime_tensors_are_in_no_region(spec: Spec) -> None:
    module = build(spec, Oracle("object"))
    found = catalogue(module)
    for node in module.modules():
        for local, tensor in vars(node).items():
            if local.startswith("runtime") and tensor.numel():
                start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
                assert not any(r.address < end and start < r.address + r.nbytes for r in found.memory.regions)
