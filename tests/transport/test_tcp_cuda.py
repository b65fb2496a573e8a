"""tcp and inproc between device memory and host memory; only where there is a CUDA device."""

from __future__ import annotations

import time
from typing import Any

import pytest
from transport import backends
from transport.peers import LEASE, MIB, Gate, pattern, pull, soon

from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport.base import Transport
from weightwire.types import Span

torch: Any = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SIZES = (3, 5 * MIB + 1, 100, 17 * MIB, 9, 1000, 8 * MIB)
TOTAL = sum(SIZES)


def spread(devices: str, content: Any) -> tuple[AddressSpace, list[Any]]:
    """``content`` in one tensor for each of ``SIZES``, on the device that each letter (c, g) stands for."""
    segments, tensors, offset = [], [], 0
    for at, nbytes in enumerate(SIZES):
        place = "cuda:0" if devices[at % len(devices)] == "g" else "cpu"
        tensor = content[offset : offset + nbytes].to(place, copy=True)
        segments.append(Segment(offset, tensor.data_ptr(), nbytes, place))
        tensors.append(tensor)
        offset += nbytes
    torch.cuda.synchronize()
    return AddressSpace(segments, [Region(s.address, s.nbytes, s.device) for s in segments], tensors), tensors


@pytest.mark.parametrize("make", [backends.tcp, backends.inproc])
@pytest.mark.parametrize(("source", "target"), [("g", "g"), ("g", "c"), ("c", "g"), ("gc", "ccg"), ("cg", "gc")])
def test_bytes_arrive_exactly_whatever_device_they_lie_on(make: Any, source: str, target: str) -> None:
    content = torch.from_numpy(pattern(TOTAL))
    gate = Gate()
    serving: Transport = make(gate)
    reading: Transport = make(None)
    gate.registration = serving.register(spread(source, content)[0])
    memory, tensors = spread(target, torch.zeros_like(content))
    connection = reading.connect(serving.describe(gate.registration, LEASE), LEASE, soon())
    step = 7 * MIB + 11
    spans = [Span(at, min(step, TOTAL - at)) for at in range(0, TOTAL, step)]
    began = time.monotonic()
    pull(connection, spans, reading.register(memory))
    print(f"{source} to {target}: {TOTAL / (time.monotonic() - began) / 1e9:.2f} GB/s")
    connection.fence(soon())
    reading.close()
    serving.close()
    torch.cuda.synchronize()
    assert torch.equal(torch.cat([tensor.cpu() for tensor in tensors]), content)
