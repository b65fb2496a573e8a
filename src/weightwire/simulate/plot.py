"""How many replicas are READY over time, as an SVG: a few lines of text, so no library is needed for it."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from weightwire.simulate.report import Outcome

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 740, 40, 370
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def svg(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """One curve for each labelled outcome, from where the first replica is READY to where the last one is.

    Args:
        outcomes: times are drawn in multiples of each one's own bound, which is the dashed line.
    """
    times = [time / each.bound_s for _, each in outcomes for time in each.ready] or [1.0]
    least, most = min(1.0, *times), max(1.0, *times)
    axis = _Axis(least - 0.05 * (most - least + 0.1), most + 0.05 * (most - least + 0.1))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/><g font-size="12">',
        f'<text x="{LEFT}" y="22" font-size="14">Replicas that are READY; last / bound</text>',
        *axis.draw(),
    ]
    for at, (label, outcome) in enumerate(outcomes):
        colour, y = COLOURS[at % len(COLOURS)], BOTTOM - 8 - 16 * (len(outcomes) - 1 - at)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{_curve(outcome, axis)}"/>')
        text = escape(f"{label}: {outcome.ratio:.3f}")
        parts.append(f'<text x="{RIGHT - 8}" y="{y}" fill="{colour}" text-anchor="end">{text}</text>')
    return "\n".join([*parts, "</g></svg>", ""])


class _Axis:
    """Time, in multiples of the bound."""

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = max(0.0, least), most

    def x(self, multiple: float) -> float:
        return LEFT + (RIGHT - LEFT) * (multiple - self.least) / (self.most - self.least)

    def draw(self) -> list[str]:
        parts = []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = _y(share)
            parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if (self.most - self.least) / s <= 12), 10)
        for tick in range(int(self.least / step) + 1, int(self.most / step) + 1):
            x, text = self.x(tick * step), f"{tick * step:.2f}"
            parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{text}</text>')
        x = self.x(1.0)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}" stroke="black" stroke-dasharray="4 3"/>'
        )
        parts.append(f'<text x="{LEFT}" y="{HEIGHT - 12}">time in multiples of the bound (dashed)</text>')
        return parts


def _curve(outcome: Outcome, axis: _Axis) -> str:
    """A staircase with at most a few hundred steps."""
    points, count = [(axis.least, 0.0)], len(outcome.ready)
    for at in [*range(0, count, max(1, count // 300)), count - 1] if count else []:
        time = outcome.ready[at] / outcome.bound_s
        points += [(time, points[-1][1]), (time, (at + 1) / count)]
    return " ".join(f"{axis.x(time):.1f},{_y(share):.1f}" for time, share in [*points, (axis.most, points[-1][1])])


def _y(share: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * share
