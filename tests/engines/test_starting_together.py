"""Replicas that start when there is no source yet, or when another one is still loading."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from engine_fleet import Fleet, bare

from weightwire.errors import LoadError


def test_h24_the_first_replica_waits_for_nobody(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    env = {"WEIGHTWIRE_WAIT_FOR_LOADING": "300"}
    first = fleet.start(checkpoints["small"], "first", env=env)
    lost = fleet.start(bare(checkpoints["small"]), "nobody", env=env)
    report = first.report()
    assert report["source"] == "disk"
    assert report["seconds"]["discover"] < 30
    with pytest.raises(LoadError, match="nobody serves this model"):
        lost.loaded(60)


def test_h25_replicas_that_start_together_end_equal(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    began = time.monotonic()
    # each has announced itself when the other one asks
    late = {"step": "ask", "kind": "late", "rank": 0, "late_s": 1.0}
    env = {"WEIGHTWIRE_WAIT_FOR_LOADING": "300"}
    pair = [fleet.start(checkpoints["small"], "together", tp=2, faults=late, env=env) for _ in range(2)]
    loads = [watch.loaded(60) for watch in pair]
    ways = sorted("+".join(event["report"]["source"] for event in load) for load in loads)
    assert time.monotonic() - began < 60  # less than they would wait for one another
    assert ways in (["disk+disk", "disk+disk"], ["disk+disk", "peer+peer"])
    assert pair[0].digest() == pair[1].digest()
    assert pair[0].tokens() == pair[1].tokens()
    assert fleet.end(*pair) == {0}


def test_h24_a_replica_that_is_loading_is_waited_for_until_it_dies(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    loading = fleet.source(checkpoints["small"], "slow", faults={"fill_s": 60.0})
    fleet.eventually("slow", lambda views: len(views) == 1)
    waiting = fleet.target(checkpoints["small"], "slow", env={"WEIGHTWIRE_WAIT_FOR_LOADING": "300"})
    waiting.wait_for(lambda event: event["event"] == "progress" and event["phase"] == "wait")
    loading.signal(signal.SIGKILL)
    began = time.monotonic()
    assert waiting.report()["source"] == "disk"
    assert time.monotonic() - began < 60


def test_h25_a_follower_takes_what_the_first_has_read(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    loading = fleet.start(checkpoints["small"], "follow", faults={"fill_s": 2.0})
    fleet.eventually("follow", lambda views: len(views) == 1)
    follower = fleet.start(checkpoints["small"], "follow")
    assert follower.report()["source"] == "peer"
    assert loading.report()["source"] == "disk"
    assert follower.tokens() == loading.tokens()
