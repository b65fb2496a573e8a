"""A refresh of two workers, one of which goes wrong: no answer is ever computed with a mix of weights (hazard H23)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from vllm_checkpoints import Checkpoints
from vllm_moves import LIMIT_S, NEW, answers, move, server, source
from vllm_processes import PROMPTS, Offline
from vllm_replicas import Fleet, Place

from weightwire.engines.vllm.rollout import Gone, Refused

NAME = "refresh ranks"
QUICKER = {"vote_s": 3.0, "load_timeout": 5}


@pytest.fixture(scope="module")
def newer(place: Place, checkpoints: Checkpoints) -> Iterator[Offline]:
    """What servers shall move to; another revision, so that none of them starts from it."""
    fleet = Fleet(place)
    try:
        yield source(fleet, checkpoints.full("llama", NEW), NAME, tp=2, count=1)
    finally:
        fleet.kill()


def test_h23_one_of_two_workers_fails_and_both_keep_the_old_weights(
    newer: Offline, fleet: Fleet, checkpoints: Checkpoints
) -> None:
    """Until it does not fail any more."""
    failures = 2
    faults = {"rank": 0, "steps": ["fill"], "kind": "fail", "failures": failures}
    replica = server(fleet, checkpoints.full("llama"), NAME, tp=2, faults=faults)
    old = answers(replica)
    for _ in range(failures):  # vLLM's workers and their executor still agree on what is an answer to what
        with pytest.raises(Refused, match="rank 0: "):
            move(replica, ordinal=2)
        assert answers(replica) == old
    move(replica, fleet, ordinal=2)
    assert answers(replica) == answers(newer) != old
    fleet.only(NAME, 2, replica)


def test_h23_one_hangs_while_it_stages_and_both_keep_the_old_weights_then_in_the_swap_and_nobody_answers(
    newer: Offline, fleet: Fleet, checkpoints: Checkpoints
) -> None:
    faults = {"rank": 1, "steps": ["fill", "swap"], "kind": "freeze", "failures": 1}
    replica = server(fleet, checkpoints.full("llama"), NAME, tp=2, extra=QUICKER, faults=faults)
    old = answers(replica)
    began = time.monotonic()
    with pytest.raises(Refused):
        move(replica, fleet, ordinal=2)
    assert time.monotonic() - began < 2 * LIMIT_S
    assert replica.lines("fault: freeze at fill")
    assert answers(replica) == old != answers(newer)
    with pytest.raises(Gone, match="the swap did not end"):
        move(replica, fleet, ordinal=2, swap_s=3.0)
    assert replica.lines("fault: freeze at swap")
    with pytest.raises(OSError, match="timed out"):
        replica.ask("/v1/completions", timeout=3.0, model="m", prompt=PROMPTS[0], max_tokens=1)


def test_h23_one_is_killed_while_it_stages_and_the_server_ends(
    newer: Offline, fleet: Fleet, checkpoints: Checkpoints
) -> None:
    del newer
    faults = {"rank": 1, "steps": ["fill"], "kind": "die"}
    replica = server(fleet, checkpoints.full("llama"), NAME, tp=2, faults=faults)
    began = time.monotonic()
    with pytest.raises(Gone, match="the server ended while it staged"):
        move(replica, fleet, ordinal=2)
    assert replica.lines("fault: die at fill")
    replica.ends(LIMIT_S)
    assert time.monotonic() - began < LIMIT_S


def test_h23_one_is_killed_in_the_swap_and_nobody_answers(
    newer: Offline, fleet: Fleet, checkpoints: Checkpoints
) -> None:
    """vLLM ends its engine; its front end waits for the caller of the swap, unhealthy, with its port closed."""
    del newer
    faults = {"rank": 1, "steps": ["swap"], "kind": "die"}
    replica = server(fleet, checkpoints.full("llama"), NAME, tp=2, faults=faults)
    with pytest.raises(Gone):
        move(replica, fleet, ordinal=2, swap_s=3.0)
    assert replica.lines("fault: die at swap")
    replica.says("died unexpectedly", 10)
    replica.says("[shutdown] API server: shutdown triggered", LIMIT_S)
    replica.wait_for(lambda: not replica.healthy(), LIMIT_S, what="being unhealthy")  # a moment after it said so
    with pytest.raises((AssertionError, OSError)):
        replica.tokens()
