"""Speed of the leaf digest: host, cold and in cache, large and small tensors, against memcpy; and the device twin.

The host digest is measured in every way that it has here (compiled for AVX-512, portable; ``xxhash``), interleaved.

python bench/digest.py [--mib 1024] [--threads 1 2] [--device cpu|cuda:0] [--json]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from weightwire.manifest import device_digest, digest
from weightwire.manifest.address import AddressSpace, Segment
from weightwire.manifest.host_digest import HostDigests
from weightwire.manifest.host_library import HostLibrary, loaded
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.records import Leaf
from weightwire.types import Span, TensorClass

SMALL = 50 * 1024


def main() -> None:
    arguments = parse()
    results = measure(arguments)
    if arguments.json:
        print(json.dumps(results))
    else:
        for name, speed in results.items():
            print(f"{name:40} {speed:8.2f} GB/s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the host tensor")
    parser.add_argument("--device-mib", type=int, default=32, help="size of the tensor of the device twin")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu", help="where the device twin runs")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    data = torch.randint(0, 256, (arguments.mib << 20,), dtype=torch.uint8)
    copy = torch.empty_like(data).fill_(1)
    memory, leaves = described(data)
    found = {"memcpy, 1 thread": speed(lambda: copy.copy_(data), data.numel(), arguments.runs)}
    for threads in arguments.threads:
        found[f"host digest, {threads} thread(s)"] = speed(
            lambda threads=threads: digest.digest_leaves(memory, leaves, threads=threads), data.numel(), arguments.runs
        )
    found |= host_ways(data, arguments.runs)
    part = data[: arguments.device_mib << 20].to(arguments.device)
    found[f"device twin on {arguments.device}"] = speed(twin(part), part.numel(), arguments.runs)
    return found


def host_ways(data: torch.Tensor, runs: int) -> dict[str, float]:
    """One core, leaf by leaf as a load does it: cold, and one leaf over and over; whole tensors, and of 50 KiB."""
    shapes = {"large tensors": described(data), "tensors of 50 KiB": scattered(data, SMALL)}
    actions = {}
    for (shape, (memory, leaves)), (way, library) in itertools.product(shapes.items(), ways().items()):
        made = HostDigests(memory, [leaf.span for leaf in leaves], library, hot=True)
        actions[f"{way}, {shape}, cold"] = functools.partial(one_by_one, made, range(len(leaves)))
        actions[f"{way}, {shape}, in cache"] = functools.partial(one_by_one, made, [2] * len(leaves))
    laps = [{name: speed(action, data.numel(), 1) for name, action in actions.items()} for _ in range(runs)]
    return {name: statistics.median(lap[name] for lap in laps) for name in actions}


def one_by_one(digests: HostDigests, leaves: Sequence[int]) -> None:
    for leaf in leaves:
        digests.of(leaf, leaf + 1)


def ways() -> dict[str, HostLibrary | str]:
    best = loaded()
    if not isinstance(best, HostLibrary):
        return {"xxhash": best}
    return {name: HostLibrary(way=name) for name in sorted({best.way, "portable"})} | {"xxhash": "left out"}


def scattered(data: torch.Tensor, size: int) -> tuple[AddressSpace, list[Leaf]]:
    """The same memory as tensors of ``size``, every other one exchanged with its neighbour, so that none follows."""
    segments, offset = [], 0
    for at in range(0, data.numel() - 2 * size + 1, 2 * size):
        for begin in (at + size, at):
            segments.append(Segment(offset, data.data_ptr() + begin, size, "cpu"))
            offset += size
    return AddressSpace(segments, [], data), leaves_of(offset)


def described(data: torch.Tensor) -> tuple[AddressSpace, list[Leaf]]:
    device = str(data.device)
    memory = AddressSpace([Segment(0, data.data_ptr(), data.numel(), device)], [], data)
    return memory, leaves_of(data.numel())


def leaves_of(nbytes: int) -> list[Leaf]:
    spans = (Span(at, min(LEAF_BYTES, nbytes - at)) for at in range(0, nbytes, LEAF_BYTES))
    return [Leaf(span, TensorClass.WEIGHT) for span in spans]


def twin(data: torch.Tensor) -> Callable[[], object]:
    memory, leaves = described(data)
    step = device_digest.batch_leaves(str(data.device))
    segments = [memory.slices(leaf.span) for leaf in leaves]

    def run() -> bytes:
        return b"".join(device_digest.digest_leaves(segments[at : at + step]) for at in range(0, len(segments), step))

    return run


def speed(action: Callable[[], object], nbytes: int, runs: int) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return nbytes / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    main()
