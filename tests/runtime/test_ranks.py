"""How a process learns which rank it is, and that meeting the others is bounded."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore, Store

from weightwire.errors import ConfigError, RankLost
from weightwire.runtime import RankEnvironment, TpCoordinates, TpGroup, discover_rank, distributed, serve_store

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}


def test_nothing_set_is_one_rank_alone() -> None:
    assert discover_rank({}) == RankEnvironment(rank=0, world_size=1, local_rank=0)


def test_torchrun() -> None:
    assert discover_rank(TORCHRUN) == RankEnvironment(1, 2, 1, "10.0.0.7", 29500)
    elastic = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert discover_rank(elastic) == RankEnvironment(1, 2, 1, "10.0.0.7", 29500, store_is_served=True, attempt=2)


@pytest.mark.parametrize("prefix", ["OMPI_COMM_WORLD", "PMI"])
def test_mpirun_and_pmi(prefix: str) -> None:
    found = discover_rank({f"{prefix}_RANK": "3", f"{prefix}_SIZE": "4", "MASTER_PORT": "1234"})
    assert found == RankEnvironment(3, 4, 3, "127.0.0.1", 1234)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is missing"),
        ({"RANK": None}, "RANK is missing"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1.0"}, "RANK is '1.0'"),
        ({"RANK": ""}, "RANK is ''"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is None for 2 ranks"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "yes"}, "it must be True or False"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "torchrun and pmi name different ranks"),
    ],
)
def test_a_rank_is_never_guessed(changes: dict[str, str | None], words: str) -> None:
    merged = {**TORCHRUN, **changes}
    with pytest.raises(ConfigError, match=words):
        discover_rank({name: value for name, value in merged.items() if value is not None})


def test_one_rank_alone_never_communicates() -> None:
    with TpGroup.single() as group:
        tensor = torch.ones(3)
        assert group.all_reduce(tensor) is tensor
        assert group.all_gather(tensor) == [tensor]
        assert group.broadcast(tensor) is tensor
        group.store.set("decision", "disk")
        assert group.store.get("decision") == b"disk"


def test_a_rank_that_never_comes_is_named_in_time() -> None:
    store = serve_store()
    started = time.monotonic()
    env = RankEnvironment(0, 2, 0, port=store.port, store_is_served=True)
    with pytest.raises(RankLost, match=r"rank 0 of 2 did not meet the others .* within 1 s"):
        TpGroup.connect(env, timeout_s=1)
    assert time.monotonic() - started < 20


def test_an_unconnected_rank_refuses_to_sum() -> None:
    group = TpGroup.offline(TpCoordinates(size=2, rank=0))
    with pytest.raises(RankLost, match="not connected"):
        group.all_reduce(torch.ones(1))


def _both(timeout_s: float) -> list[TpGroup]:
    """Two ranks of one replica, in two threads of this process."""
    store = serve_store()
    environments = [RankEnvironment(rank, 2, 0, port=store.port, store_is_served=True) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda env: TpGroup.connect(env, timeout_s), environments))


def test_stages_hand_on_what_they_computed() -> None:
    first, second = _both(20)
    sent = torch.arange(12.0).view(3, 4).t()
    with ThreadPoolExecutor(1) as pool:
        arrived = pool.submit(second.receive, torch.empty(4, 3), 0)
        first.send(sent, 1)
        assert torch.equal(arrived.result(), sent)
    assert first.part("pp", TpCoordinates(size=2, rank=0)) is first
    alone = first.part("tp", TpCoordinates(size=1, rank=0))
    assert alone is first.part("tp", TpCoordinates(size=1, rank=0))
    assert alone.all_reduce(sent) is sent


def test_a_stage_that_hands_nothing_on_is_waited_for_in_bounds() -> None:
    _first, second = _both(1)
    started = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 of 2 lost the others"):
        second.receive(torch.empty(2), 0)
    assert time.monotonic() - started < 20


def test_ranks_of_a_part_that_do_not_come_are_named_in_time() -> None:
    group = TpGroup(TpCoordinates(size=4, rank=0), HashStore(), None, _meet)
    with pytest.raises(RankLost, match="rank 0 of 4 did not meet the others of tp2/0"):
        group.part("tp2/0", TpCoordinates(size=2, rank=0))


def _meet(store: Store, coordinates: TpCoordinates) -> Any:
    """As ``connect`` does, with a short bound."""
    return distributed._gloo(store, coordinates, "127.0.0.1", timedelta(seconds=1))
