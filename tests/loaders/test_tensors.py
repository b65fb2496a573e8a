"""Tensors by name: no module at the target, and what cannot be said by names and tensors is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loaders.test_filling import Start, file, start  # noqa: F401  (fixtures)
from loaders.test_module import Publish
from loaders.tower import IDENTITY, Tower, read
from publish_tensors import Held, Stateful
from torch.utils._python_dispatch import TorchDispatchMode
from vision import Encoder, identity

import weightwire
from weightwire.config import Settings
from weightwire.errors import ConfigError, DecisionError, ManifestMismatch, MismatchError, NoSourceError
from weightwire.loaders.tensors import _by_name
from weightwire.manifest.catalogue import catalogue
from weightwire.manifest.records import Entry, Layout, View
from weightwire.metadata.decision import MemoryDecisions
from weightwire.types import TensorClass

ENOUGH = 64 << 20


def held_identity(**fields: Any) -> weightwire.Identity:
    return weightwire.module_identity("tests/held", "Held", "float32", revision="r1", engine="acme", **fields)


def test_tensors_come_under_all_their_names_and_ties_and_views_stay_what_they_are(
    publish: Publish, settings: Settings
) -> None:
    _, content_id, weights_id = publish(seed=1).line()
    taken = weightwire.receive_tensors(identity(), max_nbytes=ENOUGH, settings=settings)
    wanted = Encoder(8, seed=1)
    tensors = dict(taken.tensors)
    window = tensors.pop("window")
    assert tensors.keys() == wanted.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.state_dict().items())
    assert tensors["tied.weight"] is tensors["head.weight"]
    assert torch.equal(window, wanted.window)
    assert window.data_ptr() == tensors["big.weight"].data_ptr()
    assert taken.absent == ("big.bias", "conv.bias", "tied.bias")
    assert taken.derived == ()
    assert taken.report.verified
    assert (taken.report.content_id, taken.report.weights_id) == (content_id, weights_id)


def test_names_with_dots_every_order_of_elements_and_what_is_derived(settings: Settings) -> None:
    module = Held(
        {
            "a.0.weight": torch.arange(6.0).view(2, 3).t(),
            "a.0.weight_scale": torch.tensor(2.0),
            "a.1.weight": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
            "b.empty": torch.empty(0, 3),
            "b.numbers": torch.arange(7, dtype=torch.uint8).view(torch.float8_e4m3fn),
        }
    )
    module.register_buffer("cache", torch.arange(5.0), persistent=False)
    with weightwire.publish(module, held_identity(), settings=settings):
        taken = weightwire.receive_tensors(held_identity(), max_nbytes=ENOUGH, settings=settings)
    wanted = dict(module.named_parameters())
    assert taken.tensors.keys() == wanted.keys()
    for name, tensor in taken.tensors.items():
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (
            wanted[name].dtype,
            wanted[name].shape,
            wanted[name].stride(),
        )
        assert torch.equal(tensor.float(), wanted[name].float()), name
    assert taken.tensors["a.0.weight_scale"].item() == 2.0
    assert taken.derived == ("cache",)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many bytes of tensors are made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.empty:
            self.nbytes += made.nbytes
        return made


def test_h39_nothing_is_made_for_more_than_is_allowed(publish: Publish, settings: Settings) -> None:
    publish().line()
    need = catalogue(Encoder(8, seed=1)).layout.nbytes
    with Allocations() as made:  # type: ignore[no-untyped-call]
        with pytest.raises(MismatchError, match=rf"{need} bytes of tensors are offered, more than the {need - 1}"):
            weightwire.receive_tensors(identity(), max_nbytes=need - 1, settings=settings)
        assert made.nbytes == 0
        weightwire.receive_tensors(identity(), max_nbytes=need, settings=settings)
        assert made.nbytes == need


@pytest.mark.parametrize("bound", [0, -1, True, 1.5])
def test_a_bound_is_a_number_of_bytes(bound: Any, settings: Settings) -> None:
    with pytest.raises(ConfigError, match="max_nbytes is"):
        weightwire.receive_tensors(identity(), max_nbytes=bound, settings=settings)


def test_nobody_serves_them(settings: Settings) -> None:
    with pytest.raises(NoSourceError, match="nobody serves this model"):
        weightwire.receive_tensors(identity(), max_nbytes=ENOUGH, settings=settings)


def test_h06_declared_state_is_refused_by_name(settings: Settings) -> None:
    module = Stateful({"weight": torch.ones(3)})
    with (
        weightwire.publish(module, held_identity(), settings=settings),
        pytest.raises(ManifestMismatch, match="declares state of the root module, which tensors by name do not carry"),
    ):
        weightwire.receive_tensors(held_identity(), max_nbytes=ENOUGH, settings=settings)


def on_two_ranks(call: Callable[[int, weightwire.Coordinates, Any], Any]) -> list[Any]:
    """What each rank returned, or raised."""
    decisions = MemoryDecisions()

    def one(rank: int) -> Any:
        where = weightwire.Coordinates(tp_rank=rank, tp_size=2)
        try:
            return call(rank, where, weightwire.ranks(decisions, rank, 2))
        except weightwire.WeightwireError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def test_h23_ranks_take_their_own_parts_all_or_none(settings: Settings) -> None:
    wanted = held_identity(tp_size=2)
    parts = [Held({"a.weight": torch.full((3,), float(rank))}) for rank in range(2)]
    sources = on_two_ranks(
        lambda rank, where, group: weightwire.publish(
            parts[rank], wanted, coordinates=where, group=group, settings=settings
        )
    )

    def receive(*bounds: int) -> list[Any]:
        return on_two_ranks(
            lambda rank, where, group: weightwire.receive_tensors(
                wanted, max_nbytes=bounds[rank], coordinates=where, group=group, settings=settings
            )
        )

    with sources[0], sources[1]:
        assert [each.tensors["a.weight"].tolist() for each in receive(12, 12)] == [[0.0] * 3, [1.0] * 3]
        good, bad = receive(12, 11)
        assert isinstance(good, DecisionError)
        assert "rank 1: tp1/2 pp0/1 ep0/1 dp0/1: 12 bytes" in good.problem
        assert isinstance(bad, MismatchError)


def test_h25_a_program_that_is_still_reading_its_disk_is_followed(
    start: Start,  # noqa: F811
    file: Path,  # noqa: F811
    settings: Settings,
) -> None:
    (reader,) = start("fill")
    reader.tell("begin")
    assert reader.line() == ["half"]
    patient, moved = replace(settings, stall_timeout=30.0), threading.Event()

    def progress(phase: str, done: int, total: int, unit: str) -> None:  # noqa: ARG001  (the protocol's)
        if phase == "transfer" and done:
            moved.set()

    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(
            weightwire.receive_tensors, IDENTITY, max_nbytes=ENOUGH, settings=patient, progress=progress
        )
        assert moved.wait(20)
        reader.tell("go on")
        said, weights_id, _ = reader.line()
        assert said == "ready"
        taken = received.result(30)
    assert taken.report.followed
    assert taken.report.weights_id == weights_id
    wanted = Tower()
    with weightwire.filling(wanted, held_identity(), settings=settings) as disk:
        read(file, wanted, disk, lambda _: None)
    disk.published.withdraw()
    assert all(torch.equal(taken.tensors[name], tensor) for name, tensor in wanted.state_dict().items())


def test_a_view_that_no_tensor_can_be_is_refused_by_name() -> None:
    view = View(name="odd", dtype="float16", shape=(1,), stride=(1,), offset=1)
    entry = Entry(name="bytes", dtype="uint8", shape=(4,), order=(0,), kind=TensorClass.WEIGHT, nbytes=4, views=(view,))
    held = catalogue(Held({"bytes": torch.zeros(4, dtype=torch.uint8)}))
    with pytest.raises(ManifestMismatch, match="odd is a view that begins within an element"):
        _by_name(Layout(entries=(entry,)), held)
