"""Memory of this process by address, as flat ``uint8`` tensors on whatever device it lies."""

from __future__ import annotations

import torch

from weightwire.manifest.memory import view


class _CudaMemory:
    """What ``torch.as_tensor`` reads to wrap device memory without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(address: int, nbytes: int, device: str) -> torch.Tensor:
    """A flat ``uint8`` tensor over existing memory, no copy; the caller keeps the memory alive.

    Args:
        address: of the first byte; ours, from an ``AddressSpace``, never from a peer.
        nbytes: length, may be zero.
        device: ``cpu`` or ``cuda:N``.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device == "cpu":
        return torch.frombuffer(view(address, nbytes), dtype=torch.uint8)
    return torch.as_tensor(_CudaMemory(address, nbytes), device=device)
