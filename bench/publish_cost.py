"""What publishing costs besides digests: catalogue, layout, leaves, addresses and ids of many small tensors.

python bench/publish_cost.py [--tensors 2000 20000] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import nn

from weightwire.manifest.catalogue import ConstructionNames, capture, catalogue
from weightwire.manifest.plan import plan
from weightwire.manifest.records import DIGEST_BYTES, Manifest

PER_BLOCK = 10


class Block(nn.Module):
    """Ten tensors, as a transformer layer has them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            self.add_module(name, nn.Linear(8, 8, bias=False))
        self.input_norm = nn.RMSNorm(8)
        self.output_norm = nn.RMSNorm(8)
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    results = {str(count): measure(count, arguments.runs) for count in arguments.tensors}
    if arguments.json:
        print(json.dumps(results))
        return
    for count, parts in results.items():
        print(f"{count} tensors: " + ", ".join(f"{name} {value:.1f} ms" for name, value in parts.items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(count: int, runs: int) -> dict[str, float]:
    module = nn.Sequential(*(Block() for _ in range(count // PER_BLOCK)))
    names = capture(module)
    rows = [once(module, names) for _ in range(runs)]
    return {name: 1000 * statistics.median(row[name] for row in rows) for name in rows[0]}


def once(module: nn.Module, names: ConstructionNames) -> dict[str, float]:
    marks = [time.perf_counter()]
    found = catalogue(module, names)
    marks.append(time.perf_counter())
    leaves = found.layout.leaves
    assert found.memory.span.nbytes == found.layout.nbytes
    marks.append(time.perf_counter())
    manifest = Manifest(layout=found.layout, digests=bytes(len(leaves) * DIGEST_BYTES))
    assert manifest.content_id != manifest.derived_id
    marks.append(time.perf_counter())
    plan(found.layout, manifest)
    marks.append(time.perf_counter())
    parts = {"catalogue": 1, "leaves and addresses": 2, "ids": 3}
    seconds = {name: marks[at] - marks[at - 1] for name, at in parts.items()}
    return {"publish total": marks[3] - marks[0], **seconds, "plan (target)": marks[4] - marks[3]}


if __name__ == "__main__":
    main()
