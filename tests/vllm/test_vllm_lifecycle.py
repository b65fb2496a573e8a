"""What a replica publishes ends before its bytes change or go."""

from __future__ import annotations

import time

from vllm_checkpoints import Checkpoints
from vllm_replicas import Fleet

TTL_S = 10.0
"""Of the metadata server: a source that only falls silent stays listed for so long."""
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
