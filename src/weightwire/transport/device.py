"""CUDA memory: copies through bounded pinned stages, whole allocations, and which of them NIXL can register.

torch is imported by what needs it, so that a host without a device pays nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from weightwire.errors import ConfigError, TransferError
from weightwire.manifest.address import Region, Segment
from weightwire.transport import memory

STAGE_BYTES = memory.STAGE_BYTES
STAGES = 2
"""Pinned memory of a thread and device: ``STAGES`` times ``STAGE_BYTES``, whatever the model's size."""

Snapshot = Callable[[], Iterable[Mapping[str, Any]]]
"""``torch.cuda.memory_snapshot``: the allocator's segments."""


class Stage(Protocol):
    """Host memory that a device copies to and from. Copies run in order; ``settle`` waits for all of them."""

    @property
    def host(self) -> memoryview:
        """The stage's bytes."""
        ...

    def fetch(self, piece: Segment, at: int) -> None:
        """Begin copying ``piece`` from the device to ``host[at:]``."""
        ...

    def put(self, piece: Segment, at: int) -> None:
        """Begin copying ``host[at:]`` to ``piece`` on the device."""
        ...

    def settle(self) -> None:
        """Return once all copies that were begun are done."""
        ...


Stages = Callable[[str], Sequence[Stage]]
"""Device -> this thread's stages for it."""


def copy_to_host(segments: Sequence[Segment], out: memoryview, stages: Stages | None = None) -> None:
    """Copy device bytes into ``out``; all in place when it returns.

    Args:
        segments: of one device, in order; their bytes must be final (``synchronize`` first).
        out: host bytes of exactly their size.
        stages: where from; the pinned ones of this thread if left out.

    Raises:
        ValueError: sizes that differ, or several devices.
        TransferError: the device does not work.
    """
    ready = _stages(segments, out, stages)
    if not ready:
        return
    at, before = 0, _Fill([], 0)
    stage = ready[-1]
    for number, fill in enumerate(_fills(segments, stage.host.nbytes)):
        arriving = ready[number % len(ready)]
        fill.begin(arriving.fetch)
        at += before.take(stage, out[at:])  # what the other stage holds, while this one arrives
        before, stage = fill, arriving
    before.take(stage, out[at:])


def copy_from_host(data: memoryview, segments: Sequence[Segment], stages: Stages | None = None) -> None:
    """Copy ``data`` into device bytes; all in place, and visible to every stream, when it returns.

    Args:
        data: host bytes of exactly the size of ``segments``.
        segments: of one device, in order. Nothing but the default stream may have work queued for their memory.
        stages: where to; the pinned ones of this thread if left out.

    Raises:
        ValueError: sizes that differ, or several devices.
        TransferError: the device does not work.
    """
    ready = _stages(segments, data, stages)
    if not ready:
        return
    at = 0
    for number, fill in enumerate(_fills(segments, ready[0].host.nbytes)):
        stage = ready[number % len(ready)]
        stage.settle()  # what was in it has left
        stage.host[: fill.nbytes] = data[at : at + fill.nbytes]
        fill.begin(stage.put)
        at += fill.nbytes
    for stage in ready:
        stage.settle()


@dataclass(slots=True)
class _Fill:
    """What goes through a stage at once."""

    pieces: list[Segment]
    nbytes: int

    def begin(self, copy: Callable[[Segment, int], None]) -> None:
        at = 0
        for piece in self.pieces:
            copy(piece, at)
            at += piece.nbytes

    def take(self, stage: Stage, out: memoryview) -> int:
        stage.settle()
        out[: self.nbytes] = stage.host[: self.nbytes]
        return self.nbytes


def _fills(segments: Sequence[Segment], most: int) -> Iterator[_Fill]:
    fill = _Fill([], 0)
    for segment in segments:
        done = 0
        while done < segment.nbytes:
            if fill.nbytes == most:
                yield fill
                fill = _Fill([], 0)
            nbytes = min(segment.nbytes - done, most - fill.nbytes)
            fill.pieces.append(Segment(segment.offset + done, segment.address + done, nbytes, segment.device))
            fill.nbytes += nbytes
            done += nbytes
    if fill.pieces:
        yield fill


def _stages(segments: Sequence[Segment], host: memoryview, stages: Stages | None) -> Sequence[Stage]:
    devices = {segment.device for segment in segments}
    nbytes = sum(segment.nbytes for segment in segments)
    if nbytes != host.nbytes or len(devices) > 1:
        raise ValueError(f"{nbytes} bytes on {sorted(devices)} and {host.nbytes} on the host")
    return (stages or pinned_stages)(devices.pop()) if devices else ()


class _Pinned(threading.local):
    """Each thread's stages, kept until the thread ends."""

    def __init__(self) -> None:
        self.stages: dict[str, Sequence[Stage]] = {}


_pinned = _Pinned()


def pinned_stages(device: str) -> Sequence[Stage]:
    """This thread's stages for ``device``, made on first use.

    Raises:
        TransferError: there is no such device, or no memory can be pinned.
    """
    found = _pinned.stages.get(device)
    if found is None:
        torch = _cuda(device)
        with _translated(device):
            found = [_TorchStage(torch, device) for _ in range(STAGES)]
        _pinned.stages[device] = found
    return found


