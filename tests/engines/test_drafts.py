"""Draft models beside their target, and layers of the target itself that draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fleet import PROMPTS, TOKENS, Fleet, Watch, bare, write_bf16
from runtime_families import PROMPTS as MTP_PROMPTS
from runtime_mtp import expected_mtp, write_mtp

from weightwire.errors import ConfigError, LoadError
from weightwire.types import Role

DRAFT: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target model, and the one that drafts for it."""
    root = tmp_path_factory.mktemp("drafts")
    return write_bf16(root / "target", seed=21), write_bf16(root / "draft", DRAFT, seed=22)


def reports(watch: Watch) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of each rank: its target's, its draft's."""
    loaded = watch.loaded()
    return [event["report"] for event in loaded], [event["draft"]["report"] for event in loaded]


def drafted(watch: Watch) -> list[list[int]]:
    return watch.replica.generate(PROMPTS, TOKENS, role=Role.DRAFT)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2, "kernel_layout": "packed"}], ids=str)
@pytest.mark.parametrize("stage", ["LOADED", "PROCESSED"])
def test_h22_a_draft_travels_under_a_key_of_its_own(
    stage: str, layout: dict[str, Any], fleet: Fleet, pair: tuple[Path, Path]
) -> None:
    target, draft = pair
    model_id, given = f"both-{stage}-{'-'.join(layout)}", {"publish_stage": stage, **layout}
    donor = fleet.source(target, model_id, draft_model=str(draft), **given)
    alone = fleet.start(draft, model_id, env={"WEIGHTWIRE_ROLE": "off"}, load_format="auto", **given)
    donor.loaded()
    receiver = fleet.target(
        bare(target),
        model_id,
        draft_model=str(bare(draft)),
        env={"WEIGHTWIRE_STAGES": stage},
        faults={"poison": True},
        **given,
    )
    of_target, of_draft = reports(receiver)
    assert {(report["source"], report["stage"]) for report in (*of_target, *of_draft)} == {("peer", stage)}
    assert len({report["weights_id"] for report in (*of_target, *of_draft)}) == 2
    assert receiver.digest("draft") == donor.digest("draft") == alone.digest()
    assert receiver.digest() == donor.digest() != receiver.digest("draft")
    assert drafted(receiver) == drafted(donor) == alone.tokens()
    assert receiver.tokens() == donor.tokens() != drafted(receiver)
    views = [*fleet.sources(model_id), *fleet.sources(f"{model_id}#draft")]
    assert sorted((view.record.model_id, view.record.role.value) for view in views) == sorted(
        [(model_id, "target")] * 2 + [(f"{model_id}#draft", "draft")] * 2
    )


def test_h22_a_model_that_answers_is_no_draft(fleet: Fleet, pair: tuple[Path, Path]) -> None:
    """The same bytes under the draft's own name, but served as a target: another role, so another key."""
    target, draft = pair
    fleet.source(target, "roles").loaded()
    fleet.source(draft, "roles#draft").loaded()
    receiver = fleet.target(bare(target), "roles", draft_model=str(bare(draft)))
    with pytest.raises(LoadError, match="under another identity"):
        receiver.loaded()


