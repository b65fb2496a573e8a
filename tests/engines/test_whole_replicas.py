"""One replica loads from another, all the way: its tensors hold afterwards what the source read from the disk."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_fleet import Fleet, Watch, bare, write_bf16
from safetensors.torch import load_file, save_file

from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.replica import Replica
from weightwire.errors import LoadError


@dataclass
class Pair:
    """Two ranks each: a source with a tied, biased model whose vocabulary does not divide by two, and its target."""

    source: Watch
    target: Watch
    checkpoint: Path


@pytest.fixture(scope="module")
def pair(crew: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    changes = {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4}
    checkpoint = write_bf16(root / "tied", changes, seed=5)
    source = crew.source(checkpoint, "pair", tp=2)
    source.loaded()
    target = crew.start(bare(checkpoint), "pair", tp=2, faults={"poison": True})
    target.loaded()
    return Pair(source, target, checkpoint)


def test_h01_h02_h17_every_tensor_of_every_rank_is_the_sources(pair: Pair) -> None:
    assert pair.target.digest() == pair.source.digest()
    assert pair.target.tokens() == pair.source.tokens()
    assert len({content for content, _ in pair.target.digest()}) == 2  # each rank has its own shard


def test_h56_nothing_is_computed_on_bytes_that_will_be_replaced(pair: Pair) -> None:
    assert [event["untouched"] for event in pair.target.events if event["event"] == "filling"] == [True, True]


def test_h60_h65_what_users_said_is_never_published(pair: Pair) -> None:
    said = pair.source.tokens()  # the caches hold these tokens' keys and values now
    before = pair.source.digest()
    names = pair.source.ask("digest", "digest")[0]["names"]
    assert isinstance(names, list)
    assert not [name for name in names if "cache" in str(name) and "cos_sin" not in str(name)]
    first = [event["published"] for event in pair.source.events if event["event"] == "loaded"]
    again = pair.source.ask("republish", "republished")
    assert [event["nbytes"] for event in again] == [event["nbytes"] for event in first if isinstance(event, dict)]
    assert [event["content_id"] for event in again] == [content for content, _ in before]
    assert pair.source.tokens() == said


def test_h18_a_reload_with_whole_tensors_cuts_them_again(pair: Pair, fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.url
    changes = {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4}
    other = write_bf16(tmp_path / "other", changes, seed=6)
    mine, tokens = pair.target.digest(), pair.target.tokens()
    pair.target.ask("reload", "reloaded", model=str(other))
    assert [content for content, _ in pair.target.digest()] != [content for content, _ in mine]
    pair.target.ask("reload", "reloaded", model=str(pair.checkpoint))
    assert pair.target.digest() == mine
    assert pair.target.tokens() == tokens


def test_h61_a_target_without_files_unties_what_the_sources_files_untied(fleet: Fleet, tmp_path: Path) -> None:
    checkpoint = write_bf16(tmp_path / "untied", {"tie_word_embeddings": True}, seed=7)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    source = fleet.source(checkpoint, "untied")
    source.loaded()
    target = fleet.target(bare(checkpoint), "untied")
    assert target.report()["source"] == "peer"
    assert target.digest() == source.digest()
    assert target.tokens() == source.tokens()


def test_h57_other_weights_under_one_name_are_refused_until_one_is_named(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    one = fleet.source(checkpoints["small"], "forked")
    two = fleet.source(checkpoints["other"], "forked")
    for each in (one, two):
        each.loaded()
    (published,) = [event["published"] for event in two.events if event["event"] == "loaded"]
    assert isinstance(published, dict)
    empty = bare(checkpoints["small"])
    undecided = fleet.target(empty, "forked")
    pinned = fleet.target(empty, "forked", weights_id=published["weights_id"])
    elsewhere = fleet.target(empty, "forked", revision="r2")
    with pytest.raises(LoadError, match="2 different weights are ready under one identity"):
        undecided.loaded()
    with pytest.raises(LoadError, match="not revision r2"):
        elsewhere.loaded()
    assert pinned.report()["source"] == "peer"
    assert pinned.digest() == two.digest() != one.digest()


@pytest.mark.nixl
def test_h45_h70_real_nixl_between_real_ranks_that_leave_with_the_code_they_meant(
    fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    pytest.importorskip("nixl")
    env = fleet.environment() | {"WEIGHTWIRE_TRANSPORTS": "nixl"}
    options: dict[str, Any] = {"model_id": "nixl", "revision": "r1", "load_format": "presharded"}
    command = (sys.executable, "-m", "weightwire.engines.native.rank")
    with Replica(ReplicaOptions(model=str(checkpoints["big"]), **options), env, command=command) as source:
        source.loaded(90)
        with Replica(ReplicaOptions(model=str(bare(checkpoints["big"])), **options), env, command=command) as target:
            (loaded,) = target.loaded(90)
            report = loaded["report"]
            assert isinstance(report, dict)
            assert report["source"] == "peer"
            assert str(report["paths"]).startswith("['nixl/")
            assert target.generate([[1, 2, 3]], 4) == source.generate([[1, 2, 3]], 4)
            codes = target.stop() + source.stop()
    assert codes == [0, 0]
