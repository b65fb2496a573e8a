"""How long N new replicas take that start in one instant, each behind a link of its own, with one source.

    sudo python bench/fanout.py --replicas 8 16 --mib 192 --mbit 200 --repeat 3 --json

Every replica is a process in a network namespace; its link to the bridge that joins them is kept to ``--mbit`` in each
direction (``tc tbf``). All are started and have constructed their model before they are released. Times run from that
instant until the last one is READY; they are compared with bytes / goodput of one bare socket stream over the same
links, taken before them. Every replica's bytes are compared with the source's by another digest than ours. There are
``--repeat`` interleaved runs, but of ``star`` and ``tree`` only ``--compare``.

    bare    one socket stream from the source to one replica
    relay   replicas serve what they have while they receive
    star    nobody but the source serves
    tree    replicas serve once they are complete; every one serves one reader at a time
    kill    as relay, and the replica that has sent most is killed (SIGKILL) when half of the bytes are there
    cap     as relay, and the source is capped to a quarter of a link

Needs root and iproute2. The namespaces have no names: nothing is left of them however this ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import fanout_replica as parts
from cap import machine
from namespaces import Switch, Unable
from processes import Child, Failed, talking

MIB = 1 << 20
CAP = 0.25
RELEASE_S = 0.5
TICK_S = 0.1
REACH = {"relay": {8: 1.25, 16: 1.35}, "kill": {8: 1.5}, "cap": {8: 1.3}}
CANNOT = 3
"""Exit code where namespaces cannot be had: nothing was measured, and nothing is wrong."""
WHAT = ("relay", "star", "tree", "kill", "cap")


@dataclass(kw_only=True)
class Run:
    """One fan-out. Bytes are of the model where nothing else is said.

    Attributes:
        seconds: from the release to the last READY, and to the first one.
        bound_s: what one copy takes: over a bare stream, or at the cap.
        copies: of the model that the source's link carried away.
        egress: bytes a second that the source sent, between a twentieth and 19 twentieths of all it sent.
        received: copies that the replica which received most had to receive.
        retries: reads that were asked for again, all replicas together; ``duplicated``: bytes asked for twice.
        sent: copies that each replica's link carried away.
        reached: by replica, how much had arrived when (seconds from the release, part of all).
    """

    what: str
    replicas: int
    nbytes: int
    bound_s: float
    seconds: float
    first_s: float
    copies: float
    served: float
    egress: float
    received: float
    retries: int
    duplicated: int
    sent: list[float]
    reached: list[list[tuple[float, float]]]
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.seconds / self.bound_s


def on(switch: Switch, host: int, *work: Any) -> Child:
    """A process on a host of ``switch``."""
    return Child(f"host {host}", *work, enter=lambda: switch.enter(host))


class Fleet:
    """Metadata server, source and constructed replicas of one run. A context manager; kills what is left."""

    def __init__(self, switch: Switch, replicas: int, secret: Path, **plan: Any) -> None:
        self.switch = switch
        self.children: list[Child] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self.kill)
            server = self._start(-1, parts.metadata, switch.address(-1), str(secret))
            self.plan = parts.Plan(url=server.expect("ready")["url"], secret_file=str(secret), **plan)
            self.source = self._start(0, parts.source, self.plan)
            self.replicas = [self._start(host, parts.replica, self.plan) for host in range(1, 1 + replicas)]
            self.host = {replica: host for host, replica in enumerate(self.replicas, 1)}
            self.truth = self.source.expect("ready")
            for replica in self.replicas:
                replica.expect("constructed")
            stack.pop_all()

    def _start(self, host: int, *work: Any) -> Child:
        self.children.append(on(self.switch, host, *work))
        return self.children[-1]

    def kill(self) -> None:
        for child in reversed(self.children):  # the metadata server last: nobody is to miss it
            child.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Watch:
    """Follows the replicas of one run from their release to the last READY."""

    def __init__(self, fleet: Fleet, victims: int) -> None:
        self.fleet = fleet
        self.victims = victims
        self.alive = list(fleet.replicas)
        self.fractions = dict.fromkeys(self.alive, 0.0)
        self.reached: dict[Child, list[tuple[float, float]]] = {replica: [] for replica in self.alive}
        self.loaded: dict[Child, dict[str, Any]] = {}
        self.sent: list[tuple[float, int]] = []
        self.before = fleet.switch.carried()
        self.at = time.monotonic() + RELEASE_S

    def run(self, bound_s: float) -> None:
        for replica in self.alive:
            replica.line.say("go", at=self.at)
        until = self.at + bound_s
        while len(self.loaded) < len(self.alive):
            if time.monotonic() > until:
                late = [replica.name for replica in self.alive if replica not in self.loaded]
                raise Failed(f"{late} were not ready after {bound_s:.0f} s")
            for replica in talking([each for each in self.alive if each not in self.loaded], TICK_S):
                self._hear(replica)
            self.sent.append((time.monotonic(), self.carried()[0][0]))
            if self.victims and statistics.median(self.fractions.values()) >= 0.5:
                self._kill()

    def carried(self) -> list[tuple[int, int]]:
        """Since the release, by host: bytes from it, bytes to it."""
        now = self.fleet.switch.carried()
        return [(up - up0, down - down0) for (up, down), (up0, down0) in zip(now, self.before, strict=True)]

    def egress(self) -> float:
        """Of the source, bytes a second in the middle of what it sent."""
        total = self.sent[-1][1]
        middle = [(when, nbytes) for when, nbytes in self.sent if 0.05 * total <= nbytes <= 0.95 * total]
        if len(middle) < 2:
            return 0.0
        return (middle[-1][1] - middle[0][1]) / (middle[-1][0] - middle[0][0])

    def _hear(self, replica: Child) -> None:
        message = replica.next()
        if message["event"] == "progress":
            self.fractions[replica] = message["fraction"]
            self.reached[replica].append((round(message["at"] - self.at, 2), round(message["fraction"], 2)))
        elif message["event"] == "loaded":
            self.loaded[replica] = message

    def _kill(self) -> None:
        carried = self.carried()
        loading = [replica for replica in self.alive if replica not in self.loaded]
        victim = max(loading, key=lambda replica: carried[self.fleet.host[replica]][0])
        self.victims -= 1
        self.alive.remove(victim)
        del self.fractions[victim]
        victim.kill()


class Bench:
    def __init__(self, options: argparse.Namespace, replicas: int, secret: Path) -> None:
        self.options = options
        self.replicas = replicas
        self.secret = secret
        self.switch = Switch(1 + replicas, options.mbit)
        self.nbytes = _whole(options.mib)
        self.goodputs: list[float] = []

    def bare(self) -> None:
        """Goodput of one stream from the source's host to a replica's, bytes a second."""
        sender = on(self.switch, 0, parts.bare_sender, self.switch.address(0), self.nbytes)
        port = sender.expect("ready")["port"]
        receiver = on(self.switch, 1, parts.bare_receiver, self.switch.address(0), port, self.nbytes)
        try:
            self.goodputs.append(self.nbytes / receiver.expect("done", 3 * self.nbytes * 8 / self._bits)["seconds"])
        finally:
            receiver.kill()
            sender.kill()

    def run(self, what: str) -> Run:
        nbytes, rate, mode, readers = self.nbytes, 0.0, "relay", 0
        if what == "cap":
            nbytes, rate = _whole(self.options.cap_mib), CAP * self._bits / 8
        elif what in ("star", "tree"):
            mode, readers = what, int(what == "tree")
        bound = nbytes / (rate or self.goodputs[-1])
        plan = {"nbytes": nbytes, "mode": mode, "max_rate": rate, "max_readers": readers}
        with Fleet(self.switch, self.replicas, self.secret, **plan) as fleet:
            watch = Watch(fleet, victims=int(what == "kill"))
            watch.run(30 + 2 * self.replicas * bound)
            _verify(fleet, watch)
            fleet.source.line.say("served")
            return _summary(what, watch, bound, fleet.source.expect("served")["nbytes"])

    @property
    def _bits(self) -> float:
        return float(self.options.mbit) * 1e6


def _whole(mib: float) -> int:
    """``mib`` mebibytes, or a little less: so that all tensors have the same size, of whole elements."""
    return int(mib * MIB) // (parts.TENSORS * 2) * parts.TENSORS * 2


def _verify(fleet: Fleet, watch: Watch) -> None:
    for replica in watch.alive:
        found = watch.loaded[replica]["content_id"], replica.expect("checked")["digest"]
        if found != (fleet.truth["content_id"], fleet.truth["digest"]):
            raise Failed(f"WRONG BYTES on {replica.name}: {found}, not {fleet.truth}")
    for told in watch.loaded.values():
        if sum(told["shares"]) != told["nbytes"]:
            raise Failed(f"what peers gave ({told['shares']}) is not what was received ({told['nbytes']})")


def _summary(what: str, watch: Watch, bound: float, served: int) -> Run:
    nbytes, carried, told = watch.fleet.plan.nbytes, watch.carried(), list(watch.loaded.values())
    names = {name for each in told for name in each["seconds"]}
    return Run(
        what=what,
        replicas=len(watch.fleet.replicas),
        nbytes=nbytes,
        bound_s=bound,
        seconds=max(each["ready"] for each in told) - watch.at,
        first_s=min(each["ready"] for each in told) - watch.at,
        copies=carried[0][0] / nbytes,
        served=served / nbytes,
        egress=watch.egress(),
        received=max(carried[watch.fleet.host[replica]][1] for replica in watch.alive) / nbytes,
        retries=sum(each["retries"] for each in told),
        duplicated=sum(each["duplicated"] for each in told),
        sent=[round(carried[host][0] / nbytes, 3) for host in watch.fleet.host.values()],
        reached=list(watch.reached.values()),
        phases={name: max(each["seconds"].get(name, 0.0) for each in told) for name in sorted(names)},
    )


# --- the report -----------------------------------------------------------------------------------------------------


def row(runs: Sequence[Run], cap: float) -> dict[str, Any]:
    """Medians of runs of one kind."""

    def median(name: str, digits: int = 2) -> float:
        return round(statistics.median(getattr(run, name) for run in runs), digits)

    one = runs[0]
    found = {
        "what": one.what,
        "replicas": one.replicas,
        "mib": round(one.nbytes / MIB),
        "runs": len(runs),
        "bound_s": median("bound_s"),
        "seconds": median("seconds"),
        "ratio": median("ratio", 3),
        "worst": round(max(run.ratio for run in runs), 3),
        "reach": REACH.get(one.what, {}).get(one.replicas, 0.0),
        "first_s": median("first_s"),
        "source_copies": median("copies"),
        "most_received": median("received", 3),
        "retries": round(statistics.median(run.retries for run in runs)),
        "duplicated_mib": round(statistics.median(run.duplicated for run in runs) / MIB, 1),
    }
    if one.what == "cap":
        found["egress_of_cap"] = round(statistics.median(run.egress for run in runs) / cap, 3)
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for each in rows for name in each))
    print("  ".join(f"{name:>{max(7, len(name))}}" for name in names))
    for each in rows:
        print("  ".join(f"{each.get(name, ''):>{max(7, len(name))}}" for name in names))


def measure(options: argparse.Namespace, replicas: int, secret: Path) -> dict[str, Any]:
    bench = Bench(options, replicas, secret)
    runs: dict[str, list[Run]] = {what: [] for what in options.only}
    try:
        for at in range(options.repeat):
            bench.bare()
            for what in options.only:
                if at < (options.compare if what in ("star", "tree") else options.repeat):
                    runs[what].append(bench.run(what))
                    _say(runs[what][-1])
    finally:
        bench.switch.close()
    rows = [row(found, CAP * options.mbit * 1e6 / 8) for found in runs.values() if found]
    return {
        "bare_mb_s": round(statistics.median(bench.goodputs) / 1e6, 2),
        "rows": rows,
        "runs": [asdict(run) for found in runs.values() for run in found],
    }


def _say(run: Run) -> None:
    line = (
        f"{run.what} {run.replicas}: {run.seconds:.2f} s, {run.ratio:.2f} of the bound, source {run.copies:.2f} copies"
    )
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[8])
    parser.add_argument("--mib", type=float, default=192, help="of the model")
    parser.add_argument("--cap-mib", type=float, default=64, help="of the model where the source is capped")
    parser.add_argument("--mbit", type=float, default=200, help="of each link, in each direction")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compare", type=int, default=1, help="how often star and tree are run; they are slow")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_text("bench only, namespaces only\n")
        secret.chmod(0o600)
        try:
            found = {replicas: measure(options, replicas, secret) for replicas in options.replicas}
        except Unable as error:
            print(f"fanout: {error}", file=sys.stderr)
            sys.exit(CANNOT)
        except Failed as error:
            sys.exit(f"fanout: {error}")
        except KeyboardInterrupt:
            sys.exit("fanout: interrupted")
    if options.json:
        print(json.dumps({"machine": facts, "mbit": options.mbit, "replicas": found}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for replicas, each in found.items():
        print(f"\n{replicas} replicas, links of {options.mbit:g} Mbit/s, one bare stream {each['bare_mb_s']} MB/s")
        show(each["rows"])


if __name__ == "__main__":
    main()
