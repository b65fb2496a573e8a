"""Which bytes of memory a tensor covers, and in what order its elements lie there; or why that cannot be said."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightwire.errors import CatalogueError
from weightwire.manifest.device_memory import tensor_at
from weightwire.manifest.dtypes import ITEM_BYTES
from weightwire.manifest.orders import ascending, canonical_dims

_PLAIN = (torch.Tensor, torch.nn.Parameter)

MAX_RUNS = 65536
"""A tensor in more separate runs of memory than this is refused: its address list would outweigh it."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Where a tensor lies.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        address: of the first byte; 0 where nothing is covered.
        extent: bytes from the first to one past the last covered byte, gaps included.
        nbytes: bytes covered.
        dtype: torch name without the prefix.
        shape: sizes.
        stride: in elements.
        order: dimensions from slowest to fastest, canonical (see ``manifest.orders``).
    """

    device: str
    address: int
    extent: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def end(self) -> int:
        """One past the last covered byte."""
        return self.address + self.extent

    @property
    def dense(self) -> bool:
        """Whether the covered bytes have no gaps."""
        return self.extent == self.nbytes

    def runs(self) -> Iterator[tuple[int, int]]:
        """``(address, nbytes)`` of each contiguous run, ascending, which is also the logical order."""
        if self.dense:
            if self.nbytes:
                yield self.address, self.nbytes
            return
        outer, inner = _split(self)
        yield from ((self.address + start, inner) for start in _starts(outer))

    def bytes_at(self, address: int | None = None) -> torch.Tensor:
        """The covered bytes as ``uint8`` of shape ``shape + (item size,)`` over the memory itself, no copy."""
        item = ITEM_BYTES[self.dtype]
        flat = tensor_at(self.address if address is None else address, self.extent, self.device)
        strides = (*(s * item for s in self.stride), 1)
        return flat.as_strided((*self.shape, item), strides) if self.nbytes else flat.view((*self.shape, item))


def measure(name: str, tensor: torch.Tensor) -> Footprint:
    """The footprint of ``tensor``.

    Raises:
        CatalogueError: the tensor has no plain bytes of its own (meta, sparse, quantized, distributed, wrapped), or
            its elements share bytes; names it.
    """
    _refuse_opaque(name, tensor)
    shape, stride = _shared(tuple(tensor.shape)), _shared(tuple(tensor.stride()))
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise CatalogueError(f"{name} has dtype {dtype}, whose bytes have no agreed meaning", "store it as integers")
    if tensor.numel() == 0:
        return Footprint(str(tensor.device), 0, 0, 0, dtype, shape, stride, ascending(len(shape)))
    item = ITEM_BYTES[dtype]
    if tensor.is_contiguous():
        nbytes = tensor.numel() * item
        return Footprint(
            _device(tensor), tensor.data_ptr(), nbytes, nbytes, dtype, shape, stride, ascending(len(shape))
        )
    order = _memory_order(shape, stride)
    _refuse_shared_bytes(name, shape, stride, order)
    extent = (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))) * item
    found = Footprint(_device(tensor), tensor.data_ptr(), extent, tensor.numel() * item, dtype, shape, stride, order)
    _refuse_fragments(name, found)
    return found


def overlap(one: Footprint, other: Footprint) -> bool:
    """Whether two tensors of one device cover a byte in common."""
    if one.address >= other.end or other.address >= one.end:
        return False
    left, right = one.runs(), other.runs()
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        if a[0] < b[0] + b[1] and b[0] < a[0] + a[1]:
            return True
        if a[0] + a[1] <= b[0]:
            a = next(left, None)
        else:
            b = next(right, None)
    return False


@functools.lru_cache(4096)
def _shared(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One object for equal ones: many thousand tensors have few shapes."""
    return sizes


def _refuse_opaque(name: str, tensor: torch.Tensor) -> None:
    kind = type(tensor).__name__
    if type(tensor) in _PLAIN:
        kind = ""
    elif any(base.__name__ == "DTensor" for base in type(tensor).__mro__):
        raise CatalogueError(f"{name} is a DTensor", "publish its local tensor (to_local())")
    elif kind in {"UninitializedParameter", "UninitializedBuffer"}:
        raise CatalogueError(f"{name} is not initialized yet", "run the module once, or give it its shape")
    if tensor.layout != torch.strided or tensor.is_quantized:
        layout = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise CatalogueError(f"{name} has layout {layout}, which has no plain bytes", "store it as dense tensors")
    wraps: bool = bool(kind) and is_traceable_wrapper_subclass(tensor)  # typed as a guard that no Tensor passes
    if wraps or kind == "FakeTensor":
        raise CatalogueError(f"{name} is a {kind}, which wraps other tensors", "hold the inner tensors as buffers")
    if tensor.is_meta:
        raise CatalogueError(f"{name} is on the meta device: it has no bytes", "materialise it first (to_empty)")
    if tensor.device.type not in {"cpu", "cuda"}:
        raise CatalogueError(f"{name} is on {tensor.device}", "only cpu and cuda memory can be read by a peer")
    if tensor.is_conj() or tensor.is_neg():
        raise CatalogueError(f"{name} is a lazy conjugate or negative", "resolve it first (resolve_conj, resolve_neg)")


def _refuse_shared_bytes(name: str, shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> None:
    reach = 1  # elements spanned by the faster dimensions
    for dim in reversed(order):
        if shape[dim] == 1:
            continue
        if stride[dim] == 0:
            raise CatalogueError(f"{name} is expanded: its elements share bytes", "make it contiguous (contiguous())")
        if stride[dim] < reach:
            raise CatalogueError(
                f"{name} overlaps itself (stride {tuple(stride)})",
                "make it contiguous (contiguous())",
            )
        reach += (shape[dim] - 1) * stride[dim]


def _refuse_fragments(name: str, found: Footprint) -> None:
    runs = math.prod(size for size, _ in _split(found)[0])
    if runs > MAX_RUNS:
        raise CatalogueError(f"{name} lies in {runs} separate runs of memory", "make it contiguous (contiguous())")


def _memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    by_stride = sorted(range(len(shape)), key=lambda dim: (-stride[dim], dim))
    return canonical_dims(shape, by_stride)


def _split(found: Footprint) -> tuple[list[tuple[int, int]], int]:
    """Outer dimensions as (size, stride in bytes), slowest first, and the bytes of one contiguous run."""
    item = ITEM_BYTES[found.dtype]
    dims = [(found.shape[dim], found.stride[dim] * item) for dim in found.order if found.shape[dim] != 1]
    inner = item
    while dims and dims[-1][1] == inner:
        inner *= dims.pop()[0]
    return dims, inner


def _starts(outer: list[tuple[int, int]]) -> Iterator[int]:
    if not outer:
        yield 0
        return
    (size, stride), rest = outer[0], outer[1:]
    for index in range(size):
        yield from (index * stride + start for start in _starts(rest))


def _device(tensor: torch.Tensor) -> str:
    device = tensor.device
    return device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"
