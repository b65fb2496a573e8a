"""Leaf digests where the bytes are: their speed, and whether they equal the host's."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from gpu_bare import seconds, timed
from torch import nn

from weightwire.manifest import device_digest, digest
from weightwire.manifest.address import AddressSpace, Segment, Spans
from weightwire.manifest.catalogue import catalogue
from weightwire.manifest.device_memory import tensor_at
from weightwire.manifest.records import Leaf
from weightwire.types import Span


def digests(model: nn.Module, device: str, host_mib: int) -> dict[str, Any]:
    """The whole path over the model, the kernel alone, and equality with the host and with tensor operations."""
    found = catalogue(model)
    leaves = found.layout.leaves
    path = seconds(timed(lambda: digest.digest_leaves(found.memory, leaves), 4, (device,)))
    some = leaves[:host_mib]
    here = _on_host(found.memory, some)
    began = time.perf_counter()
    expected = digest.digest_leaves(here, some, threads=4)
    host_s = time.perf_counter() - began
    few, nbytes = [leaf.span for leaf in some[:64]], sum(leaf.span.nbytes for leaf in some)
    result = {
        "nbytes": found.layout.nbytes,
        "leaves": len(leaves),
        "path_first_s": path[0],
        "path_s": min(path[1:]),
        "path_gbps": found.layout.nbytes / min(path[1:]) / 1e9,
        "equals_host": digest.digest_leaves(found.memory, some) == expected,
        "host_4_threads_gbps": nbytes / host_s / 1e9,
    }
    return result | _kernels(found.memory, leaves, few, device) if device.startswith("cuda") else result


def _kernels(memory: AddressSpace, leaves: tuple[Leaf, ...], few: list[Span], device: str) -> dict[str, Any]:
    from weightwire.manifest import device_kernel
    from weightwire.manifest.device_blocks import Blocks

    blocks = Blocks(memory.all, Spans.of([leaf.span for leaf in leaves]))
    address, nbytes = blocks.address[blocks.whole], blocks.nbytes[blocks.whole]
    out = torch.empty(len(address), dtype=torch.int64, device=device)
    speeds, values = {}, set()
    for row, stages in ((1024, 3), (512, 3), (1024, 2), (2048, 2)):
        kernel = device_kernel.Kernel(torch.cuda.current_device(), row, stages)
        took = _kernel_seconds(kernel, address, nbytes, out)
        speeds[f"{row}x{stages}"] = round(float(nbytes.sum()) / took / 1e9, 1)
        values.add(hash(out.cpu().numpy().tobytes()))
    twin_s = min(seconds(timed(lambda: _twin(memory, few, device), 3, (device,))))
    return {
        "kernel_gbps": speeds,
        "variants_agree": len(values) == 1,
        "in_place_blocks": int(blocks.whole.sum()),
        "gathered_blocks": int((~blocks.whole).sum()),
        "equals_twin": _twin(memory, few, device) == device_digest.digest_spans(memory, few),
        "twin_gbps": sum(span.nbytes for span in few) / twin_s / 1e9,
        "by_run_gbps": {
            f"{mib} MiB": round(_run(memory, leaves, mib, device), 1) for mib in (1, 8, 64, 256, 1024, 4096)
        },
    }


def _run(memory: AddressSpace, leaves: tuple[Leaf, ...], count: int, device: str) -> float:
    """Of digests of runs of leaves as they are verified: the tables are there."""
    tables = digest.LeafDigests(memory, leaves)
    count = min(count, len(leaves))
    best = min(seconds(timed(lambda: tables.of(range(count)), 8, (device,))))
    return sum(leaf.span.nbytes for leaf in leaves[:count]) / best / 1e9


def _twin(memory: AddressSpace, spans: list[Span], device: str) -> bytes:
    from weightwire.manifest.device_blocks import Blocks

    first = memory.columns(Span(spans[0].offset, spans[-1].end - spans[0].offset))
    blocks = Blocks(first, Spans.of(spans))
    rows = np.arange(len(blocks))
    values = device_digest._by_tensor_operations(blocks, rows, device)  # noqa: SLF001
    return device_digest._combined(values, blocks.counts)  # noqa: SLF001


def _kernel_seconds(kernel: Any, address: Any, nbytes: Any, out: torch.Tensor) -> float:
    """Of the kernel alone: its tables are on the device before."""
    table = kernel.table(np.stack((address, nbytes)))
    found = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        kernel.hash(table, out)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found)


def _on_host(memory: AddressSpace, leaves: tuple[Leaf, ...]) -> AddressSpace:
    span = Span(leaves[0].span.offset, leaves[-1].span.end - leaves[0].span.offset)
    parts, segments = [], []
    for segment in memory.slices(span):
        part = tensor_at(segment.address, segment.nbytes, segment.device).cpu()
        parts.append(part)
        segments.append(Segment(segment.offset, part.data_ptr(), part.nbytes, "cpu"))
    return AddressSpace(segments, [], parts)
