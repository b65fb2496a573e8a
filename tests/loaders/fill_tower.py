"""Child process: fills a Tower from its file, or from whoever does, and serves it until its input ends.

It begins with the first line of its input, once it has said that it is up.

fill_tower.py URL FILE fill            reads the file; half way it says so, and waits for a word what to do
fill_tower.py URL FILE relay           takes it from others
fill_tower.py URL FILE relay-or-read   the same, or reads the file where nobody delivers
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from loaders.tower import IDENTITY, LAYERS, Tower, digest, read

import weightwire


def say(*words: object) -> None:
    print(*words, flush=True)


def fill(url: str, file: Path) -> None:
    module = Tower()

    def between(layers: int) -> None:
        if layers == LAYERS // 2:
            say("half")
            word = sys.stdin.readline().strip()
            if word == "fail":
                raise OSError("the disk is on fire")
            if word == "again":
                with torch.no_grad():
                    module.layers[0].get_parameter("weight").add_(1)

    with weightwire.filling(module, IDENTITY, url=url) as disk:
        assert disk.followed
        read(file, module, disk, between)
    with disk.published as published:
        say("ready", published.report.weights_id, digest(module))
        sys.stdin.readline()


def relay(url: str, file: Path, *, may_read: bool) -> None:
    module, moved = Tower(), False

    def progress(phase: str, done: int, total: int, unit: str) -> None:  # noqa: ARG001  (the protocol's)
        nonlocal moved
        if phase == "transfer" and done and not moved:
            moved = True
            say("moved")

    def from_disk(disk: weightwire.Filling) -> None:
        say("reading")
        read(file, module, disk, lambda _: time.sleep(0.1))

    disk = from_disk if may_read else None
    with weightwire.relay(module, IDENTITY, disk=disk, url=url, progress=progress) as published:
        assert published.received is not None
        say("ready", published.report.weights_id, digest(module), published.received.source)
        sys.stdin.readline()


def main() -> None:
    torch.set_num_threads(1)
    url, file, role = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    say("up")
    sys.stdin.readline()
    try:
        if role == "fill":
            fill(url, file)
        else:
            relay(url, file, may_read=role == "relay-or-read")
    except Exception as error:  # noqa: BLE001  (what is under test: who waits for a line is told)
        say("raised", type(error).__name__, error)


main()
