"""How many replicas are READY over time, as an SVG: a few lines of text, so no library is needed for it."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from weightwire.simulate.report import Outcome

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 740, 40, 370
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
MOST_STEPS = 300


def svg(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """One curve for each labelled outcome, from where the first replica is READY to where the last one is.

    Args:
        outcomes: times are drawn in multiples of each one's own bound, which is the dashed line.
    """
    times = [1.0, *(time / each.bound_s for _, each in outcomes for time in each.ready)]
    margin = 0.05 * (max(times) - min(times) + 0.1)
    least, most = max(0.0, min(times) - margin), max(times) + margin

    def x(multiple: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (multiple - least) / (most - least), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/><g font-size="12">',
        f'<text x="{LEFT}" y="22" font-size="14">Replicas that are READY; last / bound</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 12}">time in multiples of the bound (dashed)</text>',
        f'<path d="M{x(1.0)},{TOP}V{BOTTOM}" stroke="black" stroke-dasharray="4 3"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        multiple = least + share * (most - least)
        parts.append(f'<path d="M{LEFT},{_y(share)}H{RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{_y(share) + 4}" text-anchor="end">{share:.0%}</text>')
        parts.append(f'<text x="{x(multiple)}" y="{BOTTOM + 18}" text-anchor="middle">{multiple:.3f}</text>')
    for at, (label, each) in enumerate(outcomes):
        colour, count = COLOURS[at % len(COLOURS)], len(each.ready)
        steps = reversed(range(count, 0, -max(1, count // MOST_STEPS)))  # so that the last one is among them
        stairs = "".join(f"H{x(each.ready[done - 1] / each.bound_s)}V{_y(done / count)}" for done in steps)
        parts.append(f'<path d="M{LEFT},{BOTTOM}{stairs}H{RIGHT}" fill="none" stroke="{colour}" stroke-width="2"/>')
        legend = f'<text x="{RIGHT - 8}" y="{BOTTOM - 8 - 16 * (len(outcomes) - 1 - at)}" fill="{colour}" '
        parts.append(f'{legend} text-anchor="end">{escape(label)}: {each.ratio:.3f}</text>')
    return "\n".join([*parts, "</g></svg>", ""])


def _y(share: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * share, 1)
