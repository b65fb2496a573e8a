"""Device memory over nixl, between two processes. Run by ``test_nixl`` where there is a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transport import nixl_backends
from transport.peers import LEASE, MIB, Gate, pattern, soon

from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport import device
from weightwire.types import Span

SIZES = (20 * MIB, 20 * MIB, 100, 40 * MIB, 4 * MIB, 3)
TOTAL = sum(SIZES)
"""Tensors as large as their allocations, which therefore touch, and small ones that share one."""


def on_device(content: torch.Tensor) -> tuple[AddressSpace, list[torch.Tensor]]:
    segments, tensors, offset = [], [], 0
    for nbytes in SIZES:
        tensor = content[offset : offset + nbytes].to("cuda:0", copy=True)
        tensors.append(tensor)
        segments.append(Segment(offset, tensor.data_ptr(), nbytes, "cuda:0"))
        offset += nbytes
    device.synchronize("cuda:0")
    return AddressSpace(segments, [Region(s.address, s.nbytes, s.device) for s in segments], tensors), tensors


def serve() -> None:
    source = nixl_backends.nixl(Gate())
    memory, _ = on_device(torch.from_numpy(pattern(TOTAL)))
    print(source.describe(source.register(memory), LEASE).hex(), flush=True)
    sys.stdin.read()
    os._exit(0)


def test_h46_device_memory_is_read_from_the_device_memory_of_another_process_and_not_over_tcp() -> None:
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; import nixl_cuda; nixl_cuda.serve()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as source:
        assert source.stdout is not None
        endpoint = bytes.fromhex(source.stdout.readline())
        memory, tensors = on_device(torch.zeros(TOTAL, dtype=torch.uint8))
        target = nixl_backends.nixl(None)
        connection = target.connect(endpoint, LEASE, soon(30))
        connection.read(Span(0, TOTAL), target.register(memory)).wait(soon(30))
        path = connection.path
        connection.fence(soon())
        target.close()
        source.kill()
    assert np.array_equal(torch.cat(tensors).cpu().numpy(), pattern(TOTAL))
    assert path == "nixl/ucx:cuda_ipc"
