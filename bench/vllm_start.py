"""Time to ready of a vLLM replica by phase: from a running replica (``presharded``) and with vLLM's own loaders.

    python bench/vllm_start.py [--runs 3] [--cases presharded-tcp default-warm …] [--json FILE]

Needs vLLM and weightwire in one environment (``make bench-vllm`` makes one). Each case starts vLLM's API server as a
process of its own, asks it for one token and ends it; cases are interleaved, and the medians are compared. One more
replica runs all the time, the source of the ``presharded`` cases, so that every case has the same neighbour. The
presharded targets have config and tokenizer only. ``default-cold`` has its files dropped from the page cache
(``posix_fadvise``); all others read warm files.

A case that cannot be run here is named with its reason, not left out silently.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import itertools
import json
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_marks import write_site
from vllm_servers import (
    ENVIRONMENT,
    MODEL_ID,
    Server,
    clean_up_when_terminated,
    facts,
    metadata_server,
    private_secret,
    serve,
)

PROMPT = "The capital of France is"
CASES = (
    "presharded-tcp",
    "presharded-nixl",
    "default-warm",
    "default-cold",
    "sharded_state",
    "runai_streamer",
)
PHASES = (
    "front end",
    "engine process",
    "worker process",
    "find",
    "construct",
    "weights",
    "publish",
    "post-load",
    "KV cache, warm-up",
    "server",
    "ready",
    "first token",
)
"""In order of time. ``ready`` is the sum of those before it; ``first token`` comes on top."""
OF_WEIGHTS = ("find", "weights", "publish")
SAVE = """
import sys, vllm
llm = vllm.LLM(sys.argv[1], enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=256 << 20)
llm.llm_engine.engine_core.save_sharded_state(path=sys.argv[2], pattern=None, max_size=5 << 30)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """How one server is started."""

    model: Path
    load_format: str
    extra: Mapping[str, Any]
    cold: bool = False


def main() -> None:
    clean_up_when_terminated()
    options = parse()
    header = facts()
    with contextlib.ExitStack() as open_things:
        open_things.enter_context(private_secret())
        scratch = Path(open_things.enter_context(tempfile.TemporaryDirectory()))
        url = open_things.enter_context(metadata_server())
        cases, missing = prepare(options, url, scratch)
        paths = [str(write_site(scratch / "site")), *options.path]
        source = open_things.enter_context(
            serve(options.checkpoint, "presharded", settings(url, role="source"), paths=paths)
        )
        source.ready()
        source.says("offered to others")
        runs = measure(cases, options, paths, missing)
    report(options, header, runs, missing)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face directory; left out: SmolLM2-135M, made once")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--path", nargs="*", default=[], help="further entries of the Python path of the servers")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--logs", type=Path, help="keep every server's log in this directory")
    options = parser.parse_args()
    if options.checkpoint is None:
        from weightwire.engines.native.smollm2 import build_checkpoint

        options.checkpoint = build_checkpoint(progress=lambda text: print(text, file=sys.stderr))
    sys.path += options.path
    return options


def settings(url: str, **more: Any) -> dict[str, Any]:
    """The extra config of a replica."""
    return {"url": url, "model_id": MODEL_ID, "revision": "r1", **more}


# --- cases ----------------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, url: str, scratch: Path) -> tuple[dict[str, Case], dict[str, str]]:
    """The cases that can be run, and why others cannot."""
    checkpoint: Path = options.checkpoint
    bare = scratch / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.pt", "*.gguf"))
    cases = {
        f"presharded-{name}": Case(
            model=bare,
            load_format="presharded",
            extra=settings(url, transports=name, on_miss="fail"),
        )
        for name in ("tcp", "nixl")
    }
    cases["default-warm"] = Case(model=checkpoint, load_format="auto", extra={})
    cases["default-cold"] = Case(model=checkpoint, load_format="auto", extra={}, cold=True)
    cases["runai_streamer"] = Case(model=checkpoint, load_format="runai_streamer", extra={})
    missing = {}
    for name, module in (("presharded-nixl", "nixl"), ("runai_streamer", "runai_model_streamer")):
        if importlib.util.find_spec(module) is None:
            missing[name] = f"{module} is not installed"
    if "sharded_state" in options.cases:
        saved = scratch / "sharded"
        missing |= save_sharded(checkpoint, saved)
        cases["sharded_state"] = Case(model=saved, load_format="sharded_state", extra={})
    wanted = {name: cases[name] for name in options.cases if name not in missing}
    return wanted, {name: why for name, why in missing.items() if name in options.cases}


