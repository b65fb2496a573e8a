"""Speculative decoding: a draft is a second model of the replica, with keys of its own, and follows its target."""

from __future__ import annotations

from typing import Any

from vllm_checkpoints import Checkpoints
from vllm_replicas import Fleet, Offline

from weightwire.types import Role

SEED = 7
"""Another model than the target."""


def replica(fleet: Fleet, checkpoints: Checkpoints, name: str, *, bare: bool, **how: Any) -> Offline:
    pick = checkpoints.bare if bare else checkpoints.full
    draft = {"method": "draft_model", "model": str(pick("untied", SEED)), "num_speculative_tokens": 2}
    return fleet.offline(pick("untied"), name, engine={"speculative_config": draft}, **how)


def test_h22_a_draft_has_its_own_key(fleet: Fleet, checkpoints: Checkpoints) -> None:
    name = "drafts/both"
    first = replica(fleet, checkpoints, name, bare=False, extra={"role": "source"}).ready()
    fleet.until(name, 1, 30, first)
    records = [view.record for view in fleet.sources(name)] + [view.record for view in fleet.sources(f"{name}#draft")]
    assert sorted(record.role for record in records) == [Role.DRAFT, Role.TARGET], records
    assert len({record.shard_key for record in records}) == 2
    assert len({record.content_id for record in records}) == 2
    extra = {"on_miss": "fail", "poison": True, "role": "target"}
    second = replica(fleet, checkpoints, name, bare=True, extra=extra).ready()
    assert len(second.lines("weightwire: received ")) == 2, second.tail()
    assert not second.lines("Loading weights took")
    assert second.tokens() == first.tokens()


def test_h37_draft_follows_its_target_to_the_disk(fleet: Fleet, checkpoints: Checkpoints) -> None:
    name = "drafts/disk"
    first = replica(fleet, checkpoints, name, bare=False, extra={"role": "source"}).ready()
    fleet.until(name, 1, 30, first)
    extra, faults = {"poison": True, "role": "target"}, {"corrupt_after": 3}
    second = replica(fleet, checkpoints, name, bare=False, extra=extra, faults=faults).ready()
    assert len(second.lines("weightwire: no peer, reading the disk: ")) == 1, second.tail()
    assert not second.lines("weightwire: received ")
    assert len(second.lines("Loading weights took")) == 2, second.tail()
    assert second.tokens() == first.tokens()
