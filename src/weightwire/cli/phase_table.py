"""How loads are shown: a table with one column a replica, and the lines of ``run``. Pure but for the table object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from weightwire.cli.listing import human_bytes, printable
from weightwire.cli.outcome import PHASES, Outcome

_ORIGINS = {
    "peer": "from a running replica",
    "tensors": "from another program's tensors",
    "disk": "from the disk",
    "random": "random numbers",
}
_LABELS = {
    "verify": "  verify, meanwhile",
    "publish": "publish, for others",
    "total": "total load",
}


def phase_table(outcomes: Sequence[Outcome], names: Mapping[str, str] | None = None) -> Table:
    """The time of each phase, the bytes, their speed and what carried them; one column a replica.

    Args:
        outcomes: one a column.
        names: of peers' labels: how the replicas behind them are called.
    """
    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3))
    result.add_column("")
    for outcome in outcomes:
        result.add_column(escape(outcome.name), justify="right")
    for label, cell in _rows(names or {}):
        result.add_row(label, *(escape(printable(cell(outcome))) for outcome in outcomes))
    return result


def _rows(names: Mapping[str, str]) -> Iterator[tuple[str, Callable[[Outcome], str]]]:
    yield "weights from", lambda outcome: origin(outcome, names)
    yield "transport in use", lambda outcome: ", ".join(outcome.paths) or "-"
    for phase in PHASES:
        yield _LABELS.get(phase, phase), _phase(phase)
    yield "ready after", lambda outcome: f"{outcome.ready_s:.2f} s"
    yield "bytes", lambda outcome: human_bytes(outcome.nbytes)
    yield "GB/s", lambda outcome: f"{outcome.gigabytes_per_second:.2f}" if outcome.nbytes else "-"


def _phase(phase: str) -> Callable[[Outcome], str]:
    return lambda outcome: f"{outcome.seconds[phase]:.2f} s" if phase in outcome.seconds else "-"


def origin(outcome: Outcome, names: Mapping[str, str]) -> str:
    """``disk``, ``random``, or the replicas that gave bytes."""
    if not outcome.taken_from_peers:
        return outcome.source
    return " and ".join(dict.fromkeys(peer for peer, _ in outcome.taken(names)))


def summary(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """Label and text of each line that tells how one replica was loaded; warnings come last."""
    yield from _origins(outcome)
    if outcome.nbytes:
        over = f" over {', '.join(outcome.paths)}" if outcome.paths else ""
        speed = f"{outcome.seconds.get('transfer', 0.0):.2f} s ({outcome.gigabytes_per_second:.2f} GB/s)"
        yield "bytes", f"{human_bytes(outcome.nbytes)} in {speed}{over}"
    for (peer, path), nbytes in outcome.taken().items():
        yield "from", f"{peer}: {human_bytes(nbytes)} over {path}"
    yield "took", ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in outcome.seconds.items())
    if outcome.taken_from_peers:
        yield "revision", outcome.revision or "the source names none"
    if outcome.weights_id:
        yield "weights id", outcome.weights_id
    if outcome.published:
        yield "published", f"stage {outcome.published} over {', '.join(outcome.served_over)}"
    if outcome.metrics:
        yield "metrics", ", ".join(f"http://{address}/metrics" for address in outcome.metrics)
    for reason in outcome.not_published:
        yield "NOT published", reason
    for warning in outcome.notes:
        yield "WARNING", warning


def _origins(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "weights", _weights(outcome)
    if outcome.source == "disk" and outcome.misses:
        yield "no peer", "; ".join(outcome.misses)
    if outcome.draft_source:
        why = f": {'; '.join(outcome.draft_misses)}" if outcome.draft_misses else ""
        yield "draft", f"{_ORIGINS.get(outcome.draft_source, outcome.draft_source)}{why}"


def _weights(outcome: Outcome) -> str:
    ranks = f"{len(outcome.ranks)} rank{'s' if len(outcome.ranks) > 1 else ''}"
    match outcome.source:
        case "peer" | "tensors" as source:
            verified = "every byte verified" if outcome.verified else "NOT VERIFIED"
            return f"{_ORIGINS[source]}, {verified} ({ranks})"
        case "disk":
            return f"from the disk ({ranks})"
        case "random":
            return f"random numbers: a dummy load ({ranks})"
        case other:
            return f"from {other} ({ranks})"