def test_h37_a_draft_follows_its_target_to_the_disk(fleet: Fleet, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The target finds nothing (another config); the draft would find its own, and must not take it.

    The control does: a replica of which one model is a peer's and the other the disk's.
    """
    target, draft = pair
    fleet.source(target, "follows", draft_model=str(draft)).loaded()
    other = write_bf16(tmp_path / "other", {"max_position_embeddings": 64}, seed=21)
    loads = {
        name: fleet.target(other, "follows", draft_model=str(draft), tp=tp, faults=faults)
        for name, tp, faults in (("ours", 1, {}), ("control", 1, {"faithless": True}))
    }
    (of_target,), (of_draft,) = reports(loads["ours"])
    assert (of_target["source"], of_draft["source"]) == ("disk", "disk")
    assert "its draft follows it" in of_draft["steps"][0]["reason"]
    assert [report[0]["source"] for report in reports(loads["control"])] == ["disk", "peer"]
    without = fleet.target(other, "follows", draft_model=str(bare(draft)))
    with pytest.raises(LoadError, match=r"its draft follows it.* and no disk"):
        without.loaded()


def test_a_draft_is_announced_before_its_target_is_loaded(fleet: Fleet, pair: tuple[Path, Path]) -> None:
    """Whoever starts together with its source has its target at the same moment, and asks for the draft at once."""
    target, draft = pair
    donor = fleet.source(target, "announced", draft_model=str(draft), faults={"read_s": 0.1})
    fleet.eventually("announced#draft", lambda views: [view.record.state.value for view in views] == ["LOADING"])
    assert not donor.count("loaded")
    receiver = fleet.target(bare(target), "announced", draft_model=str(bare(draft)))
    of_target, of_draft = reports(receiver)
    assert {report["source"] for report in (*of_target, *of_draft)} == {"peer"}


def test_a_replica_without_a_draft_does_not_answer_for_one(fleet: Fleet, pair: tuple[Path, Path]) -> None:
    alone = fleet.start(pair[0], "alone", env={"WEIGHTWIRE_ROLE": "off"}, load_format="auto")
    alone.loaded()
    with pytest.raises(ConfigError, match="has no draft model"):
        drafted(alone)


def test_h37_ranks_follow_together(fleet: Fleet, pair: tuple[Path, Path]) -> None:
    """One rank's memory is bad: all read the disk, for both models."""
    target, draft = pair
    fleet.source(target, "together", draft_model=str(draft), tp=2).loaded()
    faults = {"corrupt": True, "rank": 1}
    receiver = fleet.target(target, "together", draft_model=str(draft), tp=2, faults=faults)
    of_target, of_draft = reports(receiver)
    assert {report["source"] for report in (*of_target, *of_draft)} == {"disk"}
    assert all("its draft follows it" in report["steps"][0]["reason"] for report in of_draft)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "ep": 2}, {"pp": 2}], ids=str)
def test_h02_layers_for_multi_token_prediction_travel_and_what_they_share_once(
    layout: dict[str, Any], fleet: Fleet, mtp: Path
) -> None:
    model_id = f"mtp-{'-'.join(layout)}"
    given = {"dtype": "float32", "kernel_layout": "packed", "mtp": True, **layout}
    donor = fleet.source(mtp, model_id, **given)
    donor.loaded()
    receiver = fleet.target(bare(mtp), model_id, faults={"poison": True}, **given)
    loaded = receiver.loaded()
    assert {event["report"]["source"] for event in loaded} == {"peer"}
    assert receiver.digest() == donor.digest()
    (*_, last) = receiver.ask("digest", "digest")
    assert isinstance(last["names"], list)
    names = [str(name) for name in last["names"]]
    assert "model.layers.3.eh_proj.weight" in names
    shared = [name for name in names if name.endswith(("embed_tokens.weight", "head.weight"))]
    assert sorted(shared) == ["lm_head.weight", "model.embed_tokens.weight"]
    reference = expected_mtp(mtp)
    for watch in (donor, receiver):
        for event in watch.ask("drafts", "drafts", prompts=MTP_PROMPTS):
            torch.testing.assert_close(torch.tensor(event["logits"]), reference, atol=5e-4, rtol=1e-4)


def test_h43_with_such_layers_is_another_identity(fleet: Fleet, mtp: Path) -> None:
    fleet.source(mtp, "mtp-or-not", dtype="float32").loaded()
    target = fleet.target(bare(mtp), "mtp-or-not", dtype="float32", mtp=True)
    with pytest.raises(LoadError, match="under another identity"):
        target.loaded()


@pytest.fixture(scope="module")
def mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = write_mtp(tmp_path_factory.mktemp("mtp") / "deepseek")
    assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 1
    return directory