def save_sharded(checkpoint: Path, saved: Path) -> dict[str, str]:
    """Let vLLM write its sharded state; why not, if it cannot."""
    shutil.copytree(checkpoint, saved, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin", "*.pt", "*.gguf"))
    script = saved.parent / "save.py"
    script.write_text('if __name__ == "__main__":\n' + "".join(f"    {line}\n" for line in SAVE.strip().splitlines()))
    command = [sys.executable, str(script), str(checkpoint), str(saved)]
    done = subprocess.run(command, env=ENVIRONMENT | dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode == 0 and any(saved.glob("*.safetensors")):
        return {}
    return {"sharded_state": f"saving it failed ({(done.stderr or done.stdout).strip().splitlines()[-1]})"}


def measure(
    cases: Mapping[str, Case], options: argparse.Namespace, paths: Sequence[str], missing: dict[str, str]
) -> dict[str, list[dict[str, float]]]:
    """Every case ``--runs`` times, interleaved; the order turns by one each round. A case that fails is out."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(options.runs):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in missing:
                continue
            log = options.logs / f"{name}-{turn + 1}.log" if options.logs else Path(os.devnull)
            try:
                found[name].append(once(cases[name], paths, log))
            except SystemExit as error:
                missing[name] = f"a start failed:\n{error}"
                continue
            shown = ", ".join(f"{phase} {found[name][-1][phase]:.2f}" for phase in PHASES)
            print(f"run {turn + 1}, {name}: {shown}", file=sys.stderr)
    return {name: rows for name, rows in found.items() if rows and name not in missing}


def once(case: Case, paths: Sequence[str], log: Path) -> dict[str, float]:
    """One start: phase -> seconds, and what the page cache held of the files before."""
    files = sorted(case.model.glob("*.safetensors"))
    for file in files:
        cool(file) if case.cold else warm(file)
    cached = sum(resident(file) for file in files)
    with serve(case.model, case.load_format, case.extra, paths=paths) as server:
        ready = server.ready()
        asked = time.monotonic()
        server.ask(PROMPT, 1)
        first = time.monotonic() - asked
        if case.load_format == "presharded":
            server.says("weightwire: received")
    log.write_text("".join(f"{at - server.began:8.3f} {line}\n" for at, line in server.lines))
    return phases(server, ready) | {"first token": first, "cached bytes before": cached}


def phases(server: Server, ready: float) -> dict[str, float]:
    """The parts of the way to ready, which add up to it."""
    marks = server.marks()
    stops = [
        server.began,
        at(server, "non-default args"),
        at(server, "Initializing a V1 LLM engine"),
        at(server, "Starting to load model"),
        *(marks[name] for name in ("construction began", "constructed", "weights in place", "processed")),
        at(server, "init engine (profile"),
        server.began + ready,
    ]
    names = [name for name in PHASES if name not in ("publish", "ready", "first token")]
    parts = {name: end - begin for name, (begin, end) in zip(names, itertools.pairwise(stops), strict=True)}
    received = server.when("weightwire: received")  # what comes then, until post-load steps begin, is publishing
    parts["publish"] = marks["weights in place"] - received if received else 0.0
    parts["weights"] -= parts["publish"]
    inside = seconds(server.line("weightwire: received"))
    return parts | {"ready": ready} | {f"weights: {name}": value for name, value in inside.items()}


def at(server: Server, part: str) -> float:
    """When the server said it; it must have."""
    found = server.when(part)
    if found is None:
        raise SystemExit(f"no line with {part!r} in vLLM's log: is this another version of it?")
    return found


def seconds(line: str) -> dict[str, float]:
    """The phases that a line of ours ends with."""
    inside = re.search(r"seconds: ([^)]*)\)", line)
    pairs = (part.rsplit(" ", 1) for part in inside[1].split(", ")) if inside else ()
    return {name: float(value) for name, value in pairs}


# --- the page cache -------------------------------------------------------------------------------------------------


def warm(file: Path) -> None:
    with file.open("rb") as opened:
        while opened.read(16 << 20):
            pass


def cool(file: Path) -> None:
    """Drop it from the page cache; dirty pages would stay, so they are written first."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def resident(file: Path) -> int:
    """Bytes of it in the page cache."""
    size, page = file.stat().st_size, mmap.PAGESIZE
    vector = (ctypes.c_ubyte * -(-size // page))()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        view = (ctypes.c_char * size).from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), vector)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(each & 1 for each in vector) * page


# --- the table ------------------------------------------------------------------------------------------------------


def report(
    options: argparse.Namespace,
    header: dict[str, Any],
    runs: Mapping[str, list[dict[str, float]]],
    missing: Mapping[str, str],
) -> None:
    """Medians as a table; everything as JSON."""
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in runs.items()
    }
    header["model"] = options.checkpoint.name
    header["bytes"] = sum(file.stat().st_size for file in options.checkpoint.glob("*.safetensors"))
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    print(f"\nMedians of {options.runs} interleaved runs, seconds:\n")
    print(f"| phase | {' | '.join(medians)} |\n|---|{'---|' * len(medians)}")
    for phase in PHASES:
        print(f"| {phase} | {' | '.join(f'{row[phase]:.2f}' for row in medians.values())} |")
    shares = {name: 1 - sum(row[phase] for phase in OF_WEIGHTS) / row["ready"] for name, row in medians.items()}
    print(f"| not weights, of ready | {' | '.join(f'{share:.0%}' for share in shares.values())} |")
    inside = {name: {key: row[key] for key in row if key.startswith("weights: ")} for name, row in medians.items()}
    for name, parts in inside.items():
        if parts:
            print(f"\n{name}, inside: " + ", ".join(f"{key[9:]} {value:.3f}" for key, value in parts.items()))
    for name, why in missing.items():
        print(f"\n{name}: not run: {why}")
    if options.json:
        result = {"machine": header, "medians": medians, "runs": runs, "not run": missing, "not weights": shares}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
