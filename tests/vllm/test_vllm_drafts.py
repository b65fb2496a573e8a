"""Speculative decoding: a draft is a second model of the replica, with keys of its own, and follows its target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm_checkpoints import Checkpoints
from vllm_processes import Offline
from vllm_replicas import Fleet, Place

from weightwire.types import Role

NAME = "drafts/both"
SEED = 7
"""Another model than the target."""


def replica(fleet: Fleet, checkpoints: Checkpoints, *, bare: bool, name: str = NAME, **how: Any) -> Offline:
    pick = checkpoints.bare if bare else checkpoints.full
    draft = {"method": "draft_model", "model": str(pick("untied", SEED)), "num_speculative_tokens": 2}
    return fleet.offline(pick("untied"), name, engine={"speculative_config": draft}, **how)


@pytest.fixture(scope="module")
def source(place: Place, checkpoints: Checkpoints) -> Iterator[Offline]:
    """Both its models are read from the disk and published."""
    fleet = Fleet(place)
    try:
        first = replica(fleet, checkpoints, bare=False, extra={"role": "source"}).ready()
        fleet.until(NAME, 1, 30, first)
        yield first
    finally:
        fleet.kill()


def test_h22_a_draft_has_its_own_key(source: Offline, fleet: Fleet, checkpoints: Checkpoints) -> None:
    records = [view.record for view in fleet.sources(NAME)] + [view.record for view in fleet.sources(f"{NAME}#draft")]
    assert sorted(record.role for record in records) == [Role.DRAFT, Role.TARGET], records
    assert len({record.shard_key for record in records}) == 2
    assert len({record.content_id for record in records}) == 2
    second = replica(fleet, checkpoints, bare=True, extra={"on_miss": "fail", "poison": True, "role": "target"}).ready()
    assert len(second.lines("weightwire: received ")) == 2, second.tail()
    assert not second.lines("Loading weights took")
    assert second.tokens() == source.tokens()


def test_h37_draft_follows_its_target_to_the_disk(source: Offline, fleet: Fleet, checkpoints: Checkpoints) -> None:
    extra, faults = {"poison": True, "role": "target"}, {"corrupt_after": 3}
    second = replica(fleet, checkpoints, bare=False, extra=extra, faults=faults).ready()
    assert len(second.lines("weightwire: no peer, reading the disk: ")) == 1, second.tail()
    assert not second.lines("weightwire: received ")
    assert len(second.lines("Loading weights took")) == 2, second.tail()
    assert second.tokens() == source.tokens()


def test_h22_both_models_of_two_workers(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """Four shards, four keys; each worker takes its two."""
    name = "drafts/two"
    first = replica(fleet, checkpoints, bare=False, name=name, tp=2, extra={"role": "source"}).ready()
    for each in (name, f"{name}#draft"):
        fleet.until(each, 1, 30, first)
    records = [view.record for each in (name, f"{name}#draft") for view in fleet.sources(each)]
    assert sorted((record.role, record.coordinates.tp_rank) for record in records) == [
        (role, rank) for role in sorted((Role.DRAFT, Role.TARGET)) for rank in (0, 1)
    ]
    assert len({record.shard_key for record in records}) == len({record.content_id for record in records}) == 4
    extra = {"on_miss": "fail", "poison": True, "role": "target"}
    second = replica(fleet, checkpoints, bare=True, name=name, tp=2, extra=extra).ready()
    assert len(second.lines("weightwire: received ")) == 4, second.tail()
    assert not second.lines("Loading weights took")
    assert second.tokens() == first.tokens()
