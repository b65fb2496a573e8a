"""Publications grouped into replicas, and how they look in a table. Pure but for the table object."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from weightwire.types import Coordinates
from weightwire.wire.reports import SourceView

SHORT = 12
"""Characters of an id in a table; the whole one is in the JSON."""

_COLUMNS = ("source", "model", "stage", "weights", "ranks", "state", "bytes", "progress", "load", "endpoints", "note")
_RIGHT = ("ranks", "bytes", "progress", "load")


@dataclass(frozen=True, slots=True)
class Row:
    """One replica, or one rank of it, ready to be shown; ``source`` is its (replica) incarnation, cut short."""

    source: str
    model: str
    stage: str
    weights: str
    ranks: str
    state: str
    bytes: str
    progress: str
    load: str
    endpoints: str
    note: str


def rows(views: Sequence[SourceView], *, by_rank: bool) -> list[Row]:
    """One row a rank, or one row a replica (its ranks published under one replica key in one life).

    Progress is that of the slowest rank; bytes and load are sums over the ranks.
    """
    groups: dict[tuple[str, ...], list[SourceView]] = {}
    for view in views:
        record = view.record
        key = (record.replica_key, record.replica_incarnation, record.incarnation if by_rank else "", record.role)
        groups.setdefault((*key, record.shard_key if by_rank else ""), []).append(view)
    return [_row(group, by_rank=by_rank) for group in groups.values()]


def _row(views: list[SourceView], *, by_rank: bool) -> Row:
    records = [view.record for view in views]
    first = records[0]
    endpoints = [record.endpoints[0] for record in records if record.endpoints]
    return Row(
        source=(first.incarnation if by_rank else first.replica_incarnation)[:SHORT],
        model=_model(first.model_id, first.revision, str(first.role)),
        stage=str(first.stage),
        weights=_short({record.weights_id for record in records}),
        ranks=_place(first.coordinates) if by_rank else f"{len(views)}/{first.world_size}",
        state="+".join(dict.fromkeys(str(record.state) for record in records)),
        bytes=human_bytes(sum(record.nbytes for record in records)),
        progress=f"{100 * min(record.fraction for record in records):.0f} %",
        load=str(sum(record.active_reads for record in records)),
        endpoints=", ".join(endpoints[:2]) + (f" +{len(endpoints) - 2}" if len(endpoints) > 2 else ""),
        note=_note(views),
    )


def _place(coordinates: Coordinates) -> str:
    """Only the axes that the replica is split along."""
    split = [part for part in coordinates.label().split() if not part.endswith("/1")]
    return " ".join(split) or "1/1"


def _model(model_id: str, revision: str, role: str) -> str:
    draft = " (draft)" if role == "draft" else ""
    return f"{model_id}{f'@{revision[:SHORT]}' if revision else ''}{draft}"


def _short(ids: set[str]) -> str:
    known = sorted(each[:SHORT] for each in ids if each)
    return "+".join(known) or "-"


def _note(views: Iterable[SourceView]) -> str:
    marks = {
        "suspect": any(view.suspect for view in views),
        "quarantined": any(view.quarantined for view in views),
        f"{sum(view.reports for view in views)} reports": any(view.reports for view in views),
    }
    notes = dict.fromkeys(view.note for view in views if view.note)
    return ", ".join([*(mark for mark, on in marks.items() if on), *notes])


def human_bytes(count: int) -> str:
    """``269.1 MB`` (powers of 1000, as speeds are told); ``-`` for none."""
    if count == 0:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def table(shown: Sequence[Row]) -> Table:
    """The rows as a table, without notes where there are none. What peers sent is never taken for markup."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    names = [name for name in _COLUMNS if name != "note" or any(row.note for row in shown)]
    for name in names:
        result.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
    for row in shown:
        result.add_row(*(escape(printable(getattr(row, name))) for name in names))
    return result


def printable(text: str) -> str:
    """``text`` without anything that could drive a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def to_json(views: Sequence[SourceView]) -> list[dict[str, Any]]:
    """Every rank with every field."""
    return [dataclasses.asdict(view) for view in views]
