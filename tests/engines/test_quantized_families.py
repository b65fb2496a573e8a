"""Quantized experts and latent heads between replicas: baseline from disk, donors, receivers without weights."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fleet import Fleet, Watch, bare
from runtime_families import PROMPTS
from runtime_quantized import FAMILY_FORMS, FORMS, KIMI, PARTLY, PARTLY_FORMS, quantized_family

from weightwire.engines.native.support import ROWS, UNQUANTIZED, Row, quantized_as
from weightwire.errors import LoadError
from weightwire.wire.messages import PublicationState

TOKENS = 16
STAGES = ("LOADED", "PROCESSED")
LAYOUTS = ("plain", "packed")
POISON: dict[str, Any] = {"nan": True}
# ranks, and groups of experts among them: with four and two, each expert is cut by two ranks
RANKS = {"tp": (2, 1), "tp+ep": (4, 2)}
CASES = [(family, form, parallel) for family, forms in FAMILY_FORMS.items() for form in forms for parallel in RANKS]
CASES += [("deepseek_v3", PARTLY_FORMS["deepseek_v3"], "tp"), ("qwen3_moe", PARTLY_FORMS["qwen3_moe"], "tp+ep")]
OF_KIMI = ("deepseek_v3", PARTLY_FORMS["deepseek_v3"], "tp+ep")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("quantized-families")


def said(watch: Watch) -> tuple[list[list[str]], list[list[int]]]:
    """What its tensors hold, and how it continues: not with one token for ever, as numbers that are none would."""
    tokens = watch.replica.generate(PROMPTS, TOKENS)
    assert [len(row) for row in tokens] == [TOKENS] * len(PROMPTS)
    assert len({token for row in tokens for token in row}) > 8
    return watch.digest(), tokens


def published(watch: Watch) -> list[str]:
    """The content id of each rank, once all have loaded."""
    return [event["published"]["content_id"] for event in watch.loaded()]


def received(watch: Watch, stage: str) -> list[str]:
    """The content id of each rank, once all have loaded, from peers."""
    reports = [event["report"] for event in watch.loaded()]
    assert {(report["source"], report["stage"]) for report in reports} == {("peer", stage)}
    return [report["content_id"] for report in reports]


def test_every_row_of_these_families_is_run_here() -> None:
    of_form = {form: name for name, forms in FORMS.items() for form in forms}
    of_form |= {f"{form}{PARTLY}": quantized_as(name, partly=True) for form, name in of_form.items()}
    run = {
        Row(family, of_form[form], layout, parallel, stage)
        for (family, form, parallel), layout, stage in product([*CASES, OF_KIMI], LAYOUTS, STAGES)
    }
    assert {row for row in ROWS if row.family != "llama" and row.quantization != UNQUANTIZED} == run


@pytest.mark.timeout(300)  # nine replicas, one after the other
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_h07_h15_both_stages_and_kernel_layouts(case: tuple[str, str, str], fleet: Fleet, root: Path) -> None:
    """Byte-equal manifests and equal tokens, with memory that is full of what is no number.

    One donor of raw bytes serves receivers of both kernel layouts.
    """
    family, form, parallel = case
    made = root / "-".join(case)
    made = quantized_family(made, family, form)
    tp, ep = RANKS[parallel]
    common: dict[str, Any] = {"tp": tp, "ep": ep}
    model_id, contents = "-".join(case), dict[str, list[str]]()
    raw = fleet.source(made, model_id, publish_stage="LOADED", kernel_layout="packed", **common)
    for layout in LAYOUTS:
        given = common | {"kernel_layout": layout}
        baseline = fleet.start(made, model_id, env={"WEIGHTWIRE_ROLE": "off"}, load_format="auto", **given)
        donor = fleet.source(made, f"{model_id}-{layout}", publish_stage="PROCESSED", **given)
        if layout == LAYOUTS[0]:
            contents["LOADED"] = published(raw)
        contents["PROCESSED"] = published(donor)
        names = {"LOADED": model_id, "PROCESSED": f"{model_id}-{layout}"}
        receivers = {
            stage: fleet.target(bare(made), names[stage], env={"WEIGHTWIRE_STAGES": stage}, faults=POISON, **given)
            for stage in STAGES
        }
        baseline.loaded()
        wanted = said(baseline)
        assert said(donor) == wanted
        assert [content for content, _ in wanted[0]] == contents["PROCESSED"]
        for stage, receiver in receivers.items():
            assert received(receiver, stage) == contents[stage]
            assert said(receiver) == wanted
        if layout == "packed":
            assert said(raw) == wanted
        fleet.end(baseline, donor, *receivers.values())
    fleet.end(raw)


def test_parts_left_out_of_what_is_proven_as_a_whole_alone_are_refused_by_name(fleet: Fleet, root: Path) -> None:
    made = quantized_family(root / "unproven", "qwen3_moe", "fp8_dynamic-partly")
    reason = "is not in the support table: qwen3_moe is not proven with fp8_qdq (parts left out) weights"
    for event in fleet.start(made, "unproven", tp=2).loaded():
        assert event["report"]["source"] == "disk"
        assert reason in event["report"]["steps"][0]["reason"]
        assert not event["published"]["published"]
    with pytest.raises(LoadError, match="is not in the support table"):
        fleet.target(bare(made), "unproven", tp=2).loaded()


def test_h25_experts_and_latent_heads_of_a_replica_that_is_still_reading_its_disk(fleet: Fleet, root: Path) -> None:
    """Loading decides nothing here, so the layout is known before; what many tensors make counts once all are there."""
    made = quantized_family(root / "followed", "deepseek_v3", "fp8_block")
    given: dict[str, Any] = {"tp": 2, "kernel_layout": "packed"}
    first = fleet.start(made, "followed", faults={"read_s": 0.01}, **given)
    relaying = [PublicationState.RELAYING] * 2
    fleet.eventually("followed", lambda views: [view.record.state for view in views] == relaying)
    follower = fleet.start(bare(made), "followed", faults=POISON, **given)
    reports = [event["report"] for event in follower.loaded()]
    assert [(report["source"], bool(report["followed"])) for report in reports] == [("peer", True)] * 2
    assert [report["content_id"] for report in reports] == published(first)
    assert said(follower) == said(first)


@pytest.mark.timeout(240)  # 72 ranks, 16 at a time
def test_kimi_k2_on_eight_ranks(fleet: Fleet, root: Path) -> None:
    """Latent attention, shared and routed experts, NVFP4, TP 8 with the experts spread over all ranks.

    As published: attention and the dense layer are left out of the quantization. Both stages and layouts; one donor of
    raw bytes serves both layouts.
    """
    made = quantized_family(root / "kimi", OF_KIMI[0], OF_KIMI[1], KIMI)
    given: dict[str, Any] = {"tp": 8, "ep": 8}
    wanted = {}
    for layout in LAYOUTS:
        common = given | {"kernel_layout": layout}
        baseline = fleet.start(made, "kimi", env={"WEIGHTWIRE_ROLE": "off"}, load_format="auto", **common)
        baseline.loaded()
        wanted[layout] = said(baseline)
        fleet.end(baseline)
    assert wanted["plain"][0] != wanted["packed"][0]  # padded
    for stage, layouts in (("LOADED", LAYOUTS), ("PROCESSED", ("packed",)), ("PROCESSED", ("plain",))):
        donor = fleet.source(made, f"kimi-{stage}", publish_stage=stage, kernel_layout=layouts[-1], **given)
        contents = published(donor)
        for layout in layouts:
            common = given | {"kernel_layout": layout, "env": {"WEIGHTWIRE_STAGES": stage}}
            receiver = fleet.target(bare(made), f"kimi-{stage}", faults=POISON, **common)
            assert received(receiver, stage) == contents
            assert said(receiver) == wanted[layout]
            fleet.end(receiver)
        assert said(donor) == wanted[layouts[-1]]
        fleet.end(donor)
