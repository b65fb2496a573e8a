"""What the manifest tests share: oracles that are written another way than the code, and copying by segments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import xxhash
from torch import nn

from weightwire.manifest.address import AddressSpace, Segment
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.memory import view
from weightwire.manifest.records import Layout, Manifest
from weightwire.types import Span

torch.set_num_threads(1)
BLOCK = 64 * 1024


def reference_digest(data: bytes) -> bytes:
    hashes = [xxhash.xxh64(data[at : at + BLOCK], seed=0).intdigest() for at in range(0, len(data), BLOCK)]
    return xxhash.xxh3_128(b"".join(value.to_bytes(8, "little") for value in hashes)).digest()


def space(data: bytes, cuts: Sequence[int] = (), gap: int = 0) -> AddressSpace:
    """``data`` in memory, cut at ``cuts``, with ``gap`` bytes of something else before each piece."""
    edges = sorted({0, len(data), *cuts})
    segments, owners = [], []
    for begin, end in itertools.pairwise(edges):
        buffer = torch.full((gap + end - begin,), 0xEE, dtype=torch.uint8)
        buffer[gap:] = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.uint8)
        segments.append(Segment(begin, buffer.data_ptr() + gap, end - begin, "cpu"))
        owners.append(buffer)
    return AddressSpace(segments, [], owners)


def logical_bytes(memory: AddressSpace) -> bytes:
    return b"".join(bytes(view(part.address, part.nbytes)) for part in memory.slices(memory.span))


def manifest_of(catalogue: Catalogue) -> Manifest:
    return Manifest(layout=catalogue.layout, digests=digest_leaves(catalogue.memory, catalogue.layout.leaves))


def fill(target: AddressSpace, source: AddressSpace) -> None:
    """What a transfer does, in one process."""
    data = logical_bytes(source)
    assert target.span == source.span == Span(0, len(data))
    for part in target.segments:
        view(part.address, part.nbytes)[:] = data[part.offset : part.offset + part.nbytes]


def tensor_bytes(tensor: torch.Tensor, order: Sequence[int]) -> bytes:
    """Elements in memory order, read one dimension permutation at a time and not through addresses."""
    plain = tensor.detach().permute(tuple(order)).contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy()) if plain.numel() else b""


def oracle_bytes(layout: Layout, tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(tensor_bytes(tensors[entry.name], entry.order) for entry in layout.entries)


def entry_names(catalogue: Catalogue) -> set[str]:
    return {entry.name for entry in catalogue.layout.entries}


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
