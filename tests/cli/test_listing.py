from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from weightwire.cli.listing import human_bytes, rows, table, to_json
from weightwire.types import Coordinates, Role, Stage
from weightwire.wire.messages import PublicationRecord, PublicationState
from weightwire.wire.reports import SourceView


def view(rank: int = 0, *, life: str = "one", **fields: Any) -> SourceView:
    of_view = {name: fields.pop(name) for name in ("suspect", "quarantined", "reports", "note") if name in fields}
    given: dict[str, Any] = {
        "shard_key": f"shard{rank}",
        "replica_key": "replica",
        "family_key": "family",
        "model_id": "acme/tiny",
        "identity": "{}",
        "coordinates": Coordinates(tp_rank=rank, tp_size=3),
        "stage": Stage.LOADED,
        "incarnation": f"{life}-rank{rank}-incarnation",
        "replica_incarnation": f"{life}-replica-incarnation",
        "world_size": 3,
        "endpoints": (f"10.0.0.5:{4000 + rank}",),
        "weights_id": "w" * 64,
        "nbytes": 100_000_000,
        "state": PublicationState.READY,
        "fraction": 1.0,
    }
    marks: dict[str, Any] = {"suspect": False, "quarantined": False, "reports": 0, "age_s": 1.0, "remaining_s": 9.0}
    return SourceView(record=PublicationRecord(**(given | fields)), **(marks | of_view))


def test_a_replica_is_one_row_with_sums_and_the_slowest_rank() -> None:
    views = [view(0, active_reads=1), view(1, active_reads=2), view(2, fraction=0.257, state=PublicationState.RELAYING)]
    (row,) = rows(views, by_rank=False)
    assert (row.ranks, row.bytes, row.progress, row.load) == ("3/3", "300.0 MB", "26 %", "3")
    assert row.state == "READY+RELAYING"
    assert row.weights == "w" * 12
    assert row.source == "one-replica-"
    assert row.endpoints == "10.0.0.5:4000, 10.0.0.5:4001 +1"


def test_h41_two_lives_and_two_models_are_not_mixed() -> None:
    views = [view(0), view(0, life="two"), view(0, role=Role.DRAFT), view(1)]
    assert sorted(row.ranks for row in rows(views, by_rank=False)) == ["1/3", "1/3", "2/3"]
    assert len(rows(views, by_rank=True)) == 4
    assert {row.ranks for row in rows(views, by_rank=True)} == {"tp0/3", "tp1/3"}


def test_what_is_wrong_with_a_source_is_noted() -> None:
    (row,) = rows([view(0, suspect=True), view(1, reports=2, note="stream broke")], by_rank=False)
    assert row.note == "suspect, 2 reports, stream broke"
    (row,) = rows([view(0, quarantined=True)], by_rank=False)
    assert row.note == "quarantined"


def test_what_is_not_known_yet_is_a_dash() -> None:
    (row,) = rows([view(0, weights_id="", nbytes=0, fraction=0.0, endpoints=())], by_rank=False)
    assert (row.weights, row.bytes, row.progress, row.endpoints) == ("-", "-", "0 %", "")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "-"), (999, "999 B"), (1000, "1.0 kB"), (269_060_000, "269.1 MB"), (140_500_000_000, "140.5 GB")],
)
def test_bytes_are_told_as_people_read_them(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_h39_names_from_peers_are_neither_markup_nor_control_codes() -> None:
    stream = io.StringIO()
    hostile = view(0, model_id="[bold red]x[/]\x1b[2J", revision="[link=file:///]")
    Console(file=stream, width=300, force_terminal=True).print(table(rows([hostile], by_rank=False)))
    assert "[bold red]x[/]" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_json_has_every_field_of_every_rank() -> None:
    (plain,) = json.loads(json.dumps(to_json([view(1)])))
    assert plain["record"]["coordinates"]["tp_rank"] == 1
    assert plain["record"]["state"] == "READY"
    assert plain["remaining_s"] == 9.0
