"""The raw stage and the kernel-ready one, between replicas; transforms under a reader's eyes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_fleet import SLOW, Fleet, bare

from weightwire.errors import LoadError

PACKED: dict[str, Any] = {"kernel_layout": "packed"}
SLOW_TRANSFORMS = SLOW | {"transform_s": 0.1}


def test_h09_h10_h66_a_source_transforms_itself_under_a_reader(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    source = fleet.source(checkpoints["big"], "packed", faults=SLOW_TRANSFORMS, **PACKED)
    fleet.eventually("packed", lambda views: len(views) == 1)
    target = fleet.target(bare(checkpoints["big"]), "packed")  # plain: raw bytes do not depend on the kernel's layout
    plain = fleet.source(checkpoints["big"], "plain", **PACKED | {"kernel_layout": "plain"})
    report = target.report()
    (loaded,) = source.loaded()
    plain.loaded()
    assert report["source"] == "peer"
    under_eyes = [event for event in source.events if event["event"] == "transformed" and event["readers"]]
    assert {event["module"] for event in under_eyes} == {"QkvLinear", "GateUpLinear"}
    assert target.digest() == plain.digest()
    assert report["content_id"] == loaded["published"]["content_id"] == plain.digest()[0][0]
    assert target.tokens() == source.tokens() == plain.tokens()
    # qkv (1024 rows) is kept as it was, gate and up (2752 rows) were replaced: 5 layers, 512 columns, bfloat16
    assert loaded["published"]["held"] == 5 * (1024 + 2752) * 512 * 2
    (withdrawn,) = source.ask("withdraw", "withdrawn")
    assert int(str(withdrawn["freed"])) > 0.9 * loaded["published"]["held"]
    assert source.tokens() == plain.tokens()


def test_h09_without_the_guard_the_reader_refuses_the_mix(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    fleet.source(checkpoints["big"], "unguarded", faults=SLOW_TRANSFORMS | {"unguarded": True}, **PACKED)
    fleet.eventually("unguarded", lambda views: len(views) == 1)
    target = fleet.target(bare(checkpoints["big"]), "unguarded")
    with pytest.raises(LoadError, match="does not have its digest"):
        target.loaded()


def test_h11_a_processed_source_is_for_those_who_want_it(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    processed = PACKED | {"publish_stage": "PROCESSED"}
    source = fleet.source(checkpoints["small"], "ready-made", **processed)
    source.loaded()
    empty = bare(checkpoints["small"])
    raw = fleet.target(empty, "ready-made", env={"WEIGHTWIRE_STAGES": "LOADED"}, **PACKED)
    other = fleet.target(empty, "ready-made", env={"WEIGHTWIRE_STAGES": "PROCESSED"})
    same = fleet.start(empty, "ready-made", env={"WEIGHTWIRE_STAGES": "PROCESSED"}, **processed)
    with pytest.raises(LoadError, match=r"of this model there is: .*PROCESSED \(READY\)"):
        raw.loaded()
    with pytest.raises(LoadError, match="under another identity"):  # another kernel layout
        other.loaded()
    (loaded,) = same.loaded()
    assert (loaded["report"]["source"], loaded["report"]["stage"]) == ("peer", "PROCESSED")
    assert loaded["published"]["published"]
    assert same.digest() == source.digest()
    assert same.tokens() == source.tokens()


def test_h12_a_publish_that_failed_early_is_told_and_not_made_up_for(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    (loaded,) = fleet.source(checkpoints["small"], "early", faults={"unclassified": True}, **PACKED).loaded()
    published = loaded["published"]
    assert (published["stage"], published["attempted"], published["published"]) == ("LOADED", True, False)
    assert "scratch is a tensor of no class" in published["reason"]
    assert fleet.sources("early") == []


def test_h35_what_cannot_be_registered_is_never_ready(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    (loaded,) = fleet.source(checkpoints["small"], "unregistered", faults={"unregistered": True}).loaded()
    published = loaded["published"]
    assert not published["published"]
    assert "tcp: out of registrable memory" in published["reason"]
    assert fleet.sources("unregistered") == []