class _TorchStage:
    """A pinned buffer and a stream of its own."""

    def __init__(self, torch: Any, device: str) -> None:
        self._torch = torch
        self._device = device
        self._buffer = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)

    @functools.cached_property
    def host(self) -> memoryview:
        return memoryview(self._buffer.numpy())

    def fetch(self, piece: Segment, at: int) -> None:
        with self._in_order():
            self._buffer[at : at + piece.nbytes].copy_(self._on_device(piece), non_blocking=True)

    def put(self, piece: Segment, at: int) -> None:
        with self._in_order():
            self._on_device(piece).copy_(self._buffer[at : at + piece.nbytes], non_blocking=True)

    def settle(self) -> None:
        with _translated(self._device):
            self._stream.synchronize()

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """Copies follow what was queued on the default stream, an initialisation of the same memory for instance."""
        # the device, too: leaving a stream of another one than the thread's would make a context on the thread's
        cuda = self._torch.cuda
        with _translated(self._device), cuda.device(self._device), cuda.stream(self._stream):
            self._stream.wait_stream(self._torch.cuda.default_stream(self._device))
            yield

    def _on_device(self, piece: Segment) -> Any:
        from weightwire.manifest.device_memory import tensor_at  # noqa: PLC0415  # imports torch

        return tensor_at(piece.address, piece.nbytes, piece.device)


@contextlib.contextmanager
def _translated(device: str) -> Iterator[None]:
    """Device errors of torch (``RuntimeError`` and its kin) as ours."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise TransferError(f"{device} failed: {first}", "see the driver's log") from error


def synchronize(device: str) -> None:
    """Return once everything that was queued on ``device`` is done; nothing to do for ``cpu``. Call before digesting.

    Raises:
        TransferError: there is no such device, or it failed.
    """
    if device == "cpu":
        return
    torch = _cuda(device)
    with _translated(device):
        torch.cuda.synchronize(device)


def allocation_of(address: int, snapshot: Snapshot | None = None) -> Region:
    """The whole allocation of torch's CUDA allocator that ``address`` lies in: what is registered, never one tensor.

    Args:
        address: on a device.
        snapshot: the allocator's segments; torch's own if left out.

    Raises:
        ConfigError: it lies in an expandable segment, which consists of mappings that RDMA registers only in part or
            not at all.
        TransferError: torch's allocator did not make it.
    """
    return _Allocations((snapshot or _torch_snapshot)()).holding(address)


def allocations(regions: Iterable[Region], snapshot: Snapshot | None = None) -> list[Region]:
    """The whole allocations that ``regions`` lie in, each once: what is registered instead of them.

    A region may reach over several allocations that happen to touch: the device's keys end with the allocation.

    Args:
        regions: of CUDA devices.
        snapshot: the allocator's segments; torch's own if left out.

    Raises:
        ConfigError: expandable segments; see ``allocation_of``.
        TransferError: not a CUDA device, or not torch's memory.
    """
    given = list(regions)
    for region in given:
        if not region.device.startswith("cuda:"):
            raise TransferError(f"memory on {region.device} cannot be registered", "use transport tcp")
        if snapshot is None:
            _cuda(region.device)
    known = _Allocations((snapshot or _torch_snapshot)() if given else ())
    found = {whole for region in given for whole in known.covering(region)}
    return sorted(found, key=lambda whole: (whole.device, whole.address))


class _Allocations:
    """A snapshot of the allocator, by address."""

    def __init__(self, segments: Iterable[Mapping[str, Any]]) -> None:
        self._segments = sorted(segments, key=lambda segment: int(segment["address"]))
        self._starts = [int(segment["address"]) for segment in self._segments]

    def holding(self, address: int) -> Region:
        at = bisect.bisect_right(self._starts, address) - 1
        segment = self._segments[at] if at >= 0 else None
        if segment is None or address >= segment["address"] + segment["total_size"]:
            raise TransferError(
                f"no allocation of torch's CUDA allocator holds address {address:#x}",
                "give weights plain cudaMalloc memory (no sleep-mode or VMM pool), or use transport tcp",
            )
        if segment.get("is_expandable", False):
            raise ConfigError(
                f"weights on cuda:{segment['device']} lie in an expandable segment, which cannot be registered",
                "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, or use transport tcp",
            )
        return Region(segment["address"], segment["total_size"], f"cuda:{segment['device']}")

    def covering(self, region: Region) -> Iterator[Region]:
        at = region.address
        while at < region.address + region.nbytes:
            whole = self.holding(at)
            if whole.device != region.device:
                raise TransferError(f"{region.device} memory lies on {whole.device}", "report this as a bug")
            yield whole
            at = whole.address + whole.nbytes


def _torch_snapshot() -> Iterable[Mapping[str, Any]]:
    cuda: Any = importlib.import_module("torch.cuda")
    found: list[dict[str, Any]] = cuda.memory_snapshot()
    return found


def _cuda(device: str) -> Any:
    import torch  # noqa: PLC0415  # see the module's docstring

    if not device.startswith("cuda:") or not torch.cuda.is_available():
        raise TransferError(f"there is no device {device} here", "check the driver and CUDA_VISIBLE_DEVICES")
    return torch
