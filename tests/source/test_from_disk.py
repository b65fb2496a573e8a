"""What is offered of a shard while it is being filled: digests beside the loading, and how it can go wrong."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from weightwire.errors import PublishError
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.availability import Availability
from weightwire.manifest.catalogue import Catalogue, catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.provisional import Provisional
from weightwire.manifest.records import Manifest
from weightwire.source.from_disk import FromDisk
from weightwire.types import Json

ROWS = 600
"""Of 4 KiB each: three leaves a matrix."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(ROWS, 1024), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(ROWS, 1024), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(8), requires_grad=False)

    def fill(self, name: str) -> None:
        with torch.no_grad():
            getattr(self, name).uniform_(generator=torch.Generator().manual_seed(len(name)))


def begun(model: nn.Module) -> tuple[FromDisk, Availability]:
    offered: list[tuple[object, ...]] = []
    filling = FromDisk(catalogue(model), lambda *told: offered.append(told))
    assert offered[0][1:] == (filling.provisional, filling.availability)
    return filling, filling.availability


def until(availability: Availability, leaves: int) -> None:
    end = time.monotonic() + 10
    while availability.have != leaves:
        assert time.monotonic() < end, bin(availability.have)
        availability.wait(availability.version, 0.1)


def digested(described: Catalogue) -> Manifest:
    return Manifest(layout=described.layout, digests=digest_leaves(described.memory, described.layout.leaves))


def test_leaves_are_offered_as_they_become_final_and_the_manifest_is_that_of_the_whole() -> None:
    model = Model()
    filling, availability = begun(model)
    model.fill("b")
    filling.final(["b"])
    until(availability, 0b0111000)
    assert filling.provisional.known == 0b0111000
    model.fill("a")
    model.fill("bias")
    filling.final(["bias", "a"])
    until(availability, 0b0111111)  # the last leaf waits for the other small tensor
    model.fill("scale")
    made = filling.finish(catalogue(model))
    assert availability.complete
    assert made == digested(catalogue(model))


def test_nothing_is_offered_before_its_digest_is_known() -> None:
    model, seen = Model(), list[bool]()
    filling, availability = begun(model)
    add = availability.add

    def checked(leaves: int) -> None:
        seen.append(not leaves & ~filling.provisional.known)
        add(leaves)

    availability.add = checked  # type: ignore[method-assign]
    filling.final(["a"])
    filling.final(["b", "bias", "scale"])
    filling.finish(catalogue(model))
    assert len(seen) > 1
    assert all(seen)


@pytest.mark.parametrize("part", [slice(None), slice(ROWS - 1, None)])
def test_a_tensor_that_is_written_after_it_was_final_is_found(part: slice) -> None:
    model = Model()
    filling, _ = begun(model)
    filling.final(["a"])
    with torch.no_grad():
        model.a[part].add_(1)
    with pytest.raises(PublishError, match="a was written after it was final"):
        filling.finish(catalogue(model))


def test_a_tensor_that_is_replaced_while_it_is_loaded_is_found() -> None:
    model = Model()
    filling, _ = begun(model)
    model.a = nn.Parameter(torch.ones(ROWS, 1024), requires_grad=False)
    with pytest.raises(PublishError, match="were replaced while they were loaded"):
        filling.finish(catalogue(model))


class Declares(Model):
    """What loading decides is not in a tensor."""

    alpha = 1.0

    def export_state(self) -> dict[str, Json]:
        return {"alpha": self.alpha}

    def import_state(self, state: dict[str, Json]) -> None:
        raise NotImplementedError


def test_where_nobody_follows_loading_may_decide_what_is_declared_and_nothing_else() -> None:
    model = Declares()
    filling = FromDisk(catalogue(model), None)
    for name in ("a", "b", "bias", "scale"):
        model.fill(name)
        filling.final([name])
    model.alpha = 0.5
    made = filling.finish(catalogue(model))
    assert made == digested(catalogue(model))
    assert made.layout.state == {"": {"alpha": 0.5}}
    filling = FromDisk(catalogue(model), None)
    model.bias = None  # type: ignore[assignment]
    with pytest.raises(PublishError, match="were replaced while they were loaded"):
        filling.finish(catalogue(model))


def test_followers_were_told_what_is_declared() -> None:
    model = Declares()
    filling, _ = begun(model)
    model.alpha = 0.5
    with pytest.raises(PublishError, match="were replaced while they were loaded"):
        filling.finish(catalogue(model))


def test_what_cannot_be_offered_starts_no_thread() -> None:
    before = set(threading.enumerate())

    def refuse(_memory: AddressSpace, _provisional: Provisional, _availability: Availability) -> None:
        raise PublishError("no transport can serve it", "")

    with pytest.raises(PublishError, match="no transport"):
        FromDisk(catalogue(Model()), refuse)
    assert set(threading.enumerate()) <= before  # those of other tests may end meanwhile


def test_an_abandoned_load_ends_its_thread() -> None:
    filling, _ = begun(Model())
    filling.abandon()
    filling.abandon()
    assert not filling._thread.is_alive()
