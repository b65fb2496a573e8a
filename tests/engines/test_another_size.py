"""A replica fills itself from one with another number of ranks, and holds then what the disk would have given it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_fleet import BIG, SLOW, Fleet, Watch, bare, write_bf16

from weightwire.errors import LoadError

# neither the vocabulary (97) nor the inner width (90) divides by four
ODD: dict[str, Any] = {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True}
THIRDS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "mlp_bias": True}
ANY = {"max_amplification": 100.0}


def reports(watch: Watch) -> list[dict[str, Any]]:
    return [event["report"] for event in watch.loaded()]


@pytest.mark.parametrize(
    ("have", "want", "changes", "options"),
    [(2, 1, ODD, {}), (1, 2, ODD, {}), (2, 4, ODD, ANY), (3, 1, THIRDS, {})],
    ids=["2-1", "1-2", "2-4", "3-1"],
)
def test_a_replica_of_another_size_holds_what_the_disk_would_have_given_it(
    fleet: Fleet, tmp_path: Path, have: int, want: int, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    name = f"from{have}to{want}"
    checkpoint = write_bf16(tmp_path / "model", changes, seed=9)
    source = fleet.source(checkpoint, name, tp=have)
    same = fleet.source(checkpoint, f"{name}-disk", tp=want, load_format="auto")
    source.loaded()
    target = fleet.start(bare(checkpoint), name, tp=want, faults={"poison": True}, **options)
    for report in reports(target):
        assert (report["source"], report["verified"], report["resharded_from"]) == ("peer", True, have)
        assert 1 <= report["amplification"] <= (100 if options else 2)
        assert f"resharded from TP={have}" in str(report["warnings"])
    assert [event["untouched"] for event in target.events if event["event"] == "filling"] == [True] * want
    same.loaded()
    assert target.digest() == same.digest()
    assert target.tokens() == same.tokens()


@dataclass
class Pair:
    """A replica of two ranks, and one of one rank that read the same checkpoint under another name."""

    first: Watch
    same: Watch
    checkpoint: Path


@pytest.fixture(scope="module")
def pair(crew: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    checkpoint = write_bf16(tmp_path_factory.mktemp("pair") / "model", BIG, seed=4)
    first = crew.source(checkpoint, "pair-of-two", tp=2)
    same = crew.source(checkpoint, "pair-of-one")
    for each in (first, same):
        each.loaded()
    return Pair(first, same, checkpoint)


def test_it_serves_its_own_size_then_and_nobody_of_that_size_asks_the_other_one(pair: Pair, fleet: Fleet) -> None:
    (published,) = [event["published"] for event in pair.first.events if event["event"] == "loaded"][:1]
    assert isinstance(published, dict)
    first = fleet.start(bare(pair.checkpoint), "pair-of-two", weights_id=published["weights_id"])
    report = first.report()
    assert report["source_weights_id"] == published["weights_id"] != report["weights_id"]
    assert report["amplification"] < 1.01
    (mine,) = [event["published"] for event in first.events if event["event"] == "loaded"]
    assert isinstance(mine, dict)
    assert (mine["content_id"], mine["weights_id"]) == (report["content_id"], report["weights_id"])
    second = fleet.target(bare(pair.checkpoint), "pair-of-two")
    taken = second.report()
    assert (taken["resharded_from"], taken["weights_id"]) == (0, report["weights_id"])
    assert second.digest() == first.digest() == pair.same.digest()


def test_h31_flipped_bits_cost_one_peer_and_are_in_nothing_that_is_loaded(pair: Pair, fleet: Fleet) -> None:
    bad = fleet.source(pair.checkpoint, "flipped-of-two", tp=2)
    bad.loaded()
    bad.ask("flip", "flipped", what="weight")
    alone = fleet.target(bare(pair.checkpoint), "flipped-of-two")
    with pytest.raises(LoadError, match="does not have its digest"):
        alone.loaded()
    fallen = fleet.target(pair.checkpoint, "flipped-of-two")
    assert fallen.report()["source"] == "disk"
    assert fallen.digest() == pair.same.digest()


def test_h26_a_killed_source_is_replaced_and_nothing_is_read_twice(pair: Pair, fleet: Fleet) -> None:
    two = [fleet.source(pair.checkpoint, "killed-of-two", tp=2, faults=SLOW) for _ in range(2)]
    for each in two:
        each.loaded()
    target = fleet.target(bare(pair.checkpoint), "killed-of-two", env={"WEIGHTWIRE_STALL_TIMEOUT": "2"})
    target.moved("transfer", 0.1)
    (serving,) = [each for each in two if each.count("serving")]
    for rank in (0, 1):
        serving.signal(signal.SIGKILL, rank)
    report = target.report()
    assert report["source"] == "peer"
    assert any("was dropped" in line for line in report["warnings"])
    assert sum(share["nbytes"] for share in report["shares"]) == report["nbytes"]
    assert report["amplification"] < 1.01
    assert target.digest() == pair.same.digest()


def test_too_much_to_read_is_a_miss_that_names_the_tensor_on_all_ranks(fleet: Fleet, tmp_path: Path) -> None:
    checkpoint = write_bf16(tmp_path / "model", ODD, seed=9)
    source = fleet.source(checkpoint, "far")
    source.loaded()
    empty = fleet.target(bare(checkpoint), "far", tp=4)
    with pytest.raises(LoadError, match="times the bytes that are needed would be read"):
        empty.loaded()
    disk = fleet.target(checkpoint, "far", tp=4)
    for report in reports(disk):
        assert (report["source"], report["resharded_from"]) == ("disk", 0)
    off = fleet.target(bare(checkpoint), "far", tp=2, max_amplification=0.0)
    with pytest.raises(LoadError, match="under another identity"):
        off.loaded()


def test_h58_ranks_that_do_not_give_their_weights_id_and_other_stages_are_not_taken(
    fleet: Fleet, tmp_path: Path
) -> None:
    checkpoint = write_bf16(tmp_path / "model", ODD, seed=9)
    lying = fleet.source(checkpoint, "lying", tp=2, faults={"weights_id": "f" * 64})
    done = fleet.source(checkpoint, "done", tp=2, publish_stage="PROCESSED")
    lying.loaded()
    deceived = fleet.target(bare(checkpoint), "lying")
    with pytest.raises(LoadError, match="do not give the weights id"):
        deceived.loaded()
    done.loaded()
    undone = fleet.target(bare(checkpoint), "done")
    with pytest.raises(LoadError, match=r"PROCESSED \(READY\), under another identity"):
        undone.loaded()
