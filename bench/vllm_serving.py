"""Request latency of a vLLM replica while others read its weights, and while nobody does.

    python bench/vllm_serving.py [--rounds 5] [--window 15] [--clients 2] [--max-rate 20MB/s] [--json FILE]

Needs vLLM and weightwire in one environment (``make bench-vllm`` makes one). One replica serves a steady load of
completions; windows of equal length are interleaved, and the latencies of the requests that began in a window are
pooled over all rounds:

    alone     nobody reads
    tcp       a reader takes all weights again and again, over tcp, verified
    nixl      the same over nixl
    beside    as much copying and digesting by a process that reads nothing from the replica

``beside`` tells what the reader costs by running on the same machine; elsewhere readers are on other machines. With two
or more cores the replica has one half of them, the clients and the reader the other (``--no-pin``: all have all).
With ``--max-rate`` the replica has this bandwidth cap in all windows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_reader import Pulls
from vllm_servers import MODEL_ID, Server, clean_up_when_terminated, facts, metadata_server, private_secret, serve

KINDS = ("alone", "tcp", "nixl", "beside")
PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at")
SETTLE_S = 1.0
"""A reader's first pull opens connections: a window begins after it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """When it was sent, and how long it took."""

    began: float
    seconds: float


def main() -> None:
    options = parse()
    if options.read:
        read(*options.read)
        return
    clean_up_when_terminated()
    from weightwire.engines.native.smollm2 import build_checkpoint

    checkpoint = options.checkpoint or build_checkpoint(progress=lambda text: print(text, file=sys.stderr))
    header = facts() | {"model": checkpoint.name}
    ours, theirs = split(pin=not options.no_pin)
    header |= {"cores_of_replica": ours or "all", "cores_of_readers": theirs or "all"}
    with private_secret(), metadata_server() as url:
        extra = {"url": url, "model_id": MODEL_ID, "revision": "r1", "role": "source"}
        if options.max_rate:
            extra["max_rate"] = options.max_rate
            header["max_rate"] = options.max_rate
        with serve(checkpoint, "presharded", extra, cores=ours) as server:
            server.ready()
            server.says("offered to others")
            if theirs:
                os.sched_setaffinity(0, theirs)
            found, speeds = measure(server, url, options)
    report(options, header, found, speeds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face directory; left out: SmolLM2-135M, made once")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each kind")
    parser.add_argument("--window", type=float, default=15.0, metavar="S", help="length of a window")
    parser.add_argument("--clients", type=int, default=2, help="requests under way at a time")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of one answer")
    parser.add_argument("--max-rate", metavar="RATE", help="the replica's bandwidth cap, such as 20MB/s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--no-pin", action="store_true")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--read", nargs=2, metavar=("URL", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "nixl" in options.kinds and importlib.util.find_spec("nixl") is None:
        options.kinds.remove("nixl")
        print("nixl: not run: it is not installed", file=sys.stderr)
    return options


