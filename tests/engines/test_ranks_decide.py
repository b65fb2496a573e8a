"""The ranks of one replica go the same way, whatever happens to one of them, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_fleet import Fleet, Watch, bare

from weightwire.errors import LoadError, RankLost

VOTE_S = 2.5
BOUND_S = 60.0
"""No replica may take longer, whatever goes wrong: start-up on a busy machine, and a few votes."""


@dataclass
class Source:
    tokens: list[list[int]]
    digest: list[list[str]]


@pytest.fixture(scope="module")
def source(crew: Fleet, checkpoints: dict[str, Path]) -> Source:
    """Two ranks of ``small``."""
    watch = crew.source(checkpoints["small"], "ranks", tp=2)
    watch.loaded()
    return Source(watch.tokens(), watch.digest())


def misled(fleet: Fleet, checkpoint: Path, env: dict[str, str] | None = None, **faults: Any) -> Watch:
    given = {"vote_s": VOTE_S, "margin_s": 2.0} | faults
    bounds = {"WEIGHTWIRE_LOAD_TIMEOUT": "2", "WEIGHTWIRE_WAIT_FOR_LOADING": "1"} | (env or {})
    # it publishes under a name of its own identity too, so that publishing is decided as well
    return fleet.start(checkpoint, "ranks", tp=2, faults=given, env=bounds)


def ways(reports: list[dict[str, Any]]) -> list[str]:
    return [event["report"]["source"] for event in reports]


def published(reports: list[dict[str, Any]]) -> list[bool]:
    return [event["published"]["published"] for event in reports]


def assert_sound(watch: Watch, source: Source) -> None:
    """The engine's own group works, and the weights are the weights."""
    assert watch.tokens() == source.tokens
    assert [mine[0] for mine in watch.digest()] == [theirs[0] for theirs in source.digest]


def test_h23_h67_a_late_rank_obeys_what_was_decided_without_it(
    source: Source, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    disk = checkpoints["small"]
    asking = misled(fleet, disk, step="ask", kind="late", rank=0, late_s=1.0)
    planning = misled(fleet, disk, step="plan", kind="late", rank=1, late_s=1.5 * VOTE_S)
    receiving = misled(fleet, disk, step="received", kind="late", rank=1, late_s=6.0)
    publishing = misled(fleet, disk, step="publish/LOADED", kind="late", rank=1, late_s=1.5 * VOTE_S)
    assert ways(asking.loaded()) == ["peer", "peer"]
    assert ways(planning.loaded()) == ["disk", "disk"]
    assert ways(receiving.loaded()) == ["disk", "disk"]
    reports = publishing.loaded()
    assert ways(reports) == ["peer", "peer"]
    assert published(reports) == [False, False]
    assert "rank 1 said nothing in time" in reports[1]["published"]["reason"]
    for watch in (asking, planning, receiving, publishing):
        assert_sound(watch, source)
    assert fleet.end(asking, planning, receiving, publishing) == {0}


def test_h23_a_frozen_rank_ends_the_replica_with_one_line(
    source: Source, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    assert source.tokens
    began = time.monotonic()
    frozen = [
        misled(fleet, checkpoints["small"], step="ask", kind="freeze", rank=0),
        misled(fleet, checkpoints["small"], step="received", kind="freeze", rank=1),
        misled(fleet, checkpoints["small"], step="loaded", kind="freeze", rank=1),
    ]
    for watch, silent in zip(frozen, (0, 1, 1), strict=True):
        with pytest.raises(RankLost, match=rf"rank {silent} said nothing at step 'loaded'"):
            watch.loaded(BOUND_S)
    assert time.monotonic() - began < BOUND_S


def test_h23_a_rank_that_fails_takes_the_others_with_it(
    source: Source, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    disk = checkpoints["small"]
    asking = misled(fleet, disk, step="ask", kind="raise", rank=0, env={"WEIGHTWIRE_WAIT_FOR_LOADING": "60"})
    planning = misled(fleet, disk, step="plan", kind="raise", rank=1)
    receiving = misled(fleet, disk, corrupt=True, rank=1)
    crashing = misled(fleet, disk, step="plan", kind="crash", rank=1)
    cataloguing = misled(fleet, disk, unclassified=True, rank=1, vote_s=60.0)
    for watch in (asking, planning, receiving):
        assert ways(watch.loaded(BOUND_S)) == ["disk", "disk"]
        assert_sound(watch, source)
    with pytest.raises(RankLost, match="rank 1 ended with exit code 1"):
        crashing.loaded(BOUND_S)
    reports = cataloguing.loaded(BOUND_S)  # at once, though a vote may take a minute
    assert published(reports) == [False, False]
    assert "scratch" in reports[0]["published"]["reason"]


def test_h58_ranks_that_got_different_weights_refuse_them(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    lie = {"weights_id": "f" * 64, "model": str(checkpoints["other"]), "rank": 1}
    fleet.source(checkpoints["small"], "mixed", tp=2, faults=lie).loaded()
    target = fleet.target(bare(checkpoints["small"]), "mixed", tp=2)
    with pytest.raises(LoadError, match="the ranks received different weights"):
        target.loaded(BOUND_S)
