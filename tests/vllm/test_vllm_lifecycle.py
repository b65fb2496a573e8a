"""What a replica publishes ends before its bytes change or go."""

from __future__ import annotations

import time
from pathlib import Path

from vllm_checkpoints import Checkpoints
from vllm_replicas import Fleet, Shared

TTL_S = 5.0
"""Of the metadata server (``conftest``): a source that only falls silent stays listed for so long."""
SCRUBBED_S = 60.0
"""A pass of the scrub takes half of that, where nothing is reported."""
DEV = {"VLLM_SERVER_DEV_MODE": "1"}


def gone(fleet: Fleet, name: str, within_s: float) -> float:
    """Seconds until nothing of that name is registered."""
    began = time.monotonic()
    while fleet.sources(name):
        assert time.monotonic() - began < within_s, fleet.sources(name)
        time.sleep(0.05)
    return time.monotonic() - began


def test_reloading_withdraws_first_and_works(fleet: Fleet, checkpoints: Checkpoints) -> None:
    name, other = "lifecycle/reload", checkpoints.full("llama", seed=1)
    server = fleet.api(checkpoints.full("llama"), name, env=DEV).ready()
    fleet.until(name, 1, 30, server)
    before = server.tokens()
    server.ask("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(other)})
    assert gone(fleet, name, TTL_S / 2) < TTL_S / 2
    assert server.lines("this replica no longer serves them")
    server.ask("/reset_prefix_cache")
    after = server.tokens()
    assert after != before
    fresh = fleet.offline(other, f"{name}-fresh", load_format="auto").ready()
    assert after == fresh.tokens()


def test_weights_that_change_without_a_word_are_passed_on_to_nobody(
    fleet: Fleet, shared: Shared, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A reload by an iterator has no hook: who is reading finds it by digest, tells, and the source finds it too."""
    name, gate = "lifecycle/silent", tmp_path / "gate"
    source = fleet.offline(checkpoints.full("llama"), name, extra={"role": "source"}).ready()
    fleet.until(name, 1, 30, source)
    extra, faults = {"role": "target", "poison": True, "stall_timeout": 120}, {"gate": str(gate)}
    target = fleet.offline(checkpoints.full("llama"), name, extra=extra, faults=faults)
    fleet.reading(name, 90, target)
    source.reload(checkpoints.full("llama", seed=1))
    gate.touch()
    target.ready()
    assert target.lines("weightwire: no peer, reading the disk: "), target.tail()
    assert not target.lines("weightwire: received "), target.tail()
    assert target.tokens() == shared.tokens("llama") != source.tokens()
    source.says("is no longer what was published: withdrawing", SCRUBBED_S)
    assert gone(fleet, name, SCRUBBED_S) < SCRUBBED_S