def split(*, pin: bool) -> tuple[list[int], list[int]]:
    """Cores of the replica, and of everything else; nothing for "all"."""
    cores = sorted(os.sched_getaffinity(0))
    if not pin or len(cores) < 2:
        return [], []
    return cores[: len(cores) // 2], cores[len(cores) // 2 :]


# --- the load -------------------------------------------------------------------------------------------------------


def measure(
    server: Server, url: str, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Kind -> latencies of all its requests, and kind -> GB/s of each of its pulls."""
    windows: list[tuple[str, float, float]] = []
    speeds: dict[str, list[float]] = {kind: [] for kind in options.kinds}
    with contextlib.ExitStack() as open_things:
        readers = {
            kind: open_things.enter_context(reading(url, kind, speeds[kind]))
            for kind in options.kinds
            if kind != "alone"
        }
        requests = open_things.enter_context(load(server, options.clients, options.tokens))
        for turn in range(options.rounds):
            for at in range(len(options.kinds)):
                kind = options.kinds[(at + turn) % len(options.kinds)]
                with readers[kind].on() if kind in readers else contextlib.nullcontext():
                    time.sleep(SETTLE_S)
                    began = time.monotonic()
                    time.sleep(options.window)
                    windows.append((kind, began, time.monotonic()))
                print(f"round {turn + 1}, {kind}", file=sys.stderr)
    # only now: the slowest of a window's requests end after it
    latencies = {
        kind: [
            one.seconds
            for name, began, ended in windows
            for one in requests
            if name == kind and began <= one.began < ended
        ]
        for kind in options.kinds
    }
    return latencies, speeds


@contextlib.contextmanager
def load(server: Server, clients: int, tokens: int) -> Iterator[list[Request]]:
    """A steady load: each client asks again as soon as it is answered."""
    done: list[Request] = []
    over = threading.Event()

    def client(at: int) -> None:
        turn = at
        while not over.is_set():
            began = time.monotonic()
            server.ask(PROMPTS[turn % len(PROMPTS)], tokens)
            done.append(Request(began, time.monotonic() - began))
            turn += 1

    threads = [threading.Thread(target=client, args=(at,)) for at in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in threads:
            thread.join()


# --- readers --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Reader:
    """A process that reads while it is told to."""

    process: subprocess.Popen[str]
    speeds: list[float]

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """It reads inside."""
        self._tell("on")
        try:
            yield
        finally:
            self._tell("off")
            assert self.process.stdout is not None
            self.speeds += json.loads(self.process.stdout.readline())

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def reading(url: str, kind: str, speeds: list[float]) -> Iterator[Reader]:
    """A reader that is idle."""
    command = [sys.executable, __file__, "--read", url, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "idle\n":
            raise SystemExit(f"the {kind} reader ended early")
        try:
            yield Reader(process=process, speeds=speeds)
        finally:
            process.kill()


def read(url: str, kind: str) -> None:
    """In the reader's process: pull between the words ``on`` and ``off``, then print the speeds of all pulls."""
    import torch

    torch.set_num_threads(1)
    pull = Pulls(url, "tcp" if kind == "beside" else kind, MODEL_ID)
    pull.once()  # connections and agents are made once, pages are touched
    wanted, speeds = threading.Event(), []
    print("idle", flush=True)

    def run() -> None:
        while wanted.is_set():
            began = time.perf_counter()
            pull.beside() if kind == "beside" else pull.once()
            speeds.append(pull.nbytes / (time.perf_counter() - began) / 1e9)

    for line in sys.stdin:
        if line.strip() == "on":
            wanted.set()
            thread = threading.Thread(target=run)
            thread.start()
        else:
            wanted.clear()
            thread.join()
            print(json.dumps(speeds), flush=True)
            speeds = []
    os._exit(0)


# --- the table ------------------------------------------------------------------------------------------------------


def report(
    options: argparse.Namespace,
    header: dict[str, Any],
    found: dict[str, list[float]],
    speeds: dict[str, list[float]],
) -> None:
    """Medians and tails as a table; everything as JSON."""
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    print(
        f"\n{options.clients} clients, {options.tokens} tokens an answer, {options.rounds} interleaved windows of "
        f"{options.window:g} s of each kind\n"
    )
    print("| | requests | median, ms | of alone | p95, ms | of alone | reader, GB/s (median) |")
    print("|---|---|---|---|---|---|---|")
    rows = {kind: summary(latencies) for kind, latencies in found.items()}
    base = rows.get("alone")
    for kind, row in rows.items():
        of = {key: f"{row[key] / base[key]:.2f}" if base else "-" for key in ("median", "p95")}
        speed = f"{statistics.median(speeds[kind]):.2f}" if speeds[kind] else "-"
        print(
            f"| {kind} | {row['requests']:.0f} | {1000 * row['median']:.1f} | {of['median']} "
            f"| {1000 * row['p95']:.1f} | {of['p95']} | {speed} |"
        )
    if options.json:
        result = {"machine": header, "summary": rows, "latencies_s": found, "reader_gb_s": speeds}
        options.json.write_text(json.dumps(result) + "\n")


def summary(latencies: list[float]) -> dict[str, float]:
    """Seconds."""
    if len(latencies) < 2:
        raise SystemExit("fewer than two requests began in the windows of a kind: give a longer --window")
    p95 = statistics.quantiles(latencies, n=20)[-1]
    return {"requests": len(latencies), "median": statistics.median(latencies), "p95": p95}


if __name__ == "__main__":
    main()
