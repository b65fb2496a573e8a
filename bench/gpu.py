"""Device memory to device memory: verified loads over nixl and tcp, against bare copies of the same bytes.

    bench/gpu.sh                              one device, source and target on it: some three minutes on an H100
    bench/gpu.sh --devices cuda:0 cuda:1      sources on the first, targets on the second: NVLink, where it links them
    bench/gpu.sh --devices cuda:0 cuda:1 --dry-run        which steps would run, and their bounds
    python bench/gpu.py --devices cpu --shapes tiny --kill-shape tiny --fanout-shape tiny --registrations 20x1 \\
        --stretch 4                           the plumbing, anywhere

Every source and target is a process of its own (``gpu_worker.py``). Steps are independent: each has its own processes
and its own bound, and one that fails or is late is reported and does not end the others. ``$OUT/gpu.json`` and
``gpu.txt`` have all figures, ``gpu.log`` what the processes said; a table comes last (``gpu-table.txt``, too).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

from gpu_process import Process, said
from gpu_runner import Runner, Step, same
from gpu_table import details, summary

SLOW = "50MB/s"
SIZES_MIB = [8, 32, 128, 256, 1024]
COPIES_MIB = [32, 256, 1024, 4096]

BOUNDS_S = {
    "machine": 30.0,
    "link": 45.0,
    "load": 75.0,
    "ranks": 80.0,
    "fanout": 70.0,
    "kill": 60.0,
    "quantized": 45.0,
    "families": 170.0,
    "digest": 60.0,
    "slow": 60.0,
    "registration": 60.0,
}
"""Seconds of each step; all of them together have ``--seconds``."""

ONE_DEVICE = ("digest", "load", "kill", "slow", "quantized", "families", "registration")
TWO_DEVICES = ("link", "load", "ranks", "fanout", "kill", "digest", "quantized", "families", "registration", "slow")
TP = 2
TARGETS = 3
TOGETHER_S = 4.0
"""From asking several processes for a bare copy until they begin it: what each has to prepare takes less."""


class Bench(Runner):
    def steps(self) -> list[Step]:
        """Each with its name, its bound in seconds, and what it does."""
        every: dict[str, list[tuple[str, Callable[[], None]]]] = {
            name: [(name, getattr(self, name))] for name in BOUNDS_S if name not in ("load", "ranks")
        }
        shapes = self.options.shapes
        every["load"] = [(f"load {shape}", lambda shape=shape: self.load(shape)) for shape in shapes]
        every["ranks"] = [(f"ranks {shape}", lambda shape=shape: self.ranks(shape)) for shape in shapes]
        return [
            (name, BOUNDS_S[kind] * self.options.stretch, step)
            for kind in ("machine", *self.options.steps)
            for name, step in every[kind]
        ]

    # ---- steps

    def machine(self) -> None:
        asked = ("nvidia-smi", "--query-gpu=index,name,driver_version,memory.total", "--format=csv,noheader")
        self.step |= {"gpu": said(*asked), "cores": os.cpu_count(), "set": self.options.set}
        self.step["topology"] = said("nvidia-smi", "topo", "-m")
        self.step["link state"] = said("nvidia-smi", "nvlink", "--status").splitlines()[:4]
        print(f"{self.step['gpu']}\n{self.step['topology']}", *self.step["link state"], sep="\n", flush=True)
        (one,) = self.start(self.there)
        self.note("about", one("about"))

    def link(self) -> None:
        """What a copy between the two devices reaches, in one process."""
        (one,) = self.start(self.there)
        if self.cuda:
            self.note("peer copy", one("peer_copy", source=self.here, sizes_mib=COPIES_MIB))

    def digest(self) -> None:
        for shape in self.options.shapes:
            (one,) = self.start(self.there)
            self.note(f"{shape} build", one("build", shape=shape, seed=1))
            if shape == self.options.shapes[0] and self.cuda:
                self.note("copy", one("device_copy", mib=4096))
                self.note("host copy", one("host_copy", mib=1024))
            self.note(shape, one("digests", host_mib=1024))
            one.end()

    def load(self, shape: str) -> None:
        source, target = pair = self.built(shape, [self.here], [self.there])
        self.expected = self.note("source tokens", source("tokens"))
        with self.part("nixl"):  # fresh (with a profile), warm, warm with a profile
            self.transfer("nixl", [source], [target], ["nixl"], times=3)
        self.used_memory("memory with nixl")
        with self.part("bare"):
            self.bare_reads([source], [target], SIZES_MIB)
        with self.part("tcp"):
            self.transfer("tcp", [source], [target], ["tcp"], times=1)
        with self.part("both"):
            self.transfer("both", [source], [target], ["nixl", "tcp"], times=1)
        if self.cuda:  # last: with it the target has a context on the source's device, too
            self.bare_copies(pair[:1], pair[1:])

    def ranks(self, shape: str) -> None:
        """A replica of two ranks loads from another one; all ranks of one side are on one device."""
        found = self.built(shape, [self.here] * TP, [self.there] * TP)
        sources, targets = found[:TP], found[TP:]
        self.step["placement"] = f"TP={TP}, {TP} ranks a device: sources on {self.here}, targets on {self.there}"
        for side in (sources, targets):
            port = side[0]("open_store")["port"]
            self.gather(side, "join", each=[{"port": port, "rank": rank, "size": TP} for rank in range(TP)])
        self.expected_of = self.gather(sources, "tokens")
        with self.part("nixl"):
            self.transfer("nixl", sources, targets, ["nixl"], times=2)
        self.used_memory("memory with nixl")
        with self.part("bare"):
            self.bare_reads(sources, targets, [])
        with self.part("tcp"):
            self.transfer("tcp", sources, targets, ["tcp"], times=1)
        if self.cuda:
            self.bare_copies(sources, targets)

    def fanout(self) -> None:
        """One source, three targets that start together and serve what they received; then one that has only those."""
        others = self.devices[1:] or self.devices
        where = [others[at % len(others)] for at in range(TARGETS)]
        source, *relays, late = self.built(self.options.fanout_shape, [self.here], [*where, self.here])
        self.step["placement"] = f"source on {self.here}, targets on {' '.join(where)}, a late one on {self.here}"
        self.expected_of = [source("tokens")] * TARGETS
        self.expected = self.expected_of[0]
        for transport in ("nixl", "tcp"):
            with self.part(transport):
                self.relayed(transport, source, relays, late)

    def relayed(self, transport: str, source: Process, relays: list[Process], late: Process) -> None:
        asked = {"url": self.url, "transports": [transport], "model_id": f"bench/fanout {transport}"}
        said_ = source("publish", **asked)
        self.note(f"{transport} publish", said_)
        self.gather(relays, "poison")
        self.note_group(f"{transport} together", relays, self.gather(relays, "receive", **asked, relay=True))
        gave = self.given_by(f"{transport} together", said_["process"])
        self.step[f"{transport} egress"] = {"shards_from_source": gave, "targets": len(relays)}
        source("withdraw", model_id=asked["model_id"])
        late("poison")
        self.received(f"{transport} from relays alone", late, late("receive", **asked))
        self.gather(relays, "withdraw", model_id=asked["model_id"])

    def kill(self) -> None:
        """Copy-on-transform, and sources that are killed: one of two, the only one over tcp, the only one over nixl."""
        one, two, three, target = self.built(self.options.kill_shape, [self.here] * 3, [self.there], same=True)
        self.expected = self.note("source tokens", one("tokens"))
        with self.part("transform"):
            self.transformed(three, target)
        for process in (one, two):
            process("publish", url=self.url, transports=["tcp"], model_id="bench/kill")
        asked: dict[str, Any] = {"url": self.url, "transports": ["tcp"], "model_id": "bench/kill", "kill_at": 0.3}
        for name, victim in (("tcp, one of two killed", one), ("tcp, the only one killed", two)):
            target("poison")
            self.note(name, target("receive", **asked, kill=victim.pid))
            self.after(name, target)
        three("publish", url=self.url, transports=["nixl"], model_id="bench/kill nixl")
        target("poison")
        asked |= {"transports": ["nixl"], "model_id": "bench/kill nixl", "kill_at": 0.0}
        self.note("nixl, the only one killed", target("receive", **asked, kill=three.pid))
        self.after("nixl, the only one killed", target)

    def slow(self) -> None:
        """Two sources of which one may give ``SLOW`` only: the other one takes over what it is late with."""
        one, two, target = self.built(self.options.kill_shape, [self.here] * 2, [self.there], same=True)
        self.expected = self.note("source tokens", one("tokens"))
        for transport in ("tcp", "nixl"):
            asked: dict[str, Any] = {"url": self.url, "transports": [transport], "model_id": f"bench/slow {transport}"}
            one("publish", **asked)
            two("publish", **asked, max_rate=SLOW)
            name = f"{transport}, one of two slow"
            target("poison")
            self.note(name, target("receive", **asked))
            self.after(name, target)

    def quantized(self) -> None:
        source, target = self.built("quantized", [self.here], [self.there])
        self.expected = self.note("source tokens", source("tokens"))
        for transport in ("nixl", "tcp"):
            with self.part(transport):
                self.transfer(transport, [source], [target], [transport], times=1)

    def families(self) -> None:
        """Small models of the native runtime, transformed on the device; the answers of both sides are compared."""
        source, target = self.start(self.here, self.there)
        with tempfile.TemporaryDirectory(prefix="bench-families-") as folder:
            cases = source("families", folder=folder)["cases"]
            ways = (("LOADED", "nixl"), ("PROCESSED", "nixl"), ("LOADED", "tcp"))
            for case, (stage, transport) in itertools.product(cases, ways):
                asked = {"folder": folder, "case": case, "stage": stage, "url": self.url, "transports": [transport]}
                served = source("family_serve", **asked)
                taken = target("family_take", **asked) if "failed" not in served else {"failed": "not served"}
                same_ = "failed" not in taken and all(
                    served[what] == taken[what] for what in ("tokens", "logits", "content_id")
                )
                self.note(f"{case} / {stage} / {transport}", taken | {"right": same_, "served": served})
                if "failed" not in served:
                    source("withdraw", model_id="family")

    def registration(self) -> None:
        (one,) = self.start(self.there)
        for tensors, mib in self.options.registrations:
            self.note(f"{tensors} of {mib} MiB", one("registration", tensors=tensors, mib=mib))

    # ---- parts of steps

    def transfer(
        self, name: str, sources: list[Process], targets: list[Process], transports: list[str], times: int
    ) -> None:
        """Publish, receive ``times`` times into poisoned memory, compare tokens, withdraw."""
        model_id = f"bench/{name}"
        asked: dict[str, Any] = {"url": self.url, "transports": transports, "model_id": model_id}
        self.note_ranks(f"{name} publish", self.gather(sources, "publish", **asked, use="0"))
        for time_ in range(times):
            self.gather(targets, "poison")
            key = name if times == 1 else f"{name} {time_ + 1}"
            profile = times > 2 and time_ != 1
            found = self.gather(targets, "receive", **asked, profile=profile, use=str(time_))
            if len(targets) == 1:
                self.received(key, targets[0], found[0])
            else:
                self.note_group(key, targets, found)
        self.gather(sources, "withdraw", model_id=model_id)

    def transformed(self, source: Process, target: Process) -> None:
        asked: dict[str, Any] = {"url": self.url, "transports": ["nixl", "tcp"], "model_id": "bench/transform"}
        self.note("transform publish", source("publish", **asked))
        self.note("transform", source("transform", model_id="bench/transform", every=2))
        target("poison")
        self.received("transform receive", target, target("receive", **asked))
        self.step["transform"]["source_changed"] = not same(source("tokens"), self.expected)
        source("withdraw", model_id="bench/transform")

    def bare_reads(self, sources: list[Process], targets: list[Process], sizes_mib: list[int]) -> None:
        """A bare NIXL READ of everything, by all targets at once; then our reads of several sizes, by one target."""
        served = self.gather(sources, "bare_source")
        endpoints = [{"endpoint": part.pop("endpoint")} for part in served]
        self.note_ranks("bare source", served)
        at = time.monotonic() + (TOGETHER_S if len(targets) > 1 else 0.0)
        found = self.gather(targets, "bare_read", each=endpoints, sizes_mib=sizes_mib, at=at)
        self.note_ranks("bare read", found)
        self.step["bare read"]["together_gbps"] = _together_gbps(found)

    def bare_copies(self, sources: list[Process], targets: list[Process]) -> None:
        """``copy_`` of everything through CUDA IPC, by all targets at once."""
        handles = self.gather(sources, "share")
        at = time.monotonic() + (TOGETHER_S if len(targets) > 1 else 0.0)
        found = self.gather(targets, "copy_shared", each=handles, at=at)
        self.note_ranks("ipc copy", found)
        self.step["ipc copy"]["together_gbps"] = _together_gbps(found)

    def given_by(self, key: str, process: str) -> float:
        """Shards that the process whose label has ``process`` gave to those noted under ``key``."""
        reports = [part["report"] for name, part in self.step.items() if name.startswith(f"{key} /")]
        gave = [share["nbytes"] for report in reports for share in report["shares"] if process in share["peer"]]
        return sum(gave) / max(reports[0]["nbytes"], 1)

    def after(self, name: str, target: Process) -> None:
        """What a load that lost its source leaves: right tokens, or an error and no claim."""
        found = self.step[name]
        if "report" in found:
            found["tokens_right"] = same(target("tokens"), self.expected)
        elif "killed" in found["seen"]:
            found["seconds_after_kill"] = found["ended"] - found["seen"]["killed"]


def _together_gbps(found: list[dict[str, Any]]) -> float:
    """Bytes that all moved, over the time from the first beginning to the last end."""
    marks = [mark for part in found for mark in part["marks"]]
    nbytes = sum(part["nbytes"] * len(part["marks"]) for part in found)
    return float(nbytes / (max(end for _, end in marks) - min(begin for begin, _ in marks)) / 1e9)


def _registration(text: str) -> tuple[int, float]:
    tensors, _, mib = text.partition("x")
    return int(tensors), float(mib)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cuda:0"], help="sources on the first, targets on the others")
    parser.add_argument("--shapes", nargs="+", default=["8GB", "30GB"], help="of load, ranks and digest")
    parser.add_argument("--kill-shape", default="3GB")
    parser.add_argument("--fanout-shape", default="8GB")
    parser.add_argument("--registrations", nargs="+", type=_registration, metavar="TENSORSxMIB")
    parser.add_argument("--steps", nargs="+", choices=[name for name in BOUNDS_S if name != "machine"])
    parser.add_argument("--seconds", type=float, default=420.0, help="everything is cut off then")
    parser.add_argument("--stretch", type=float, default=1.0, help="factor for the bound of each step")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="environment of the processes")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    options = parser.parse_args()
    options.steps = options.steps or (ONE_DEVICE if len(set(options.devices)) == 1 else TWO_DEVICES)
    options.registrations = options.registrations or [(1, 10.5), (300, 10.5), (5000, 2.0), (5000, 10.5)]
    return options


def _stop(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    options = _options()
    bench = Bench(options)
    if options.dry_run:
        for name, bound, _ in bench.steps():
            print(f"{name}: at most {bound:.0f} s; sources on {bench.here}, targets on {' '.join(bench.devices[1:])}")
        return
    signal.signal(signal.SIGTERM, _stop)
    with contextlib.suppress(KeyboardInterrupt):  # the table has what was found until then
        bench.run()
    (bench.out / "gpu.txt").write_text("\n".join(details(bench.found)) + "\n")
    table = "\n".join(summary(bench.found))
    (bench.out / "gpu-table.txt").write_text(table + "\n")
    print(table)
    print(f"# {time.monotonic() - bench.clock.began:.0f} s in all; {bench.out}/gpu.json", flush=True)


if __name__ == "__main__":
    main()
