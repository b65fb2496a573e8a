"""A target that has configuration and tokenizer only gives its source's answers, model by model."""

from __future__ import annotations

import pytest
from vllm_checkpoints import Checkpoints
from vllm_replicas import Fleet, Offline

from weightwire.types import TensorClass


def source_and_target(
    fleet: Fleet, checkpoints: Checkpoints, kind: str, *, tp: int = 1, **extra: object
) -> tuple[Offline, Offline]:
    """Both ready and published; the target's memory was poisoned first. Checks ids, ways and answers."""
    name = f"models/{kind}-{tp}{'-'.join(map(str, extra.values()))}"
    faults = extra.pop("faults", None)
    source = fleet.offline(checkpoints.full(kind), name, tp=tp, extra=extra, faults=faults).ready()
    fleet.until(name, 1, 30, source)
    given = extra | {"on_miss": "fail", "poison": True}
    target = fleet.offline(checkpoints.bare(kind), name, tp=tp, extra=given, faults=faults).ready()
    fleet.only(name, 2, source, target)
    assert len(source.lines("weightwire: no peer, reading the disk: ")) == tp, source.tail()
    assert len(target.lines("weightwire: received ")) == tp, target.tail()
    assert not target.lines("Loading weights took"), "vLLM's own loader ran too"
    assert target.tokens() == source.tokens()
    return source, target


@pytest.mark.parametrize("kind", ["smollm2", "qwen3", "qwen3_moe", "untied", "w8a8", "w8a8_static"])
def test_target_from_peer(kind: str, fleet: Fleet, checkpoints: Checkpoints) -> None:
    source_and_target(fleet, checkpoints, kind)


def test_two_ranks_over_tcp(fleet: Fleet, checkpoints: Checkpoints) -> None:
    _, target = source_and_target(fleet, checkpoints, "llama", tp=2, transports=["tcp"])
    assert all(" over tcp" in line for line in target.lines("weightwire: received "))


def test_h65_no_kv_cache_in_a_manifest_and_h60_no_runtime_state(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """The source has answered, so its KV cache is bound; what it offers was catalogued before."""
    source_and_target(fleet, checkpoints, "tied")
    for views in fleet.replicas("models/tied-1").values():
        layout = fleet.manifest(views[0]).layout
        names = [name for entry in layout.entries for name in (entry.name, *entry.aliases)]
        assert "model.embed_tokens.weight" in names
        assert not [name for name in names if "kv_cache" in name]
        assert {entry.kind for entry in layout.entries} == {TensorClass.WEIGHT, TensorClass.DERIVED}
        weights = sum(entry.nbytes for entry in layout.entries if entry.kind is TensorClass.WEIGHT)
        file = (checkpoints.full("tied") / "model.safetensors").stat().st_size
        assert file * 0.98 < weights < file * 1.02  # nothing is left out, nothing is there twice


@pytest.mark.parametrize("kind", ["says_tied", "says_tied_is"])
def test_h61_config_says_tied_checkpoint_has_an_lm_head(kind: str, fleet: Fleet, checkpoints: Checkpoints) -> None:
    source, _ = source_and_target(fleet, checkpoints, kind)
    views = next(iter(fleet.replicas(f"models/{kind}-1").values()))
    names = [entry.name for entry in fleet.manifest(views[0]).layout.entries]
    assert "lm_head.weight" in names, source.tail()  # raw bytes: vLLM ties equal ones later, on each side


def test_processed_stage(fleet: Fleet, checkpoints: Checkpoints) -> None:
    """Where vLLM leaves linear weights as tensors, kernel-ready ones can travel."""
    _, target = source_and_target(fleet, checkpoints, "untied", stages=["PROCESSED"], faults={"plain_linear": True})
    assert target.lines("stage PROCESSED")
    assert not target.lines("stage LOADED")


def test_h11_stages_never_meet(fleet: Fleet, checkpoints: Checkpoints) -> None:
    name, plain = "models/stages", {"plain_linear": True}
    source = fleet.offline(checkpoints.full("untied"), name, extra={"stages": ["PROCESSED"]}, faults=plain).ready()
    fleet.until(name, 1, 30, source)
    given = {"stages": ["LOADED"], "on_miss": "fail", "role": "target"}
    target = fleet.offline(checkpoints.bare("untied"), name, extra=given, faults=plain)
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
