"""Replicas started in the same second from one slow disk: one reads it, the others follow it, or each other.

    python bench/together.py CHECKPOINT --replicas 8 --rate 20e6 --repeat 3 --json

Every replica is a process of the native engine with the same directory. The disk is capped for all of them together:
whoever reads holds a lock for as long as its bytes take at ``--rate``, so that two that read at a time take twice as
long. Processes import everything first and wait for a word; times count from that word to the last ``loaded``. Compared
are one replica alone, all of them following (as by default), all of them waiting for the first to finish
(``--without-following``), and how many bytes were read from the disk in each case.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from weightwire.auth import load_secret
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings

LOAD_S = 400.0


def replica(rate: float, lock: Path, read: Path, options: str, follow: bool) -> int:
    """One replica of one rank: waits for a line, loads, leaves when its input ends."""
    from weightwire.engines.native import hooks, rank
    from weightwire.engines.native.options import ReplicaOptions
    from weightwire.runtime.checkpoint import safetensors_loader

    source: Any = safetensors_loader._FileSource  # noqa: SLF001
    plain = source.read

    def capped(self: Any, dim: int, start: int, stop: int) -> Any:
        found = plain(self, dim, start, stop)
        with lock.open("w") as held, read.open("a") as counted:
            fcntl.flock(held, fcntl.LOCK_EX)
            time.sleep(found.nbytes / rate)
            counted.write(f"{found.nbytes}\n")
        return found

    source.read = capped
    if not follow:
        hooks.PublishingHooks.filling = lambda _hooks, _model: None  # type: ignore[method-assign,assignment]
    print(json.dumps({"event": "imported"}), flush=True)
    sys.stdin.readline()
    return rank.run_rank(ReplicaOptions.from_json(options))


class Process:
    """A replica, and what it said."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self.child = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.events: dict[str, tuple[float, dict[str, Any]]] = {}
        self._news = threading.Condition()
        assert self.child.stdout is not None
        threading.Thread(target=self._listen, args=(self.child.stdout,), daemon=True).start()

    def tell(self, line: str) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(line)
        self.child.stdin.flush()

    def wait(self, event: str) -> tuple[float, dict[str, Any]]:
        with self._news:
            found = self._news.wait_for(lambda: {event, "failed", "ended"} & self.events.keys(), LOAD_S)
        if not found or event not in self.events:
            raise SystemExit(f"a replica did not get to '{event}': {self.events.get('failed')}")
        return self.events[event]

    def leave(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        try:
            self.child.wait(20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def _listen(self, lines: TextIO) -> None:
        for line in lines:
            said = json.loads(line)
            with self._news:
                self.events[said["event"]] = time.monotonic(), said
                self._news.notify_all()
        with self._news:
            self.events["ended"] = time.monotonic(), {}
            self._news.notify_all()


@contextmanager
def server(scratch: Path) -> Iterator[dict[str, str]]:
    """A metadata server; the environment of replicas."""
    secret = scratch / "secret"
    secret.write_text("bench only, loopback only, one run\n")
    secret.chmod(0o600)
    times = Times(ttl_s=5.0, warming_s=0.0)
    with EmbeddedServer(ServerSettings(secret=load_secret(secret), times=times)) as running:
        yield os.environ | {
            "WEIGHTWIRE_URL": running.url,
            "WEIGHTWIRE_SECRET_FILE": str(secret),
            "WEIGHTWIRE_TRANSPORTS": "tcp",
            "WEIGHTWIRE_LOG_LEVEL": "WARNING",
            "WEIGHTWIRE_ACCEPT_UNPINNED": "1",
        }


def once(arguments: argparse.Namespace, count: int, *, follow: bool) -> dict[str, float]:
    """Seconds until the first and the last of ``count`` replicas could answer, and what was read from the disk."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as environ:
        lock, read = Path(folder) / "lock", Path(folder) / "read"
        options = {"model": str(arguments.checkpoint), "model_id": "together", "load_format": "presharded"}
        mine = [str(arguments.rate), str(lock), str(read), json.dumps(options), str(int(follow))]
        command = [sys.executable, __file__, "--replica", *mine]
        group = [Process(command, environ) for _ in range(count)]
        try:
            for each in group:
                each.wait("imported")
            began = time.monotonic()
            for each in group:
                each.tell("go\n")
            loaded = [each.wait("loaded") for each in group]
        finally:
            for each in group:
                each.leave()
        ids = {event["published"]["content_id"] for _, event in loaded}
        if len(ids) != 1:
            raise SystemExit(f"the replicas do not hold the same: {ids}")
        seconds = sorted(at - began for at, _ in loaded)
        ways = [event["report"]["source"] for _, event in loaded]
        disk = sum(map(int, read.read_text().split()))
        return {"first": seconds[0], "last": seconds[-1], "disk": disk, "readers": ways.count("disk")}


def main() -> int:
    if "--replica" in sys.argv:
        rate, lock, read, options, follow = sys.argv[2:]
        return replica(float(rate), Path(lock), Path(read), options, follow == "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--rate", type=float, default=20e6, help="bytes a second of the disk, for all together")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--without-following", action="store_true", help="measure waiting for the whole, too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.repeat):  # interleaved
        runs.setdefault("one replica", []).append(once(arguments, 1, follow=True))
        runs.setdefault("following", []).append(once(arguments, arguments.replicas, follow=True))
        if arguments.without_following:
            runs.setdefault("waiting", []).append(once(arguments, arguments.replicas, follow=False))
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    alone = middle["one replica"]["last"]
    told = {
        "replicas": arguments.replicas,
        "rate": arguments.rate,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if arguments.json:
        print(json.dumps({"machine": told, "runs": runs, "median": middle}))
    for name, row in middle.items():
        print(
            f"{name:12} last {row['last']:6.2f} s = {row['last'] / alone:5.3f} x one; first {row['first']:6.2f} s; "
            f"disk {row['disk'] / 1e6:7.1f} MB by {row['readers']:.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
