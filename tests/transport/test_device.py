"""The logic of staged copies, against a device that copies late, as a real one does; and a real one where there is."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport.peers import MIB, Bytes, pattern

from weightwire.errors import ConfigError, TransferError
from weightwire.manifest.address import Region, Segment
from weightwire.transport import device, memory
from weightwire.transport.landing import Landing, Staging, leaving


class LateStage:
    """A stage whose copies happen no sooner than ``settle``: whoever does not wait has the wrong bytes."""

    def __init__(self, nbytes: int, journal: list[str], name: str) -> None:
        self.host = memoryview(bytearray(nbytes))
        self._queued: list[tuple[memoryview, memoryview]] = []
        self._journal = journal
        self._name = name

    def fetch(self, piece: Segment, at: int) -> None:
        self._journal.append(f"begin {self._name}")
        self._queued.append((self.host[at : at + piece.nbytes], memory.view(piece.address, piece.nbytes)))

    def put(self, piece: Segment, at: int) -> None:
        self._journal.append(f"begin {self._name}")
        self._queued.append((memory.view(piece.address, piece.nbytes), self.host[at : at + piece.nbytes]))

    def settle(self) -> None:
        if self._queued:
            self._journal.append(f"wait {self._name}")
        for to, source in self._queued:
            to[:] = source
        self._queued.clear()


class LateDevice:
    """Host memory that poses as device memory."""

    def __init__(self, sizes: Sequence[int], content: Bytes | None = None) -> None:
        self.bytes = content if content is not None else np.zeros(sum(sizes), dtype=np.uint8)
        self.segments, at = [], 0
        for nbytes in sizes:
            self.segments.append(Segment(at, int(self.bytes.ctypes.data) + at, nbytes, "cuda:0"))
            at += nbytes
        self.journal: list[str] = []
        self.made = [LateStage(100, self.journal, "a"), LateStage(100, self.journal, "b")]

    def stages(self, name: str) -> Sequence[LateStage]:
        assert name == "cuda:0"
        return self.made


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 350), max_size=12))
def test_whatever_the_sizes_all_bytes_arrive_both_ways(sizes: list[int]) -> None:
    content = pattern(sum(sizes))
    out = bytearray(len(content))
    device.copy_to_host(
        LateDevice(sizes, content).segments, memoryview(out), (source := LateDevice(sizes, content)).stages
    )
    assert source.bytes.tobytes() == content.tobytes() == bytes(out)
    target = LateDevice(sizes)
    device.copy_from_host(content.data, target.segments, target.stages)
    assert np.array_equal(target.bytes, content)


def test_one_stage_arrives_while_the_other_is_emptied() -> None:
    source = LateDevice([400], pattern(400))
    device.copy_to_host(source.segments, memoryview(bytearray(400)), source.stages)
    assert source.journal == ["begin a", "begin b", "wait a", "begin a", "wait b", "begin b", "wait a", "wait b"]
    target = LateDevice([400])
    device.copy_from_host(pattern(400).data, target.segments, target.stages)
    assert target.journal == ["begin a", "begin b", "wait a", "begin a", "wait b", "begin b", "wait a", "wait b"]


def mixed(late: LateDevice, sizes: Sequence[int]) -> tuple[list[Segment], Bytes]:
    """``sizes`` in turns on the device and on the host, and the host's part."""
    host = np.zeros(sum(sizes), dtype=np.uint8)
    segments = [
        late.segments[at] if at % 3 else Segment(part.offset, int(host.ctypes.data) + part.offset, part.nbytes, "cpu")
        for at, part in enumerate(late.segments)
    ]
    return segments, host


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 350), min_size=1, max_size=12), portion=st.integers(1, 200))
def test_what_leaves_and_lands_through_two_buffers_is_all_there(sizes: list[int], portion: int) -> None:
    content = pattern(sum(sizes))
    source, target = LateDevice(sizes, content.copy()), LateDevice(sizes)
    from_segments, from_host = mixed(source, sizes)
    from_host[:] = content
    sent = b"".join(bytes(view) for part in leaving(from_segments, Staging(source.stages, 100)) for view in part)
    assert sent == content.tobytes()
    to_segments, to_host = mixed(target, sizes)
    landing, at = Landing(to_segments, Staging(target.stages, 100)), 0
    while buffers := landing.buffers(3):
        nbytes = min(portion, buffers[0].nbytes)
        buffers[0][:nbytes] = sent[at : at + nbytes]
        landing.advance(nbytes)
        at += nbytes
    assert at == len(sent)
    for part in to_segments:
        landed = to_host if part.device == "cpu" else target.bytes
        assert np.array_equal(landed[part.offset :][: part.nbytes], content[part.offset :][: part.nbytes])


def test_one_buffer_is_sent_while_the_other_arrives() -> None:
    source = LateDevice([400], pattern(400))
    for _ in leaving(source.segments, Staging(source.stages, 100)):
        source.journal.append("sent")
    assert source.journal == [
        "begin b",
        "begin a",
        "wait b",
        "sent",
        "begin b",
        "wait a",
        "sent",
        "begin a",
        "wait b",
        "sent",
        "wait a",
        "sent",
    ]


