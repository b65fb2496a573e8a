"""Two workers of one replica, one of which goes wrong: both end the same way, in time (hazard H23)."""

from __future__ import annotations

import time
from typing import Any

import pytest
from vllm_checkpoints import Checkpoints
from vllm_replicas import Fleet, Shared

VOTE_S = 6.0
QUICK: dict[str, Any] = {"vote_s": VOTE_S, "stall_timeout": 3, "load_timeout": 10, "wait_for_loading": 5}
LATE_S = 1.0
"""At each of three steps, where the others wait once: far from ``VOTE_S``, also on a slow machine."""
TOO_LATE_S = 1.5 * VOTE_S
"""For the decision, but not for the end: a rank that says nothing there either is lost."""


def target(fleet: Fleet, shared: Shared, checkpoints: Checkpoints, kind: str, *steps: str, **how: Any) -> Any:
    """A replica with weights on disk, one of whose ranks misbehaves at ``steps``."""
    faults = {"rank": 1, "steps": steps, "kind": kind} | how
    extra = QUICK | {"poison": True, "role": "target"}
    return fleet.offline(checkpoints.full("llama"), shared.name("llama", 2), tp=2, extra=extra, faults=faults)


def both_read_the_disk(replica: Any) -> bool:
    return len(replica.lines("Loading weights took")) >= 1 and not replica.lines("weightwire: received")


@pytest.mark.parametrize(("step", "rank"), [("find", 1), ("fill", 0)])
def test_h23_one_fails_both_read_the_disk(
    step: str, rank: int, fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    replica = target(fleet, shared, checkpoints, "fail", step, rank=rank).ready()
    assert len(replica.lines("weightwire: no peer, reading the disk: ")) == 2, replica.tail()
    assert both_read_the_disk(replica), replica.tail()
    assert replica.tokens() == shared.tokens("llama", 2)


def test_h23_one_is_late_at_each_step_both_take_the_peer(
    fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    replica = target(fleet, shared, checkpoints, "late", "find", "construct", "fill", late_s=LATE_S).ready()
    assert len(replica.lines("fault: late at ")) == 3
    assert len(replica.lines("weightwire: received ")) == 2, replica.tail()
    assert replica.tokens() == shared.tokens("llama", 2)


@pytest.mark.parametrize("step", ["fill"])
def test_h23_one_is_too_late_and_obeys_what_was_decided_without_it(
    step: str, fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    replica = target(fleet, shared, checkpoints, "late", step, late_s=TOO_LATE_S).ready()
    assert both_read_the_disk(replica), replica.tail()
    assert replica.tokens() == shared.tokens("llama", 2)


@pytest.mark.parametrize(("step", "kind"), [("construct", "fail"), ("find", "crash"), ("fill", "die")])
def test_h23_one_is_gone_and_the_replica_ends(
    step: str, kind: str, fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    replica = target(fleet, shared, checkpoints, kind, step)
    replica.says(f"fault: {kind} at {step}")
    began = time.monotonic()
    assert replica.ends(60) == 1
    assert time.monotonic() - began < 3 * VOTE_S + 20


@pytest.mark.parametrize("step", ["find", "construct", "fill"])
def test_h23_one_hangs_and_the_replica_ends(step: str, fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    replica = target(fleet, shared, checkpoints, "freeze", step)
    replica.says(f"fault: freeze at {step}")
    began = time.monotonic()
    assert replica.ends(90) == 1
    assert time.monotonic() - began < 4 * VOTE_S + 20
    assert replica.root_causes(), replica.tail()


@pytest.mark.parametrize("rank", [0])
def test_h23_one_is_stopped_at_publishing_and_the_replica_ends(
    rank: int, fleet: Fleet, checkpoints: Checkpoints
) -> None:
    """All its threads, so also the store in which the workers decide, where that is worker 0's."""
    name = f"ranks/publish-stop-{rank}"
    faults = {"rank": rank, "steps": ["publish"], "kind": "stop"}
    replica = fleet.offline(checkpoints.full("llama"), name, tp=2, extra=QUICK | {"role": "source"}, faults=faults)
    replica.says("fault: stop at publish")
    began = time.monotonic()
    assert replica.ends(90) == 1
    assert time.monotonic() - began < 4 * VOTE_S + 20
    assert replica.root_causes(), replica.tail()
    assert fleet.replicas(name) == {}
    assert not replica.lines("weightwire: published "), replica.tail()


@pytest.mark.parametrize("kind", ["fail", "late"])
def test_h23_at_publishing(kind: str, fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    """Who cannot publish serves its users all the same, and no half of it is published (H42)."""
    name = f"ranks/publish-{kind}"
    faults = {"rank": 1, "steps": ["publish"], "kind": kind, "late_s": LATE_S}
    began = time.monotonic()
    extra = QUICK | {"role": "source"}
    replica = fleet.offline(checkpoints.full("llama"), name, tp=2, extra=extra, faults=faults).ready()
    assert time.monotonic() - began < 120
    if kind == "late":
        fleet.only(name, 1, replica)
    else:
        assert replica.lines("weightwire: not published: "), replica.tail()
        assert fleet.replicas(name) == {}
        assert not replica.lines("weightwire: published"), replica.tail()
    assert replica.tokens() == shared.tokens("llama", 2)
