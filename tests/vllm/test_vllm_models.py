"""A target that has configuration and tokenizer only gives its source's answers, model by model."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_checkpoints import Checkpoints
from vllm_processes import Offline
from vllm_replicas import Fleet, Known, Shared

from weightwire.manifest.records import Layout
from weightwire.types import TensorClass

PLAIN = {"plain_linear": True}


def filled(fleet: Fleet, source: Known, bare: Any, *, tp: int = 1, **how: Any) -> Offline:
    """A target whose memory was poisoned first, with its source's content ids, weights id and answers."""
    extra = {"on_miss": "fail", "poison": True} | how.pop("extra", {})
    target = fleet.offline(bare, source.name, tp=tp, extra=extra, **how).ready()
    fleet.only(source.name, 2, source.replica, target)
    assert len(source.replica.lines("weightwire: no peer, reading the disk: ")) == 0, "sources do not ask"
    assert len(target.lines("weightwire: received ")) == tp, target.tail()
    assert not target.lines("Loading weights took"), "vLLM's own loader ran too"
    assert target.tokens() == source.tokens
    return target


def layout(fleet: Fleet, name: str) -> Layout:
    return fleet.manifest(next(iter(fleet.replicas(name).values()))[0]).layout


@pytest.mark.parametrize("kind", ["smollm2", "llama", "qwen3", "qwen3_moe", "w8a8", "w8a8_static"])
def test_target_from_peer(kind: str, fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    filled(fleet, shared.source(kind), checkpoints.bare(kind))


def test_the_loader_that_the_operator_names_reads_the_disk(
    fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    source = shared.source("llama")
    extra = {"role": "source", "fallback_load_format": "runai_streamer"}
    replica = fleet.offline(checkpoints.full("llama"), source.name, extra=extra).ready()
    assert replica.lines("Loading safetensors using Runai Model Streamer"), replica.tail()
    fleet.only(source.name, 2, source.replica, replica)
    assert replica.tokens() == source.tokens


def test_two_ranks_over_tcp(fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    extra = {"transports": ["tcp"]}
    target = filled(fleet, shared.source("llama", tp=2), checkpoints.bare("llama"), tp=2, extra=extra)
    assert all(" over tcp" in line for line in target.lines("weightwire: received "))


def test_h65_no_kv_cache_in_a_manifest_and_h60_no_runtime_state(
    fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    """Both have answered, so their KV caches are bound; what they offer was catalogued before."""
    source = shared.source("tied")
    filled(fleet, source, checkpoints.bare("tied"))
    for views in fleet.replicas(source.name).values():
        found = fleet.manifest(views[0]).layout
        names = [name for entry in found.entries for name in (entry.name, *entry.aliases)]
        assert "model.embed_tokens.weight" in names
        assert not [name for name in names if "kv_cache" in name]
        assert {entry.kind for entry in found.entries} == {TensorClass.WEIGHT, TensorClass.DERIVED}
        weights = sum(entry.nbytes for entry in found.entries if entry.kind is TensorClass.WEIGHT)
        file = (checkpoints.full("tied") / "model.safetensors").stat().st_size
        assert file * 0.98 < weights < file * 1.02  # nothing is left out, nothing is there twice


@pytest.mark.parametrize("kind", ["says_tied", "says_tied_is"])
def test_h61_config_says_tied_checkpoint_has_an_lm_head(
    kind: str, fleet: Fleet, shared: Shared, checkpoints: Checkpoints
) -> None:
    source = shared.source(kind)
    filled(fleet, source, checkpoints.bare(kind))
    # raw bytes: vLLM ties equal ones later, on each side
    assert "lm_head.weight" in [entry.name for entry in layout(fleet, source.name).entries]


@pytest.mark.parametrize("tp", [1, 2])
def test_processed_stage(tp: int, fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    """Where vLLM leaves linear weights as tensors, kernel-ready ones can travel."""
    source = shared.source("llama", tp=tp, processed=True)
    extra = {"stages": ["PROCESSED"]}
    target = filled(fleet, source, checkpoints.bare("llama"), tp=tp, extra=extra, faults=PLAIN)
    assert target.lines("stage PROCESSED")
    assert not target.lines("stage LOADED")
    assert source.tokens == shared.tokens("llama", tp)


def test_h11_stages_never_meet(fleet: Fleet, shared: Shared, checkpoints: Checkpoints) -> None:
    source = shared.source("llama", processed=True)
    extra = {"stages": ["LOADED"], "on_miss": "fail", "role": "target"}
    target = fleet.offline(checkpoints.bare("llama"), source.name, extra=extra, faults=PLAIN)
    assert target.ends(120) == 1
    (cause,) = target.root_causes()
    assert "PROCESSED" in cause, cause
    assert not target.lines("weightwire: received")


def test_processed_stage_is_declined_where_weights_vanish(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """On this CPU vLLM's INT8 method drops its scales when it packs its weights, whatever it declares."""
    name = "models/vanishing"
    source = fleet.offline(checkpoints.full("w8a8"), name, extra={"stages": ["PROCESSED"]}).ready()
    source.says("weightwire: the processed stage is not published: ", 10)
    assert not fleet.sources(name)
    assert source.tokens()
