"""Random loads from several sources and relays, while processes are killed, frozen, cut off, capped and corrupted.

    python bench/soak.py --seed 7 --loads 200
    python bench/soak.py --seed 7 --round 31 --verbose      one round of it again

Sources and targets are processes; what happens to them is a pure function of the seed (``soak_plan.py``), triggered by
how much has arrived rather than by the clock. Every load must end verified, or in a typed error. Its bytes are compared
with the source's by another digest than ours, when it ends and once more when its round is over. Exit code 1 after any
wrong byte, hang, or error without a type.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import soak_process as parts
from processes import Child, Failed, talking
from soak_plan import Round, Strike, plan

sys.path.remove(str(Path(__file__).parent))  # its nixl.py would be taken for the package, which is imported later
TRANSPORTS = {"tcp": ("tcp",), "nixl": ("nixl",), "both": ("nixl", "tcp")}
VERIFIED, KILLED = "verified", "killed by the plan"
BAD = ("WRONG BYTES", "HANG", "UNTYPED ERROR", "DIED")
BOUND_S = parts.LOAD_S + parts.WAIT_S + 20.0
"""A load and whatever ends it: deadline, waiting, fences."""
TICK_S = 0.05
PATIENCE_S = 4.0
"""Without anything arriving for so long, the next strike comes anyway."""


@dataclass
class Tally:
    """What came of all loads."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    strikes: Counter[tuple[str, str]] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    @property
    def loads(self) -> int:
        return sum(self.outcomes.values())

    @property
    def bad(self) -> int:
        return sum(count for (_, outcome), count in self.outcomes.items() if outcome in BAD)


@dataclass(eq=False)
class Load:
    """One target and how it is going."""

    child: Child
    fraction: float = 0.0
    outcome: str = ""
    detail: str = ""
    poked: bool = False


