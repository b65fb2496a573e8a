"""Speed of the leaf digest: host (memory that is not in a cache) against memcpy, and the device twin.

python bench/digest.py [--mib 1024] [--threads 1 2] [--device cpu|cuda:0] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from weightwire.manifest import device_digest, digest
from weightwire.manifest.address import AddressSpace, Segment
from weightwire.manifest.leaves import LEAF_BYTES
from weightwire.manifest.records import Leaf
from weightwire.types import Span, TensorClass


def main() -> None:
    arguments = parse()
    results = measure(arguments)
    if arguments.json:
        print(json.dumps(results))
    else:
        for name, speed in results.items():
            print(f"{name:32} {speed:8.2f} GB/s")


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
    part = data[: arguments.device_mib << 20].to(arguments.device)
    found[f"device twin on {arguments.device}"] = speed(twin(part), part.numel(), arguments.runs)
    return found


def described(data: torch.Tensor) -> tuple[AddressSpace, list[Leaf]]:
    device = str(data.device)
    memory = AddressSpace([Segment(0, data.data_ptr(), data.numel(), device)], [], data)
    spans = (Span(at, min(LEAF_BYTES, data.numel() - at)) for at in range(0, data.numel(), LEAF_BYTES))
    return memory, [Leaf(span, TensorClass.WEIGHT) for span in spans]


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
