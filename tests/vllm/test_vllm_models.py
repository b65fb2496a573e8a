"""A target without weight files gives its source's answers, model by model."""

from __future__ import annotations

import pytest
from vllm_checkpoints import Checkpoints
from vllm_replicas import Fleet


@pytest.mark.parametrize("kind", ["smollm2", "llama"])
def test_target_from_peer(kind: str, fleet: Fleet, checkpoints: Checkpoints) -> None:
    source = fleet.offline(checkpoints.full(kind), kind).ready()
    fleet.until(kind, 1, 20, source)
    target = fleet.offline(checkpoints.bare(kind), kind, extra={"on_miss": "fail"}).ready()
    assert target.tokens() == source.tokens()
    source.stop()
    assert target.stop() == 0
