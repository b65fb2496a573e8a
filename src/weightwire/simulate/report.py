"""What a simulation came to, against what the network allows at best: in figures, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from xml.sax.saxutils import escape

from weightwire.manifest.leaves import chunk_bytes
from weightwire.simulate.swarm import Plan, Swarm

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 740, 40, 370
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One simulation. Times are from a replica's own arrival to READY, and of those that live and have full speed.

    Attributes:
        bound_s, ratio: no schedule could be quicker for all (see ``Plan.bound_s``), and ``last_s`` over it.
        slow_s: of the last one with slow links; 0 where there is none.
        unfinished: that did not become READY within a thousand times one copy.
        egress, duplicated: what the sources sent, and what newcomers asked for twice, all together, in shards.
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


def with_chunk(plan: Plan, most_events: int = 5_000_000) -> Plan:
    """``plan`` with the chunk of a real load, or a larger one that keeps the number of events in bounds."""
    least = plan.nbytes * plan.replicas * 2.3 / most_events  # a turn at the uplink, an arrival, and what else happens
    return replace(plan, chunk=max(chunk_bytes(plan.nbytes), int(least)))


def simulate(plan: Plan) -> Outcome:
    """Run one simulation; where ``plan.chunk`` is 0, ``with_chunk``."""
    plan = plan if plan.chunk else with_chunk(plan)
    swarm = Swarm(plan)
    swarm.run()
    newcomers = [each for each in swarm.replicas[plan.sources :] if each.alive]
    ready = [(each.ready, each.ready - each.joined, each.down.rate) for each in newcomers if each.ready is not None]
    took = sorted(seconds for _, seconds, rate in ready if rate == plan.rate) or [0.0]
    return Outcome(
        plan=plan,
        bound_s=plan.bound_s,
        median_s=took[len(took) // 2],
        p99_s=took[len(took) * 99 // 100],
        last_s=took[-1],
        ratio=took[-1] / plan.bound_s,
        slow_s=max((seconds for _, seconds, rate in ready if rate < plan.rate), default=0.0),
        unfinished=len(newcomers) - len(ready),
        egress=sum(each.sent for each in swarm.replicas[: plan.sources]) / plan.nbytes,
        duplicated=sum(each.schedule.duplicated for each in swarm.replicas) / plan.nbytes,
        events=swarm.events,
        ready=tuple(sorted(when for when, _, _ in ready)),
    )


def svg(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """How many replicas are READY over time: one curve for each labelled outcome.

    Args:
        outcomes: times are drawn in multiples of each one's own bound, which is the dashed line.
    """
    times = [1.0, *(time / each.bound_s for _, each in outcomes for time in each.ready)]
    margin = 0.05 * (max(times) - min(times) + 0.1)
    least, most = max(0.0, min(times) - margin), max(times) + margin

    def x(multiple: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (multiple - least) / (most - least), 1)

    def y(share: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/><g font-size="12">',
        f'<text x="{LEFT}" y="22" font-size="14">Replicas that are READY; last / bound</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 12}">time in multiples of the bound (dashed)</text>',
        f'<path d="M{x(1.0)},{TOP}V{BOTTOM}" stroke="black" stroke-dasharray="4 3"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        multiple = least + share * (most - least)
        parts.append(f'<path d="M{LEFT},{y(share)}H{RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(share) + 4}" text-anchor="end">{share:.0%}</text>')
        parts.append(f'<text x="{x(multiple)}" y="{BOTTOM + 18}" text-anchor="middle">{multiple:.3f}</text>')
    for at, (label, each) in enumerate(outcomes):
        colour, count = COLOURS[at % len(COLOURS)], len(each.ready)
        steps = reversed(range(count, 0, -max(1, count // 300)))  # a few hundred at most, and the last one
        stairs = "".join(f"H{x(each.ready[done - 1] / each.bound_s)}V{y(done / count)}" for done in steps)
        parts.append(f'<path d="M{LEFT},{BOTTOM}{stairs}H{RIGHT}" fill="none" stroke="{colour}" stroke-width="2"/>')
        legend = f'<text x="{RIGHT - 8}" y="{BOTTOM - 8 - 16 * (len(outcomes) - 1 - at)}" fill="{colour}"'
        parts.append(f'{legend} text-anchor="end">{escape(label)}: {each.ratio:.3f}</text>')
    return "\n".join([*parts, "</g></svg>", ""])