def test_nothing_lands_once_a_broken_read_was_settled() -> None:
    target = LateDevice([250])
    landing = Landing(target.segments, Staging(target.stages, 100))
    for _ in range(2):
        (buffer,) = landing.buffers(1)
        buffer[:] = b"x" * buffer.nbytes
        landing.advance(buffer.nbytes)
    landing.settle()
    before = target.bytes.copy()
    for stage in target.made:
        stage.settle()
    assert np.array_equal(target.bytes, before)
    assert before[:200].all()


def test_sizes_that_differ_and_several_devices_are_refused() -> None:
    late = LateDevice([10])
    with pytest.raises(ValueError, match="10 bytes"):
        device.copy_to_host(late.segments, memoryview(bytearray(11)), late.stages)
    mixed = [Segment(0, 1, 5, "cuda:0"), Segment(5, 100, 5, "cuda:1")]
    with pytest.raises(ValueError, match="cuda:1"):
        device.copy_from_host(memoryview(bytes(10)), mixed, late.stages)


SEGMENTS = [
    {"address": 1 << 20, "total_size": 2 << 20, "device": 1, "is_expandable": False},
    {"address": 8 << 20, "total_size": 20 << 20, "device": 1, "is_expandable": True},
]


def test_the_whole_allocation_of_an_address() -> None:
    assert device.allocation_of((2 << 20) + 5, lambda: SEGMENTS) == Region(1 << 20, 2 << 20, "cuda:1")


def test_expandable_segments_and_foreign_memory_are_refused_early() -> None:
    with pytest.raises(ConfigError, match="expandable_segments:False"):
        device.allocation_of(9 << 20, lambda: SEGMENTS)
    with pytest.raises(TransferError, match="no allocation"):
        device.allocation_of(3 << 20, lambda: SEGMENTS)


def test_whole_allocations_are_registered_once_whatever_lies_in_them() -> None:
    touching = [
        {"address": 1 << 20, "total_size": 2 << 20, "device": 0},
        {"address": 3 << 20, "total_size": 1 << 20, "device": 0},
        {"address": 9 << 20, "total_size": 1 << 20, "device": 0},
    ]
    tensors = [Region((1 << 20) + at, 512, "cuda:0") for at in range(0, 4096, 512)]
    across = Region((3 << 20) - 512, 1024, "cuda:0")
    first, second = Region(1 << 20, 2 << 20, "cuda:0"), Region(3 << 20, 1 << 20, "cuda:0")
    assert device.allocations(tensors, lambda: touching) == [first]
    assert device.allocations([across, *tensors], lambda: touching) == [first, second]
    with pytest.raises(TransferError, match="no allocation"):
        device.allocations([Region((4 << 20) - 512, 1024, "cuda:0")], lambda: touching)


def test_many_allocations_are_found_quickly() -> None:
    many = [{"address": at << 21, "total_size": 2 << 20, "device": 0} for at in range(1, 20_001)]
    regions = [Region(segment["address"], segment["total_size"], "cuda:0") for segment in many]
    began = time.monotonic()
    assert device.allocations(regions, lambda: many) == regions
    assert time.monotonic() - began < 10  # every one against every other takes minutes


def test_h35_regions_that_cannot_be_registered_are_refused() -> None:
    good = Region(1 << 20, 2 << 20, "cuda:1")
    assert device.allocations([good, Region((1 << 20) + 512, 1024, "cuda:1")], lambda: SEGMENTS) == [good]
    for bad in (
        Region(1 << 20, (2 << 20) + 1, "cuda:1"),
        Region(1 << 20, 10, "cuda:0"),
        Region(1 << 20, 10, "mps:0"),
    ):
        with pytest.raises(TransferError):
            device.allocations([good, bad], lambda: SEGMENTS)


def test_a_device_that_is_not_there_is_an_error() -> None:
    for call in (device.synchronize, device.pinned_stages):
        with pytest.raises(TransferError, match="cuda:63"):
            call("cuda:63")
    device.synchronize("cpu")


def test_cuda_memory_goes_both_ways_and_its_allocation_is_found() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    content = pattern(75 * MIB + 13)
    on_device = torch.zeros(content.size, dtype=torch.uint8, device="cuda:0")
    cuts = sorted(random.Random(1).sample(range(1, content.size), 50))
    segments = [
        Segment(begin, on_device.data_ptr() + begin, end - begin, "cuda:0")
        for begin, end in zip([0, *cuts], [*cuts, content.size], strict=True)
    ]
    device.copy_from_host(content.data, segments)
    assert np.array_equal(on_device.cpu().numpy(), content)
    out = np.zeros_like(content)
    device.synchronize("cuda:0")
    device.copy_to_host(segments, out.data)
    assert np.array_equal(out, content)
    whole = device.allocation_of(on_device.data_ptr() + 5)
    assert whole.address <= on_device.data_ptr()
    assert whole.nbytes >= content.size
    assert device.allocations([Region(on_device.data_ptr(), content.size, "cuda:0")]) == [whole]
