"""A running server moves to other published weights, or stays as it is: told by its answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm_checkpoints import Checkpoints
from vllm_moves import LIMIT_S, NEW, READ_S, answers, move, server, source
from vllm_replicas import Fleet

from weightwire.engines.vllm import rollout
from weightwire.engines.vllm.rollout import Gone, Refused


def test_refresh_or_stay(fleet: Fleet, checkpoints: Checkpoints) -> None:
    name = "refresh"
    replica = server(fleet, checkpoints.full("tied"), name, faults={"read_s": READ_S})
    old = answers(replica)
    with pytest.raises(Refused, match=r"no replica offers ordinal 2 \(offered: ordinal 1\)"):
        move(replica, ordinal=2)
    with pytest.raises(Refused, match="nothing newer than ordinal 1 is offered"):
        move(replica, fleet, latest=True)
    replica.ask("/start_weight_update")
    with pytest.raises(AssertionError, match="weightwire: update_info holds an unknown key 'ordinl'; give"):
        replica.ask("/update_weights", update_info={"ordinl": 2})
    assert answers(replica) == old

    killed = source(fleet, checkpoints.full("tied", NEW), name)
    new = answers(killed)
    assert new[0] != old[0]
    assert new[1] != old[1]
    with ThreadPoolExecutor(1) as pool:
        staging = pool.submit(rollout.main, ["--url", replica.url, "--ordinal", "2"])
        replica.says("weightwire: reading into", LIMIT_S)
        fleet.kill(killed)
        assert staging.result(LIMIT_S) == 1
    assert answers(replica) == old

    again = source(fleet, checkpoints.full("tied", NEW), name)
    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(move, replica, fleet, latest=True)
        replica.wait_for(lambda: len(replica.lines("weightwire: reading into")) > 1, LIMIT_S, what="reading")
        assert replica.tokens(tokens=4) == [one[:4] for one in old[0]]
        assert not replica.lines("weightwire: staged "), "it answered only when its weights had arrived"
        assert moving.result(LIMIT_S)["paused"] < LIMIT_S
    assert answers(replica) == new
    fleet.only(name, 2, replica)  # it offers what it has now
    fleet.kill(again)
    target = fleet.offline(checkpoints.bare("tied"), name, extra={"on_miss": "fail", "revision": "r2"})
    with pytest.raises(Refused, match="nothing newer than ordinal 2"):
        move(replica, latest=True)
    move(replica, ordinal=2)  # held already: nothing to do
    assert answers(target.ready()) == new == answers(replica)


@pytest.mark.parametrize("kind", ["qwen3_moe", "w8a8_static", "says_tied"])
def test_kernels_use_the_new_weights(kind: str, fleet: Fleet, checkpoints: Checkpoints) -> None:
    name = f"refresh {kind}"
    replica = server(fleet, checkpoints.full(kind), name)
    newer = source(fleet, checkpoints.full(kind, NEW), name)
    move(replica, ordinal=2)
    assert replica.tokens() == newer.tokens()


def test_h61_an_embedding_that_vllm_tied_stays_tied(fleet: Fleet, checkpoints: Checkpoints) -> None:
    name = "refresh retied"
    replica = server(fleet, checkpoints.full("says_tied_is"), name)
    old = answers(replica)
    source(fleet, checkpoints.full("says_tied", NEW), name)
    with pytest.raises(Refused, match="share memory here and differ in the new weights"):
        move(replica, ordinal=2)
    assert answers(replica) == old
    newer = source(fleet, checkpoints.full("says_tied_is", NEW), name, ordinal=3)
    move(replica, ordinal=3)
    assert answers(replica) == answers(newer)


def test_a_swap_that_fails_half_way_ends_the_server(fleet: Fleet, checkpoints: Checkpoints) -> None:
    name = "refresh in part"
    engine = {"--worker-extension-cls": "vllm_swap_fault.Extension"}
    replica = server(fleet, checkpoints.full("tied"), name, engine=engine)
    source(fleet, checkpoints.full("tied", NEW), name)
    with pytest.raises(Gone):
        move(replica, ordinal=2)
    assert replica.lines("weightwire: the weights were swapped in part (made to fail)"), replica.tail()
    with pytest.raises((AssertionError, OSError)):
        replica.tokens()
    replica.ends(LIMIT_S)
