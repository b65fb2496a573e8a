from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.errors import ConfigError
from weightwire.runtime.mapping import WHOLE, Mapping, TpCoordinates, effective_tp, replicated_tp, shard_range


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tp_size": 3}, "is not the world size"),
        ({"tp_rank": 0}, "contradicts its coordinates"),
        ({"rank": 4, "tp_rank": 4}, "world rank 4 is not in 0..3"),
        ({"ep_size": 0}, "ep size is 0"),
        ({"ep_rank": 1}, "ep rank 1 is not in 0..0"),
        ({"tp_rank": True}, "tp rank is True"),
        ({"world_size": "4"}, "world size is '4'"),
        ({"pp_size": 2}, "is not the world size"),
        ({"tp_size": 2, "pp_size": 2, "pp_rank": 1}, "contradicts its coordinates"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], words: str) -> None:
    fields: dict[str, Any] = {"world_size": 4, "rank": 1, "tp_size": 4, "tp_rank": 1}
    Mapping(**fields)
    with pytest.raises(ConfigError, match=words):
        Mapping(**{**fields, **changes})


def test_ranks_count_tensor_parallel_fastest() -> None:
    assert Mapping(world_size=8, rank=6, tp_size=2, tp_rank=0, pp_size=2, pp_rank=1, dp_size=2, dp_rank=1).tp.rank == 0
    assert Mapping.for_tp(2, 3).tp == TpCoordinates(size=3, rank=2)


def test_a_rank_of_a_pipeline_counts_tensors_first() -> None:
    mapping = Mapping.of_rank(5, 8, pp_size=2, ep_size=2)
    assert (mapping.pp, mapping.tp) == (TpCoordinates(size=2, rank=1), TpCoordinates(size=4, rank=1))
    assert (mapping.moe_tp, mapping.moe_ep) == (TpCoordinates(size=2, rank=0), TpCoordinates(size=2, rank=1))
    assert (mapping.first_stage, mapping.last_stage) == (False, True)
    with pytest.raises(ConfigError, match="8 ranks cannot be shared by 3 pipeline stages"):
        Mapping.of_rank(0, 8, pp_size=3)


@given(layers=st.integers(1, 40), size=st.integers(1, 8))
def test_stages_hold_every_layer_once_and_about_as_many(layers: int, size: int) -> None:
    stages = [Mapping.of_rank(rank, size, pp_size=size) for rank in range(size)]
    if layers < size:
        with pytest.raises(ConfigError, match=f"use at most {layers} stages"):
            stages[0].pp_layers(layers)
        return
    held = [stage.pp_layers(layers) for stage in stages]
    assert [layer for each in held for layer in each] == list(range(layers))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_attention_data_parallel_cuts_experts_alone() -> None:
    mapping = Mapping.of_rank(3, 4, ep_size=2, attention_dp=True)
    assert mapping.attention_tp == WHOLE
    assert (mapping.moe_tp, mapping.moe_ep) == (TpCoordinates(size=2, rank=1), TpCoordinates(size=2, rank=1))


def test_h18_presharded_is_an_argument_of_one_call() -> None:
    mapping = Mapping.for_tp(1, 2)
    assert effective_tp(mapping, presharded=True) == WHOLE
    assert effective_tp(mapping, presharded=False) == TpCoordinates(size=2, rank=1)
    assert effective_tp(mapping.tp, presharded=True) == WHOLE
    assert effective_tp(mapping.tp, presharded=False) == mapping.tp


@given(width=st.integers(0, 200), size=st.integers(1, 16))
def test_shards_cover_a_width_once_and_in_order(width: int, size: int) -> None:
    ranges = [shard_range(width, TpCoordinates(size=size, rank=rank)) for rank in range(size)]
    assert [index for start, stop in ranges for index in range(start, stop)] == list(range(width))
    assert all(stop - start <= -(-width // size) for start, stop in ranges)


def test_heads_are_replicated_where_ranks_outnumber_them() -> None:
    of_four = [replicated_tp(TpCoordinates(size=4, rank=rank), 2) for rank in range(4)]
    assert [one.rank for one in of_four] == [0, 0, 1, 1]
    assert {one.size for one in of_four} == {2}
    enough = TpCoordinates(size=2, rank=1)
    assert replicated_tp(enough, 2) is enough
    assert replicated_tp(WHOLE, 2) == WHOLE