class World:
    """The processes of one round. A context manager: whatever is left of them is killed."""

    def __init__(self, soak: Soak, round_: Round) -> None:
        self.round = round_
        self.tally = soak.tally
        self.thaws: list[tuple[float, Child]] = []
        self.dead: set[Child] = set()
        told = (soak.url, str(soak.secret), soak.seed, round_)
        self.children: list[Child] = []
        for kind, work, plans in (("source", parts.source, round_.sources), ("target", parts.target, round_.targets)):
            for at, mine in enumerate(plans):
                self.children.append(Child(f"{kind} {at} of round {round_.number}", work, *told, mine))
        self.loads = [Load(child) for child in self.children[len(round_.sources) :]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()

    def run(self, truth: str) -> None:
        for child in self.children:
            child.expect("ready")
        for load in self.loads:
            load.child.line.say("go")
        strikes = list(self.round.strikes)
        until, moved, before = time.monotonic() + BOUND_S, time.monotonic(), 0.0
        while self._open():
            self._listen(truth)
            now, arrived = time.monotonic(), sum(load.fraction for load in self.loads) / len(self.loads)
            moved, before = (now, arrived) if arrived > before else (moved, before)
            if strikes and (arrived >= strikes[0].at or now > moved + PATIENCE_S):
                self._strike(strikes.pop(0))
                moved = now
            self._thaw(now)
            if now > until:
                break
        for load in self._open():
            load.outcome, load.detail = "HANG", f"at {load.fraction:.0%} after {BOUND_S:.0f} s"
        self._thaw(float("inf"))
        time.sleep(0.2)  # for what is still to land where it should not
        self._look_again(truth)

    def _open(self) -> list[Load]:
        return [load for load in self.loads if not load.outcome]

    def _listen(self, truth: str) -> None:
        by_child = {load.child: load for load in self._open()}
        for child in talking(list(by_child), TICK_S):
            load = by_child[child]
            try:
                self._hear(load, child.next(), truth)
            except Failed as error:
                load.outcome, load.detail = "DIED", str(error)

    def _hear(self, load: Load, told: dict[str, Any], truth: str) -> None:
        match told["event"]:
            case "progress":
                load.fraction = told["fraction"]
            case "failed":
                load.outcome, load.detail, load.fraction = told["error_type"], told["problem"], 1.0
            case "untyped":
                load.outcome, load.detail = "UNTYPED ERROR", told["problem"]
            case "loaded":
                load.fraction = 1.0
                load.outcome = self._judge(load, told["digest"], truth) if told["sound"] else "WRONG BYTES"
                load.detail = f"{told['seconds']:.1f} s from {told['peers']} peers"
                self.tally.sums += Counter({name: told[name] for name in ("retries", "duplicated", "bad_leaves")})
                self.tally.sums["from several peers"] += told["peers"] > 1

    def _judge(self, load: Load, digest: str, truth: str) -> str:
        return VERIFIED if digest == truth or load.poked else "WRONG BYTES"

    def _strike(self, strike: Strike) -> None:
        victim = self.children[strike.victim]
        if victim in self.dead:
            return
        during = "in mid-load" if self._open() else "later"
        self.tally.strikes[strike.kind, during] += 1
        load = next((load for load in self.loads if load.child is victim), None)
        if strike.kind == "kill":
            self.dead.add(victim)
            victim.kill()
            if load is not None and not load.outcome:
                load.outcome = KILLED
        elif strike.kind == "freeze":
            os.kill(victim.pid, signal.SIGSTOP)
            self.thaws.append((time.monotonic() + strike.seconds, victim))
        else:
            if load is not None and strike.kind == "poke":
                load.poked = True
            victim.line.say(strike.kind, seconds=strike.seconds, rate=strike.rate, seed=strike.seed)

    def _thaw(self, now: float) -> None:
        for when, child in self.thaws:
            if when <= now and child not in self.dead:
                os.kill(child.pid, signal.SIGCONT)
        self.thaws = [(when, child) for when, child in self.thaws if when > now]

    def _look_again(self, truth: str) -> None:
        """Nothing may have landed on what was verified."""
        for load in self.loads:
            if load.outcome == VERIFIED and not load.poked and load.child not in self.dead:
                load.child.line.say("digest")
                if load.child.expect("digest")["digest"] != truth:
                    load.outcome, load.detail = "WRONG BYTES", "some time after it was verified"


class Soak:
    """Rounds until there were enough loads; a metadata server for all of them."""

    def __init__(self, seed: int, secret: Path) -> None:
        self.seed = seed
        self.secret = secret
        self.tally = Tally()
        self.truths: dict[int, str] = {}
        self.server = Child("the metadata server", parts.metadata, str(secret))
        self.url = str(self.server.expect("ready")["url"])

    def play(self, round_: Round, *, verbose: bool) -> None:
        if verbose:
            print(round_, flush=True)
        if round_.nbytes not in self.truths:
            self.truths[round_.nbytes] = parts.Weights(round_.nbytes, self.seed).digest()
        with World(self, round_) as world:
            world.run(self.truths[round_.nbytes])
        self.tally.rounds += 1
        for load in world.loads:
            self.tally.outcomes["+".join(round_.transports), load.outcome] += 1
            if verbose or load.outcome in BAD:
                print(f"{load.child.name}: {load.outcome} {load.detail}", flush=True)


@contextlib.contextmanager
def soaking(seed: int) -> Iterator[Soak]:
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_text("soak only, loopback only\n")
        secret.chmod(0o600)
        soak = Soak(seed, secret)
        try:
            yield soak
        finally:
            soak.server.kill()


def show(tally: Tally, seconds: float) -> None:
    columns = sorted({column for column, _ in tally.outcomes})
    rows = sorted({outcome for _, outcome in tally.outcomes}, key=lambda row: (row != VERIFIED, row not in BAD, row))
    print(f"{tally.loads} loads in {tally.rounds} rounds, {seconds:.0f} s")
    print(f"{'outcome':24}" + "".join(f"{column:>10}" for column in columns))
    for row in rows:
        print(f"{row:24}" + "".join(f"{tally.outcomes[column, row]:10}" for column in columns))
    struck = ", ".join(f"{count} {kind} {when}" for (kind, when), count in sorted(tally.strikes.items()))
    print(f"strikes: {struck or 'none'}")
    print("sums: " + ", ".join(f"{name} {count}" for name, count in tally.sums.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--round", type=int, default=None, help="play this one only")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=["tcp", "nixl"])
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    transports = [TRANSPORTS[name] for name in options.transports]
    print(f"soak: seed {seed}, transports {' '.join(options.transports)}", flush=True)
    began = time.monotonic()
    with soaking(seed) as soak:
        try:
            if options.round is not None:
                soak.play(plan(seed, options.round, transports), verbose=True)
            while options.round is None and soak.tally.loads < options.loads:
                left = options.loads - soak.tally.loads
                soak.play(plan(seed, soak.tally.rounds, transports, left), verbose=options.verbose)
        except KeyboardInterrupt:
            print("soak: interrupted", file=sys.stderr)
        show(soak.tally, time.monotonic() - began)
    return 1 if soak.tally.bad or soak.tally.loads < (1 if options.round is not None else options.loads) else 0


if __name__ == "__main__":
    sys.exit(main())
