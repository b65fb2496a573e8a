"""What a simulation came to, against what the network allows at best."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from weightwire.manifest.leaves import chunk_bytes
from weightwire.simulate.swarm import Plan, Swarm

MOST_EVENTS = 5_000_000
EVENTS_PER_CHUNK = 2.3
"""A chunk's turn at the uplink, its arrival, and what happens beside that."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One simulation. Times count from a replica's own arrival and are of those that live and have full speed.

    Attributes:
        plan: what was simulated.
        bound_s: no schedule could be quicker for all: see ``Plan.bound_s``.
        median_s, p99_s, last_s: from arrival to READY.
        ratio: ``last_s`` over ``bound_s``.
        slow_s: of the last one with slow links; 0 where there is none.
        unfinished: that did not become READY within a thousand times one copy.
        egress: what the sources sent, in shards, all together.
        duplicated: bytes that were asked for twice, in shards, all newcomers together.
        events: that the simulation took.
        ready: when each became READY, ascending, from the beginning.
    """

    plan: Plan
    bound_s: float
    median_s: float
    p99_s: float
    last_s: float
    ratio: float
    slow_s: float
    unfinished: int
    egress: float
    duplicated: float
    events: int
    ready: tuple[float, ...]

    def to_json(self) -> dict[str, object]:
        """Everything but when each became READY."""
        return {name: value for name, value in asdict(self).items() if name != "ready"}


def with_chunk(plan: Plan, most_events: int = MOST_EVENTS) -> Plan:
    """``plan`` with the chunk of a real load, or a larger one that keeps the number of events in bounds."""
    least = plan.nbytes * plan.replicas * EVENTS_PER_CHUNK / most_events
    return replace(plan, chunk=max(chunk_bytes(plan.nbytes), int(least)))


def simulate(plan: Plan) -> Outcome:
    """Run one simulation; where ``plan.chunk`` is 0, ``with_chunk``."""
    plan = plan if plan.chunk else with_chunk(plan)
    swarm = Swarm(plan)
    swarm.run()
    newcomers = [each for each in swarm.replicas[plan.sources :] if each.alive]
    ready = [(each.ready, each.ready - each.joined, each.slow) for each in newcomers if each.ready is not None]
    took = sorted(seconds for _, seconds, slow in ready if not slow) or [0.0]
    return Outcome(
        plan=plan,
        bound_s=plan.bound_s,
        median_s=took[len(took) // 2],
        p99_s=took[len(took) * 99 // 100],
        last_s=took[-1],
        ratio=took[-1] / plan.bound_s,
        slow_s=max((seconds for _, seconds, slow in ready if slow), default=0.0),
        unfinished=len(newcomers) - len(ready),
        egress=sum(each.sent for each in swarm.replicas[: plan.sources]) / plan.nbytes,
        duplicated=sum(each.schedule.duplicated for each in swarm.replicas) / plan.nbytes,
        events=swarm.events,
        ready=tuple(sorted(when for when, _, _ in ready)),
    )
