"""Records that are kept by too little, and a load that falls back in its own process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from engine_fleet import Fleet, bare
from metadata_fleet import Fleet as Registered
from naive_models import FAMILIES, identities
from runtime_families import NEW_TOKENS, PROMPTS
from wire_samples import record

from weightwire.identity.identity import Identity
from weightwire.types import Coordinates, Role, Stage
from weightwire.wire.messages import PublicationRecord, PublicationState

READY = PublicationState.READY


def identity(directory: Path, **changes: Any) -> Identity:
    return dataclasses.replace(identities(directory)[Stage.LOADED], **changes)


def published(mine: Identity, coordinates: Coordinates, life: str, port: int) -> PublicationRecord:
    return record(
        shard_key=mine.shard_key(coordinates),
        replica_key=mine.replica_key,
        family_key=mine.family_key,
        identity=mine.canonical_json(),
        coordinates=coordinates,
        role=mine.role,
        incarnation=life,
        replica_incarnation=f"replica-{mine.replica_key[:8]}",
        endpoints=(f"10.0.0.1:{port}",),
        world_size=coordinates.tp_size * coordinates.pp_size,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_h22_a_draft_and_a_pipeline_stage_of_the_same_tensor_rank_have_records_of_their_own(
    name: str, models: dict[str, Path]
) -> None:
    """One model as target, as another one's draft, and in two pipeline stages: four shards of tensor rank 0."""
    whole, draft = identity(models[name]), identity(models[name], role=Role.DRAFT)
    staged = identity(models[name], pp_size=2)
    records = [
        published(whole, Coordinates(), "target", 1000),
        published(draft, Coordinates(), "draft", 1001),
        *(published(staged, Coordinates(pp_rank=at, pp_size=2), f"stage-{at}", 1002 + at) for at in range(2)),
    ]
    naive = {(each.model_id, each.coordinates.tp_rank): each.incarnation for each in records}
    assert list(naive.values()) == ["stage-1"]  # the last one that came overwrote all others
    registered = Registered()
    registered.publish(*records)
    kept = {view.record.shard_key: view.record.incarnation for view in registered.registry.sources("")}
    assert sorted(kept.values()) == ["draft", "stage-0", "stage-1", "target"]
    for each in records:
        assert kept[each.shard_key] == each.incarnation
    for mine, size in ((whole, 1), (draft, 1), (staged, 2)):
        (group,) = registered.find(mine.replica_key).groups
        assert [(offer.replica_key, offer.world_size) for offer in group.replicas] == [(mine.replica_key, size)]


@pytest.mark.parametrize(("name", "stage"), [("deepseek_v3", "PROCESSED"), ("qwen3_moe", "LOADED")])
def test_h37_a_load_that_goes_on_with_its_disk_publishes_what_that_has(
    name: str, stage: str, fleet: Fleet, models: dict[str, Path]
) -> None:
    """The peer's bytes arrive changed; the model that they were for is filled from the disk, and is a source then."""
    model_id = f"fallen-{name}"
    given: dict[str, Any] = {"dtype": "float32", "kernel_layout": "packed", "publish_stage": stage}
    stages = {"WEIGHTWIRE_STAGES": stage}
    donor = fleet.source(models[name], model_id, **given)
    donor.loaded()
    fallen = fleet.start(models[name], model_id, env=stages, faults={"corrupt": True, "poison": True}, **given)
    (loaded,) = fallen.loaded()
    assert loaded["report"]["source"] == "disk"
    assert "does not have its digest" in str(loaded["report"])
    assert loaded["published"]["published"]
    assert fallen.digest() == donor.digest()
    # one record each, none twice; the server hears of it a little later
    fleet.eventually(model_id, lambda views: [view.record.state for view in views] == [READY, READY], 30)
    fleet.end(donor)
    fleet.eventually(model_id, lambda views: len(views) == 1, 30)
    third = fleet.target(bare(models[name]), model_id, env=stages, **given)
    assert third.report()["source"] == "peer"
    assert third.digest() == fallen.digest()
    tokens = fallen.replica.generate(PROMPTS, NEW_TOKENS)
    assert third.replica.generate(PROMPTS, NEW_TOKENS) == tokens
