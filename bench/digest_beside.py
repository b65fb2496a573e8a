"""Digests made beside the loading against digests made after it: what a replica that reads a disk still waits for.

python bench/digest_beside.py [--layers 10] [--runs 9] [--rate 1e9] [--json]

A native replica of one rank with a random model reads its checkpoint, which is in the page cache, and publishes the raw
stage; each load is a process of its own, and the two ways take turns. Told are medians, with the least and the most:
the read (until all bytes are in place), from then until it is published, and both together. ``after`` is what a replica
does whose loading decides which tensors there are: it digests when all is read, by up to four threads. With ``--rate``
each read waits as long as a disk of so many bytes a second would take.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from processes import Child, Line
from stage_cost import server
from stage_cost_models import write
from stage_cost_rank import LOAD_S, settings
from torch import nn

from weightwire.engines.native.hooks import PublishingHooks
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.rank import Rank
from weightwire.engines.native.support import UNQUANTIZED
from weightwire.runtime.checkpoint.protocol import Final
from weightwire.runtime.checkpoint.safetensors_loader import _FileSource
from weightwire.runtime.distributed import TpGroup
from weightwire.types import Stage

WAYS = ("beside", "after")
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}


def load(line: Line, model: str, url: str, secret_file: str, way: str, rate: float) -> None:
    """One load; tells its times, and is killed."""
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()  # the rank's own events
    if rate:
        _slow(rate)
    options = ReplicaOptions(model=model, model_id=f"model {way}", revision="r1", publish_stage=Stage.LOADED.value)
    rank = Rank(options, settings(url, secret_file, options), TpGroup.single())
    marks = _watch(rank.target.hooks, way)
    rank.load()
    report = rank.target.hooks.report
    assert report is not None
    assert report.published
    read, publish = marks["read"] - marks["began"], marks["published"] - marks["read"]
    times = {"read": read, "publish": publish, "together": read + publish, "digest": report.seconds["digest"]}
    line.say("loaded", nbytes=report.nbytes, times=times, content=report.content_id)
    line.hear()
    os._exit(0)


def _watch(hooks: PublishingHooks, way: str) -> dict[str, float]:
    """Note when the checkpoint begins to be read, when all bytes are in place, and when they are published."""
    marks: dict[str, float] = {}
    filling, loaded = hooks.filling, hooks.loaded

    def marked_filling(model: nn.Module) -> Final | None:
        marks["began"] = time.monotonic()
        if way == "after":
            return None
        beside = filling(model)
        assert beside is not None, "nothing is digested beside the loading of this model"
        return beside

    def marked_loaded(model: nn.Module) -> None:
        marks["read"] = time.monotonic()
        loaded(model)
        marks["published"] = time.monotonic()

    hooks.filling = marked_filling  # type: ignore[method-assign]
    hooks.loaded = marked_loaded  # type: ignore[method-assign]
    return marks


def _slow(rate: float) -> None:
    """Have each read of a checkpoint's tensor take as long as so many bytes a second let it."""
    plain = _FileSource.read

    def slow(self: Any, dim: int, start: int, stop: int) -> Any:
        found = plain(self, dim, start, stop)
        time.sleep(found.nbytes / rate)
        return found

    _FileSource.read = slow  # type: ignore[method-assign]


def checkpoint(root: Path, layers: int) -> Path:
    """A random model of so many layers, read once."""
    directory = root / "model"
    child = Child("writer", write, str(directory), "llama", UNQUANTIZED, SHAPE | {"num_hidden_layers": layers})
    child.expect("written", LOAD_S)
    child.kill()
    for path in directory.iterdir():
        path.read_bytes()
    return directory


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10, help="of 90 MB each")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--rate", type=float, default=0.0, help="bytes a second of the disk")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    contents, nbytes = set(), 0
    with tempfile.TemporaryDirectory() as directory, server(Path(directory)) as (url, secret):
        model = checkpoint(Path(directory), arguments.layers)
        for way in WAYS * arguments.runs:
            child = Child(way, load, str(model), url, secret, way, arguments.rate)
            told = child.expect("loaded", LOAD_S)
            child.kill()
            found[way].append(told["times"])
            contents.add(told["content"])
            nbytes = told["nbytes"]
    assert len(contents) == 1, "the two ways give different content ids"
    if arguments.json:
        print(json.dumps({"nbytes": nbytes, **found}))
        return
    print(f"{nbytes / 1e6:.0f} MB, medians of {arguments.runs} in turn, ms (least to most)")
    for way, runs in found.items():
        print(f"{way}: " + ", ".join(f"{name} {_spread([run[name] for run in runs])}" for name in runs[0]))


def _spread(values: list[float]) -> str:
    low, middle, high = (1e3 * each for each in (min(values), statistics.median(values), max(values)))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main()
