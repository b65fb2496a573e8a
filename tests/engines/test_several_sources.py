"""Replicas that load from several others at once, relays among them: what is slow, wrong, overwritten or large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_fleet import BIG, SLOW, Fleet, Watch, bare, write_bf16

MIB = 1 << 20
ABOVE_MODEL = 96 * MIB
"""What a source or a target may need beyond the model's own memory."""

LARGE: dict[str, Any] = BIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5}
LARGE_BYTES = 160 * MIB
BLIND = SLOW | {"blind": True}
"""A slow source whose own scrub does not find in time what readers are to find."""


def sources(fleet: Fleet, checkpoint: Path, model_id: str, count: int, **options: Any) -> list[Watch]:
    found = [fleet.source(checkpoint, model_id, **options) for _ in range(count)]
    for each in found:
        each.loaded()
    return found


def label(watch: Watch) -> str:
    """How the reports of others name it."""
    return str(watch.said("loaded")["peer"])


def shares(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert report["source"] == "peer", report
    assert sum(share["nbytes"] for share in report["shares"]) == report["nbytes"]
    return {share["peer"]: share for share in report["shares"]}


def test_h48_what_a_load_needs_beyond_the_model_is_bounded_for_source_relay_and_target(
    fleet: Fleet, tmp_path: Path
) -> None:
    checkpoint = write_bf16(tmp_path / "large", LARGE)
    sources(fleet, checkpoint, "large", 2)
    relay, last = (fleet.start(bare(checkpoint), "large") for _ in range(2))
    nbytes = relay.report()["nbytes"]
    assert nbytes == last.report()["nbytes"] > LARGE_BYTES
    for watch in fleet.watches:
        (memory,) = watch.ask("memory", "memory")
        assert int(str(memory["peak"])) < nbytes + ABOVE_MODEL


def test_h29_bytes_overwritten_in_one_of_two_sources_are_taken_from_the_other(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    scribbled, sound = sources(fleet, checkpoints["big"], "one-scribbled", 2, faults=BLIND)
    digest = sound.digest()
    target = fleet.target(bare(checkpoints["big"]), "one-scribbled")
    target.moved("transfer", 0.3)
    scribbled.ask("flip", "flipped", what="weight")
    found = shares(target.report())
    assert found[label(scribbled)]["bad_leaves"] > 0
    assert found[label(scribbled)]["nbytes"] > 0, "what it had delivered before stays"
    assert found[label(sound)]["bad_leaves"] == 0
    assert target.digest() == digest


@pytest.mark.nixl
def test_h46_each_source_s_path_is_named_and_the_slow_one_is_said_to_be(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    pytest.importorskip("nixl")
    both = {"WEIGHTWIRE_TRANSPORTS": "nixl,tcp"}
    (fast,) = sources(fleet, checkpoints["big"], "paths", 1, env=both | {"WEIGHTWIRE_ROLE": "source"}, max_rate=20e6)
    (slow,) = sources(fleet, checkpoints["big"], "paths", 1, max_rate=20e6)
    report = fleet.target(bare(checkpoints["big"]), "paths", env=both).report()
    found = shares(report)
    assert found[label(fast)]["path"].startswith("nixl/")
    assert found[label(slow)]["path"] == "tcp"
    assert len(report["paths"]) == 2
    assert any(label(slow) in line and "tcp instead of nixl" in line for line in report["warnings"]), report["warnings"]
