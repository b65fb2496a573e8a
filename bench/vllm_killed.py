"""How soon readers notice that their source ends: a vLLM server that its supervisor ends, or kills.

    python bench/vllm_killed.py [--runs 2] [--ends default killed ordered] [--json FILE]

Needs vLLM and weightwire in one environment (``make bench-vllm`` makes one). Each run starts an API server, lets
readers read it slowly (it has a bandwidth cap, so that they are in the midst of it), and ends it:

    default   SIGTERM to a server with vLLM's defaults: it kills its workers at once
    killed    SIGKILL to all its processes
    ordered   SIGTERM to a server with ``--shutdown-timeout 10``: its workers withdraw

A reader's time runs to the error that its read ends in: from the signal, and from the end of the worker's process
(which takes a moment to give its memory back: below zero, the reader knew before). The bound asked is one second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_reader import Pulls
from vllm_servers import MODEL_ID, Server, clean_up_when_terminated, facts, metadata_server, private_secret, serve

ENDS = ("default", "killed", "ordered")
READERS = ("tcp", "tcp", "nixl", "nixl")
RATE = "80MB/s"
"""Of the source: each of the readers is at it for more than ten seconds."""
SETTLE_S = 2.0
LIMIT_S = 60.0


def main() -> None:
    options = parse()
    if options.read:
        read(*options.read)
        return
    clean_up_when_terminated()
    from weightwire.engines.native.smollm2 import build_checkpoint

    checkpoint = options.checkpoint or build_checkpoint(progress=lambda text: print(text, file=sys.stderr))
    header = facts() | {"model": checkpoint.name, "cap": RATE}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with private_secret():
        for run in range(options.runs):
            for how in options.ends:
                for kind, seen in one(checkpoint, how):
                    found.setdefault((how, kind), []).append(seen)
                print(f"run {run + 1}, {how}", file=sys.stderr)
    report(options, header, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face directory; left out: SmolLM2-135M, made once")
    parser.add_argument("--runs", type=int, default=2, help="servers for each way to end")
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=list(ENDS))
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--read", nargs=2, metavar=("URL", "TRANSPORT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def one(checkpoint: Path, how: str) -> list[tuple[str, dict[str, Any]]]:
    """One server's end, as each reader saw it: its transport, and seconds and the error."""
    engine = {"--shutdown-timeout": "10"} if how == "ordered" else {}
    with metadata_server() as url, contextlib.ExitStack() as readers:
        extra = {"url": url, "model_id": MODEL_ID, "revision": "r1", "role": "source", "max_rate": RATE}
        with serve(checkpoint, "presharded", extra, engine=engine) as server:
            server.ready()
            server.says("offered to others")
            reading = [(kind, readers.enter_context(reader(url, kind))) for kind in READERS]
            time.sleep(SETTLE_S)
            signalled, gone = end(server, how)
            return [(kind, noticed(process, signalled, gone)) for kind, process in reading]


def end(server: Server, how: str) -> tuple[float, float]:
    """End it: when it was told, and when its worker was gone."""
    match = re.search(r"Worker[^)]* pid=(\d+)", server.line("weightwire: published"))
    assert match, "the worker does not say which process it is"
    worker = os.pidfd_open(int(match[1]))
    signalled = time.monotonic()
    if how == "killed":
        os.killpg(server.process.pid, signal.SIGKILL)
    else:
        os.kill(server.process.pid, signal.SIGTERM)
    select.select([worker], [], [], LIMIT_S)
    gone = time.monotonic()
    os.close(worker)
    return signalled, gone


def noticed(process: subprocess.Popen[str], signalled: float, gone: float) -> dict[str, Any]:
    """What a reader saw: how long after that, and the error."""
    assert process.stdout is not None
    seen = json.loads(process.stdout.readline())
    after = {"after_signal": seen["at"] - signalled, "after_end": seen["at"] - gone}
    return after | {"error": seen["error"], "reads": seen["reads"]}


@contextlib.contextmanager
def reader(url: str, transport: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is reading."""
    command = [sys.executable, __file__, "--read", url, transport]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "reading\n":
                raise SystemExit(f"a {transport} reader ended early")
            yield process
        finally:
            process.kill()


def read(url: str, transport: str) -> None:
    """In the reader's process: read until that fails, then say when, and how."""
    from weightwire.errors import WeightwireError

    pull, reads = Pulls(url, transport, MODEL_ID), 0
    print("reading", flush=True)
    try:
        while True:
            pull.once()
            reads += 1
    except WeightwireError as error:
        print(json.dumps({"at": time.monotonic(), "error": str(error), "reads": reads}), flush=True)
    os._exit(0)


def report(
    options: argparse.Namespace, header: dict[str, Any], found: dict[tuple[str, str], list[dict[str, Any]]]
) -> None:
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    print(
        "\n| end | reader | times | after the signal, s: median | slowest | after the worker's end: median | slowest "
        "| what it was told |\n|---|---|---|---|---|---|---|---|"
    )
    for (how, kind), seen in found.items():
        cells = [how, kind, str(len(seen))]
        for name in ("after_signal", "after_end"):
            seconds = [one[name] for one in seen]
            cells += [f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"]
        print("|", " | ".join([*cells, seen[0]["error"]]), "|")
    if options.json:
        result = {
            "machine": header,
            "seen": [{"end": how, "reader": kind, "seen": found[how, kind]} for how, kind in found],
        }
        options.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
