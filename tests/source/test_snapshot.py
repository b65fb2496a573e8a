"""Copy-on-transform: published storages never move and never change, whatever the model does to itself."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from weightwire.manifest.address import AddressSpace
from weightwire.manifest.catalogue import catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.source.budget import over_budget, raw_cost
from weightwire.source.snapshot import Snapshot, storages


class Doubling(nn.Module):
    """Doubles ``a`` in place, replaces ``b`` by its transpose, leaves ``c`` alone; ``tail`` is a view of ``a``."""

    def __init__(self, *, declares: bool = True) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        self.b = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.c = nn.Parameter(torch.ones(5))
        self.tail = self.a.detach()[1:]
        if declares:
            self.transform_effect = self._effect

    def _effect(self) -> dict[str, Literal["in_place", "replaces"]]:
        return {"a": "in_place", "b": "replaces"}

    @torch.no_grad()
    def transform_weights(self) -> None:
        self.a.mul_(2)
        self.b = nn.Parameter(self.b.t().contiguous())


class Model(nn.Module):
    def __init__(self, *, declares: bool = True) -> None:
        super().__init__()
        self.inner = Doubling(declares=declares)
        self.other = nn.Linear(2, 2)
        self.alias = self.inner.a  # the same Parameter under another module


def published(model: Model) -> tuple[AddressSpace, Snapshot, bytes]:
    described = catalogue(model)
    memory = described.memory
    owners = memory.owners
    assert isinstance(owners, list)
    snapshot = Snapshot(model=model, published=storages(owners))
    return memory, snapshot, digest_leaves(memory, described.layout.leaves)


def digests(memory: AddressSpace) -> bytes:
    return digest_leaves(memory, catalogue(Model()).layout.leaves)


@pytest.mark.parametrize("declares", [True, False])
def test_h09_raw_bytes_stay_what_they_were_at_the_addresses_they_had(declares: bool) -> None:
    model = Model(declares=declares)
    memory, snapshot, before = published(model)
    with snapshot.guard(model.inner):
        model.inner.transform_weights()
    assert digests(memory) == before
    assert torch.equal(model.inner.a.detach(), torch.arange(12.0).reshape(3, 4) * 2)
    assert torch.equal(model.inner.b.detach(), torch.arange(6.0).reshape(2, 3).t())


def test_h09_without_the_guard_the_published_bytes_change() -> None:
    model = Model()
    memory, _, before = published(model)
    model.inner.transform_weights()
    assert digests(memory) != before


def test_views_and_aliases_follow_the_transformed_bytes() -> None:
    model = Model()
    _, snapshot, _ = published(model)
    with snapshot.guard(model.inner):
        model.inner.transform_weights()
    assert torch.equal(model.inner.tail, model.inner.a.detach()[1:])
    assert model.inner.tail.data_ptr() == model.inner.a[1:].data_ptr()
    assert model.alias is model.inner.a


def test_h10_what_is_held_a_second_time_is_counted() -> None:
    model = Model()
    _, snapshot, _ = published(model)
    with snapshot.guard(model.inner):
        model.inner.transform_weights()
    assert snapshot.held.in_place == 12 * 4
    assert snapshot.held.replaced == 6 * 4
    snapshot.held.released()
    assert snapshot.held.nbytes == 0


@pytest.mark.parametrize("foreign", [False, True])
def test_h10_what_is_changed_and_then_replaced_is_counted_once(foreign: bool) -> None:
    model = Model(declares=False)
    _, snapshot, _ = published(model)
    snapshot.foreign = foreign
    with snapshot.guard(model.inner), torch.no_grad():
        model.inner.a.mul_(2)
        model.inner.a = nn.Parameter(model.inner.a.detach().clone())
    assert snapshot.held.nbytes == (12 if not foreign else 12 + 6 + 5) * 4


def test_what_did_not_change_goes_back_and_costs_nothing() -> None:
    model = Model(declares=False)
    _, snapshot, _ = published(model)
    raw = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    with snapshot.guard(model.inner):
        model.inner.c.data_ptr()  # it may change anything, and changes nothing
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == raw
    assert snapshot.held.nbytes == 0
    assert snapshot.held.peak_clone == (12 + 6 + 5) * 4


def test_a_transform_that_fails_half_way_leaves_the_raw_bytes() -> None:
    model = Model()
    memory, snapshot, before = published(model)

    @torch.no_grad()
    def fail() -> None:
        with snapshot.guard(model.inner):
            model.inner.a.mul_(2)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert digests(memory) == before


def test_the_cost_is_known_beforehand_and_free_on_the_host() -> None:
    model = Model()
    assert raw_cost(model) == 0
    assert over_budget(model) == ""


def test_h09_a_module_that_declares_nothing_may_change_anything() -> None:
    module = nn.Linear(3, 3)
    described = catalogue(module)
    memory = described.memory
    assert isinstance(memory.owners, list)
    before = digest_leaves(memory, described.layout.leaves)
    snapshot = Snapshot(model=module, published=storages(memory.owners))
    with snapshot.guard(module), torch.no_grad():
        module.weight.mul_(2)
    assert digest_leaves(memory, described.layout.leaves) == before


class Maker(nn.Module):
    """Its transform makes an alias of its own weight; another module's later changes that weight in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Module()
        self.second.shown = self.first.weight


@torch.no_grad()
def test_h09_where_the_model_is_walked_once_aliases_that_a_transform_made_still_follow() -> None:
    model = Maker()
    described = catalogue(model)
    owners = described.memory.owners
    assert isinstance(owners, list)
    before = digest_leaves(described.memory, described.layout.leaves)
    snapshot = Snapshot(model=model, published=storages(owners), foreign=True)
    with snapshot.guard(model.first):
        model.first.row = model.first.weight.detach()[1]
    with snapshot.guard(model.second):
        model.second.shown.mul_(2)  # type: ignore[operator]
    assert digest_leaves(described.memory, described.layout.leaves) == before
    assert model.first.row.data_ptr() == model.first.weight[1].data_ptr()
    assert model.first.weight.data_ptr() == model.second.shown.data_ptr()  # type: ignore[operator]
    assert snapshot.held.in_place == 4 * 4


def test_a_transform_that_only_replaces_needs_no_copy_and_is_counted() -> None:
    model = Model(declares=False)
    memory, snapshot, before = published(model)
    with snapshot.guard(model.inner, writes=False):
        model.inner.b = nn.Parameter(model.inner.b.detach().t().contiguous())
    assert digests(memory) == before
    assert (snapshot.held.replaced, snapshot.held.peak_clone) == (6 * 4, 0)


def test_a_foreign_transform_may_keep_an_address_and_what_is_there_stays() -> None:
    model = Model(declares=False)
    described = catalogue(model)
    owners = described.memory.owners
    assert isinstance(owners, list)
    snapshot = Snapshot(model=model, published=storages(owners), foreign=True)
    with snapshot.guard(model.inner):
        handle = model.inner.c.data_ptr()  # as a kernel's handle keeps its scales
    assert model.inner.c.data_ptr() == handle
    assert model.alias is model.inner.a
    assert snapshot.held.in_place == (12 + 6 + 5) * 4
