"""What a load that failed half way leaves behind in the process that goes on."""

from __future__ import annotations

from pathlib import Path

from engine_fleet import SLOW, Fleet

MODEL_BYTES = 40 << 20


def test_h53_a_failed_load_is_let_go_of_before_the_next(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    source = fleet.source(checkpoints["big"], "memory", faults=SLOW)
    source.loaded()
    target = fleet.target(checkpoints["big"], "memory")
    target.moved("transfer", 0.5)
    source.ask("flip", "flipped", what="weight")
    report = target.report()
    assert report["source"] == "disk"
    assert sum(share["nbytes"] for share in report["shares"]) > 0.4 * MODEL_BYTES
    (memory,) = target.ask("memory", "memory")
    assert MODEL_BYTES * 0.9 < int(str(memory["now"])) < MODEL_BYTES * 1.5
    assert int(str(memory["peak"])) < MODEL_BYTES * 1.7
