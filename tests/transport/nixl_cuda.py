"""Device memory over nixl. Run by ``test_nixl`` where there is a CUDA device."""

from __future__ import annotations

import numpy as np
import torch
from transport import nixl_backends
from transport.peers import LEASE, MIB, Gate, pattern, soon

from weightwire.manifest.address import AddressSpace, Segment
from weightwire.transport import device
from weightwire.types import Span

NBYTES = 40 * MIB + 3


def on_device(tensor: torch.Tensor) -> AddressSpace:
    address = tensor.data_ptr()
    segment = Segment(0, address, tensor.nbytes, f"cuda:{tensor.get_device()}")
    return AddressSpace([segment], [device.allocation_of(address)], tensor)


def test_device_memory_is_read_into_device_memory() -> None:
    content = torch.from_numpy(pattern(NBYTES)).cuda()
    empty = torch.zeros_like(content)
    device.synchronize("cuda:0")
    source, target = nixl_backends.nixl(Gate()), nixl_backends.nixl(None)
    endpoint = source.describe(source.register(on_device(content)), LEASE)
    connection = target.connect(endpoint, LEASE, soon(30))
    connection.read(Span(0, NBYTES), target.register(on_device(empty))).wait(soon(30))
    path = connection.path
    connection.fence(soon())
    target.close()
    source.close()
    assert np.array_equal(empty.cpu().numpy(), pattern(NBYTES))
    assert "cuda" in path or "?" in path
