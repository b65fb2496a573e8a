"""What happens in each round of ``bench/soak.py``: a pure function of the seed and the number of the round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20
SIZES = (12 * MIB, 24 * MIB, 40 * MIB)
MAX_TARGETS = 6

ON_PROCESSES = ("kill", "freeze", "cut", "poke", "cap", "pause", "withdraw")
"""``kill``: SIGKILL. ``freeze``: SIGSTOP, and SIGCONT some time later. ``cut``: all of its connections are reset.
``poke``: bits of its weights flip behind its back. ``cap``: its bandwidth cap changes. ``pause``: nobody may read for
some time. ``withdraw``: as a source does that is about to change its weights, which it then does at once."""

ON_TARGETS = {"kill": 0.4, "freeze": 0.4, "cut": 0.4, "poke": 0.2}
"""How often it befalls a target rather than a source."""

ON_READS = ("corrupt", "cut", "drop", "delay")
"""What befalls single reads of a target: flipped bits, a broken connection, an answer that never comes, a slow one."""


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """A source: bytes a second that it serves at most, readers at a time (0: no bound)."""

    max_rate: float
    max_readers: int


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """A load: how long after the others it begins, whether it serves others, what befalls its reads and how often."""

    after_s: float
    relays: bool
    read_fault: str
    read_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One event.

    Attributes:
        at: part of all bytes of the round that has arrived when it happens.
        kind: of ``ON_PROCESSES``.
        victim: sources are counted first, then targets.
        seconds: how long it lasts (``freeze``, ``pause``).
        rate: bytes a second (``cap``).
        seed: of whatever else is random.
    """

    at: float
    kind: str
    victim: int
    seconds: float
    rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Round:
    """Sources, targets that load from them and from each other, and what befalls them."""

    number: int
    transports: tuple[str, ...]
    nbytes: int
    sources: tuple[SourcePlan, ...]
    targets: tuple[TargetPlan, ...]
    strikes: tuple[Strike, ...]


def plan(seed: int, number: int, transports: Sequence[tuple[str, ...]], most: int = MAX_TARGETS) -> Round:
    """Round ``number`` of the soak that ``seed`` stands for, with ``most`` targets at most."""
    chance = random.Random(f"{seed}/{number}")
    sources = tuple(_source(chance) for _ in range(chance.choice((1, 2, 2, 3, 3))))
    targets = tuple(_target(chance) for _ in range(min(most, chance.randint(2, MAX_TARGETS))))
    count = chance.choice((0, 1, 2, 2, 3, 4, 5))
    strikes = [_strike(chance, len(sources), len(targets)) for _ in range(count)]
    return Round(
        number=number,
        transports=chance.choice(list(transports)),
        nbytes=chance.choice(SIZES),
        sources=sources,
        targets=targets,
        strikes=tuple(sorted(strikes, key=lambda strike: strike.at)),
    )


def _source(chance: random.Random) -> SourcePlan:
    return SourcePlan(max_rate=chance.uniform(8e6, 30e6), max_readers=chance.choice((0, 0, 0, 1, 2)))


def _target(chance: random.Random) -> TargetPlan:
    fault = chance.choice((*ON_READS, *[""] * 12))
    rate = {"": 0.0, "corrupt": 0.02, "cut": 0.05, "drop": 0.02, "delay": 0.2}[fault]
    return TargetPlan(
        after_s=chance.choice((0.0, 0.0, chance.uniform(0.0, 1.0))),
        relays=chance.random() < 0.85,
        read_fault=fault,
        read_rate=rate,
        seed=chance.getrandbits(32),
    )


def _strike(chance: random.Random, sources: int, targets: int) -> Strike:
    kind = chance.choice(ON_PROCESSES)
    on_target = chance.random() < ON_TARGETS.get(kind, 0.0)
    return Strike(
        at=chance.uniform(0.05, 0.95),
        kind=kind,
        victim=sources + chance.randrange(targets) if on_target else chance.randrange(sources),
        seconds=chance.choice((0.3, 1.0, 3.5)),
        rate=chance.uniform(5e6, 100e6),
        seed=chance.getrandbits(32),
    )
