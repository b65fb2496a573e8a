"""What vLLM's models keep beside and do to their weights: it travels, is refused by name, or makes no difference."""

from __future__ import annotations

from typing import Any

from vllm_checkpoints import Checkpoints
from vllm_processes import Offline
from vllm_replicas import Fleet, Shared

BARE = {"on_miss": "fail", "role": "target", "poison": True}


def source(fleet: Fleet, checkpoints: Checkpoints, name: str, model: str = "llama", **how: Any) -> Offline:
    """Published, unless it says that it is not."""
    replica = fleet.offline(checkpoints.full(model), name, extra=how.pop("extra", {}), faults=how).ready()
    if not replica.lines("weightwire: not published: "):
        fleet.until(name, 1, 30, replica)
    return replica


def target(fleet: Fleet, checkpoints: Checkpoints, name: str, model: str = "llama", **faults: Any) -> Offline:
    return fleet.offline(checkpoints.bare(model), name, extra=BARE, faults=faults)


def test_h05_parameter_that_loading_drops(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """A target that still has it would take another kernel: refused, by name."""
    name = "state/dropped"
    source(fleet, checkpoints, name, plants=["optional_dropped"])
    replica = target(fleet, checkpoints, name, plants=["optional"])
    assert replica.ends(120) == 1
    (cause,) = replica.root_causes()
    assert "model.norm.late_scale" in cause


def test_h06_number_that_loading_sets(fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    name = "state/number"
    first = source(fleet, checkpoints, name, plants=["number"])
    second = target(fleet, checkpoints, name).ready()
    assert second.tokens() == first.tokens() != shared.tokens("llama")


def test_h07_references_that_construction_kept(fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    """To what a peer fills: the answers are computed through them, and the memory was poisoned."""
    name = "state/references"
    first = source(fleet, checkpoints, name, plants=["references"])
    second = target(fleet, checkpoints, name, plants=["references"]).ready()
    assert second.lines("weightwire: received "), second.tail()
    assert second.tokens() == first.tokens() == shared.tokens("llama")


def test_h08_unclassified_attribute(fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    """Nothing is published, the tensor is named, users are served."""
    name = "state/undeclared"
    replica = source(fleet, checkpoints, name, plants=["undeclared"])
    (line,) = replica.lines("weightwire: not published: ")
    assert "model.norm.scratch" in line
    assert fleet.replicas(name) == {}
    assert replica.tokens() == shared.tokens("llama")


def test_h09_processing_in_place(fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    """Both sides enlarge their scales once: the source does not offer enlarged ones."""
    name = "state/in-place"
    first = source(fleet, checkpoints, name, "w8a8", plants=["in_place"])
    second = target(fleet, checkpoints, name, "w8a8", plants=["in_place"]).ready()
    assert second.tokens() == first.tokens() != shared.tokens("w8a8")


def test_h10_what_processing_replaces_is_kept_and_counted(
    fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    """INT8 weights are packed and replaced; readers get the raw ones long after."""
    known = shared.source("w8a8")
    line = known.replica.says("(kept a second time: ", 10)
    kept = int(line.partition("(kept a second time: ")[2].partition(" ")[0])
    views = next(iter(fleet.replicas(known.name).values()))
    packed = sum(entry.nbytes for entry in fleet.manifest(views[0]).layout.entries if entry.dtype == "int8")
    assert packed > 0
    assert kept >= packed
    second = target(fleet, checkpoints, known.name, "w8a8").ready()
    assert second.tokens() == known.tokens


def test_h10_what_was_kept_is_released_when_it_is_withdrawn(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """INT8 weights are packed on every CPU, bfloat16 ones on some."""
    name, wide = "state/released", 65536
    model = checkpoints.full("w8a8", intermediate_size=wide)
    replica = fleet.offline(model, name, extra={"role": "source"}).ready()
    fleet.until(name, 1, 30, replica)
    before = replica.tokens()
    line = replica.says("(kept a second time: ", 10)
    kept = int(line.partition("(kept a second time: ")[2].partition(" ")[0])
    assert kept > 3 * 3 * wide * 128, "three layers of three matrices"
    found = replica.withdraw()
    assert found["held"] == 0
    assert found["before"] - found["after"] > 0.9 * kept, found
    assert replica.lines(f"weightwire: {kept} bytes that were kept for readers are released"), replica.tail()
    assert replica.tokens() == before


def test_h12_a_failed_publish_is_not_made_up_for_later(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """The raw stage could not be described; after processing it could, and is not."""
    name = "state/failed"
    extra = {"stages": ["LOADED", "PROCESSED"]}
    faults: dict[str, Any] = {"steps": ["publish"], "kind": "fail", "failures": 1, "plain_linear": True}
    replica = source(fleet, checkpoints, name, extra=extra, **faults)
    assert len(replica.lines("weightwire: not published: ")) == 1
    assert not replica.lines("weightwire: published ")
    assert fleet.sources(name) == []
    assert replica.tokens()


def test_h56_nothing_is_computed_on_bytes_that_will_be_replaced(
    fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    replica = target(fleet, checkpoints, shared.name("llama"), plants=["watch"]).ready()
    watched = replica.lines("watched: ")
    assert watched == ["watched: filled"]
    assert replica.tokens() == shared.tokens("llama")
