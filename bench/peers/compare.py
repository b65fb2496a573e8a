"""weightwire beside others, all in one run: GB/s between two processes of this machine, interleaved, medians.

    python bench/peers/compare.py --mib 1024 --repeat 5 --json out.json

Part ``tcp``: ours (verified, and with verification off), bare sockets, NIXL with ``UCX_TLS=tcp``, Mooncake's Transfer
Engine, a gloo broadcast, and loaders of files from a warm page cache. Part ``nixl``: ours and one bare READ of all.
Part ``link``: verification on and off over 1 Gbit/s (network namespaces, a veth pair, ``tc tbf``; needs root).
All of ours are whole ``receive`` calls into memory that was touched before. What others start with (an agent, an
engine, a registration) is not counted, and neither is ours: ``seconds`` are those from the first connection to the
last verified byte. Beside them stands our whole ``receive`` call. Ratios are medians of the ratios of each lap. Bare
sockets and bare READs move the same memory between the same two processes as ours; others have processes of their own.

Peers that are not installed are named with the reason. Where they are: ``--path`` (and below it, shared libraries).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from link import Link
from process import MIB, Broken, Child, machine

Lap = Callable[[], dict[str, Any]]
TCP_REACH = {
    "NIXL, UCX_TLS=tcp": 3.0,
    "Mooncake, tcp": 2.3,
    "bare sockets, 2 streams": 0.85,
    "safetensors, 1 thread": 0.8,
}
NIXL_REACH = {"bare READ, default agents": 1.0, "bare READ, our settings": 0.85}
UNVERIFIED = "ours, not verified"
LINK_RATE = "1gbit"


class Ways:
    """Ways to move the same bytes, each with its processes. Those that break are kept with their reason."""

    def __init__(self, nbytes: int, count: int, folder: Path) -> None:
        self.nbytes, self.count, self.folder = nbytes, count, folder
        self.laps: dict[str, Lap] = {}
        self.broken: dict[str, str] = {}
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.children: list[Child] = []
        self.first: dict[str, Any] = {}

    def child(self, *arguments: object, **more: Any) -> Child:
        made = Child(*map(str, arguments), **more)
        self.children.append(made)
        return made

    def add(self, name: str, make: Callable[[], Lap]) -> None:
        try:
            self.laps[name] = make()
        except Broken as error:
            self.broken[name] = str(error)

    def ours(self, transport: str) -> None:
        source = self.child("ours.py", "source", transport, self.nbytes, self.count)
        target = self.child("ours.py", "target", transport, self.nbytes, self.count, source.ready["url"])
        self.first = target.ask(fresh=True) | {"publish_s": source.ready["publish_s"]}
        # never stopped: the metadata server lives in the source, and its leases would expire
        self.laps |= {"ours": target.ask, UNVERIFIED: lambda: target.ask(verify=False)}
        self.source, self.target = source, target

    def bare(self, name: str, way: str, **command: Any) -> None:
        """The wire alone, between the memory of ``ours`` and in its processes."""

        def lap() -> dict[str, Any]:
            address = self.source.ask(bare=way)["address"]
            try:
                return self.target.ask(bare=way, address=address, **command)
            finally:
                self.source.ask()

        self.laps[name] = lap

    def wires(self, name: str, way: str, source_way: str = "", environ: Mapping[str, str] | None = None) -> None:
        def make() -> Lap:
            source = self.child("wires.py", "source", source_way or way, self.nbytes, self.count, environ=environ)
            address = source.ready["address"]
            target = self.child("wires.py", "target", way, self.nbytes, self.count, address, environ=environ)
            self._park(source, target)
            return self._pair(source, target, {}, together=way == "gloo")

        self.add(name, make)

    def files(self, name: str, way: str, threads: int = 1) -> None:
        path = self.folder / f"{self.count}.safetensors"

        def make() -> Lap:
            reader = self.child("files.py", path, self.nbytes, self.count, environ={"OMP_NUM_THREADS": str(threads)})
            self._park(reader)
            return self._pair(None, reader, {"way": way, "threads": threads})

        self.add(name, make)

    def run(self, repeat: int) -> None:
        for lap in range(repeat + 1):  # the first one warms up
            for name, run in list(self.laps.items()):
                try:
                    found = run()
                except Broken as error:
                    self.broken[name] = str(error)
                    del self.laps[name]
                    continue
                if lap:
                    self.results.setdefault(name, []).append(found)

    def close(self) -> None:
        for child in self.children:
            child.end()

    def _park(self, *children: Child) -> None:
        for child in children:
            child.turn(on=False)

    def _pair(self, source: Child | None, target: Child, command: dict[str, Any], *, together: bool = False) -> Lap:
        def lap() -> dict[str, Any]:
            pair = [child for child in (source, target) if child is not None]
            for child in pair:
                child.turn(on=True)
            try:
                if together and source is not None:
                    source.send(**command)
                found = target.ask(**command)
                if together and source is not None:
                    source.answer()
                return found
            finally:
                self._park(*pair)

        return lap


def rows(ways: Ways, reach: Mapping[str, float]) -> list[dict[str, Any]]:
    """One a way: its speed, and ours over it."""
    ours, found = ways.results.get("ours", []), []
    for name, laps in ways.results.items():
        ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours, laps, strict=False)]
        found.append(
            {
                "tensors": ways.count,
                "way": name,
                "gb_s": round(ways.nbytes / statistics.median(each["seconds"] for each in laps) / 1e9, 2),
                "ours_over_it": round(statistics.median(ratios), 2) if ratios else None,
                "reach": reach.get(name),
                "prepare_s": median_of(laps, "prepare_s") or median_of(laps, "connect_s"),
                "laps_s": [round(each["seconds"], 3) for each in laps],
            }
        )
    found += [{"tensors": ways.count, "way": name, "missing": why} for name, why in ways.broken.items()]
    return found


def median_of(laps: list[dict[str, Any]], what: str) -> float | None:
    values = [each[what] for each in laps if what in each]
    return round(statistics.median(values), 4) if values else None


def cost(ways: Ways) -> float:
    """Of verification: what a load takes longer with it, as a part of one with it off; whole transfers."""
    pairs = zip(ways.results["ours"], ways.results[UNVERIFIED], strict=False)
    return round(statistics.median(on["transfer_s"] / off["transfer_s"] for on, off in pairs) - 1, 3)


def around(ways: Ways, transport: str) -> dict[str, Any]:
    """What is not bytes, and memory: of the first load of a process into fresh memory, and the median of later ones."""
    laps, first = ways.results["ours"], ways.first
    later = {what: median_of(laps, what) for what in ("whole_s", "transfer_s", "seconds", "first_s", "lease_s")}
    phases = {name: median_of([each["phases"] for each in laps], name) for name in laps[0]["phases"]}
    return {
        "tensors": ways.count,
        "transport": transport,
        "path": laps[0]["path"],
        "start": first["start"],
        "first_load": {name: first[name] for name in ("whole_s", "transfer_s", "seconds", "first_s", "lease_s")}
        | {"phases": first["phases"]},
        "later_loads": later | {"phases": phases},
        "publish_s": first["publish_s"],
        "memory_above_mib": {
            "target": max(first["above_mib"], *(each["above_mib"] for each in laps)),
            "source": ways.source.ask()["above_mib"],
        },
    }


@contextlib.contextmanager
def opened(nbytes: int, count: int, folder: Path) -> Iterator[Ways]:
    ways = Ways(nbytes // count * count, count, folder)
    try:
        yield ways
    finally:
        ways.close()


def tcp_part(nbytes: int, count: int, repeat: int, folder: Path, found: dict[str, Any]) -> None:
    with opened(nbytes, count, folder) as ways:
        ways.ours("tcp")
        for streams in (2, 4):
            ways.bare(f"bare sockets, {streams} streams", "sockets", streams=streams)
        ways.wires("NIXL, UCX_TLS=tcp", "nixl", environ={"UCX_TLS": "tcp"})
        ways.wires("Mooncake, tcp", "mooncake")
        ways.wires("gloo broadcast", "gloo")
        for threads in (1, 2):
            plural = "s" if threads > 1 else ""
            ways.files(f"safetensors, {threads} thread{plural}", "safetensors", threads)
        ways.files("Run:ai streamer", "runai")
        ways.files("fastsafetensors", "fastsafetensors")
        ways.run(repeat)
        record(found, ways, TCP_REACH, "tcp", 0.12)


def nixl_part(nbytes: int, count: int, repeat: int, folder: Path, found: dict[str, Any]) -> None:
    with opened(nbytes, count, folder) as ways:
        ways.ours("nixl")
        ways.bare("bare READ, default agents", "nixl")
        ways.bare("bare READ, our settings", "nixl-ours")
        ways.run(repeat)
        record(found, ways, NIXL_REACH, "nixl", 0.15)


def record(found: dict[str, Any], ways: Ways, reach: Mapping[str, float], transport: str, most: float) -> None:
    found[transport] = found.get(transport, []) + rows(ways, reach)
    if "ours" in ways.broken:
        raise SystemExit(f"ours does not work: {ways.broken['ours']}")
    verification = {"where": f"{transport}, loopback", "tensors": ways.count, "cost": cost(ways), "reach": most}
    found.setdefault("verification", []).append(verification)
    found.setdefault("around", []).append(around(ways, transport))
    show_part(ways, transport, found)


def link_part(nbytes: int, repeat: int, found: dict[str, Any]) -> None:
    """Over a slow link: the wire is the bound, and digests should hide behind it."""
    try:
        with Link(LINK_RATE) as link, opened(nbytes, 8, Path()) as ways:
            far = {"prefix": link.enter(0)}
            source = ways.child("ours.py", "source", "tcp", nbytes, 8, link.address(0), **far)
            url = source.ready["url"]
            target = ways.child("ours.py", "target", "tcp", nbytes, 8, url, prefix=link.enter(1))
            ways.laps = {
                "ours": target.ask,
                UNVERIFIED: lambda: target.ask(verify=False),
            }
            ways.run(repeat)
            speed = nbytes / statistics.median(each["seconds"] for each in ways.results["ours"]) / 1e6
            row = {"where": f"tcp, {LINK_RATE} link", "tensors": 8, "cost": cost(ways), "reach": 0.05}
            found.setdefault("verification", []).append(row | {"mb_s": round(speed, 1)})
    except (Broken, OSError) as error:
        found.setdefault("verification", []).append({"where": f"tcp, {LINK_RATE} link", "missing": str(error)})


def show_part(ways: Ways, transport: str, found: dict[str, Any]) -> None:
    print(f"\n{transport}, {ways.nbytes >> 20} MiB in {ways.count} tensors")
    print(f"  {'way':28} {'GB/s':>6} {'ours over it':>13} {'reach':>6}")
    for row in found[transport]:
        if row["tensors"] != ways.count:
            continue
        if "missing" in row:
            print(f"  {row['way']:28} not measured: {row['missing']}")
        else:
            print(f"  {row['way']:28} {row['gb_s']:6.2f} {row['ours_over_it'] or 0:13.2f} {row['reach'] or '':>6}")
    print(f"  verification costs {found['verification'][-1]['cost']:.1%} of the transfer")
    print(f"  {json.dumps(found['around'][-1])}", flush=True)


def even(found: dict[str, Any]) -> None:
    """20,000 tensors over 8, ours over nixl; each in its own interleaved part of this run."""
    speeds = {row["tensors"]: row["gb_s"] for row in found.get("nixl", []) if row["way"] == "ours"}
    if {8, 20000} <= set(speeds):
        found["nixl_20000_over_8"] = {"ratio": round(speeds[20000] / speeds[8], 2), "reach": 0.9}
        print(f"\nnixl: 20,000 tensors over 8: {found['nixl_20000_over_8']['ratio']} (reach 0.9)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--tensors", type=int, nargs="+", default=[8, 2000])
    parser.add_argument("--nixl-tensors", type=int, nargs="+", default=[8, 2000, 20000])
    parser.add_argument("--link-mib", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["tcp", "nixl", "link"], choices=["tcp", "nixl", "link"])
    parser.add_argument("--path", type=Path, help="where the peers are installed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # processes and namespaces are removed
    folder = Path(tempfile.mkdtemp(prefix="bench-peers-"))
    secret = folder / "secret"
    secret.touch(0o600)
    secret.write_text(secrets.token_hex(32))
    os.environ["WEIGHTWIRE_SECRET_FILE"] = str(secret)
    os.environ["TMPDIR"] = str(folder)
    os.environ["BENCH_LIBRARIES"] = str(options.path or "")
    others = [str(options.path)] if options.path else []
    os.environ["PYTHONPATH"] = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(":"), *others]).strip(":")
    found: dict[str, Any] = {"machine": machine(), "mib": options.mib, "repeat": options.repeat}
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()), flush=True)
    try:
        for count in options.tensors if "tcp" in options.parts else []:
            tcp_part(options.mib * MIB, count, options.repeat, folder, found)
        for count in options.nixl_tensors if "nixl" in options.parts else []:
            nixl_part(options.mib * MIB, count, options.repeat, folder, found)
        even(found)
        if "link" in options.parts:
            link_part(options.link_mib * MIB, options.repeat, found)
            print(json.dumps(found["verification"][-1]))
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
