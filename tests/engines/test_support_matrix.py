"""Every quantization of linear layers between replicas: baseline from disk, donor, receiver without weights."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from engine_fleet import Fleet, Watch, bare, write_bf16
from runtime_quantized import BLOCK_DIMS, DIMS, FORMS, LEAVES_OUT, PARTLY, quantized

from weightwire.engines.native.support import ROWS, UNQUANTIZED, quantized_as

PROMPTS = [[3, 14, 15, 92, 65], [35, 8], [9, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28], [1]]
TOKENS = 16
STAGES = ("LOADED", "PROCESSED")
RANKS = {"single": 1, "tp": 2}
POISON: dict[str, Any] = {"nan": True}
CASES = sorted({(row.quantization, row.parallel) for row in ROWS if row.family == "llama" and row.parallel in RANKS})
BLOCKS_PARTLY = f"fp8_block{PARTLY}"
OF_ROW = FORMS | {UNQUANTIZED: (UNQUANTIZED,), quantized_as("fp8_block", partly=True): (BLOCKS_PARTLY,)}
COVERED = {(quantization, form, parallel) for quantization, parallel in CASES for form in OF_ROW[quantization]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    plain = write_bf16(root / "plain", DIMS, seed=4)
    blocks = write_bf16(root / "blocks", BLOCK_DIMS, seed=4)
    forms = {form for forms in FORMS.values() for form in forms}
    partly = quantized(blocks, root / BLOCKS_PARTLY, "fp8_block", LEAVES_OUT["llama"])
    return {UNQUANTIZED: plain, BLOCKS_PARTLY: partly} | {
        form: quantized(blocks if form == "fp8_block" else plain, root / form, form) for form in forms
    }


def said(watch: Watch) -> tuple[list[list[str]], list[list[int]]]:
    """What its tensors hold, and how it continues."""
    return watch.digest(), watch.replica.generate(PROMPTS, TOKENS)


def test_every_row_of_this_family_is_run_here() -> None:
    mine = {row for row in ROWS if row.family == "llama" and row.parallel in RANKS}
    run = {
        (quantization, layout, parallel, stage)
        for quantization, _, parallel in COVERED
        for layout, stage in product(("plain", "packed"), STAGES)
    }
    assert {(row.quantization, row.kernel_layout, row.parallel, row.stage) for row in mine} == run


@pytest.mark.timeout(300)  # ten replicas, one after the other
@pytest.mark.parametrize(("form", "parallel"), sorted({(form, parallel) for _, form, parallel in COVERED}))
def test_h04_h05_h06_h11_both_stages_and_kernel_layouts(
    form: str, parallel: str, fleet: Fleet, made: dict[str, Path]
) -> None:
    """Byte-equal manifests and equal tokens, with memory that is full of what is no number."""
    tp, model_id = RANKS[parallel], f"{form}-{parallel}"
    for layout in ("plain", "packed"):
        common: dict[str, Any] = {"tp": tp, "kernel_layout": layout}
        baseline = fleet.start(made[form], model_id, env={"WEIGHTWIRE_ROLE": "off"}, load_format="auto", **common)
        donors = {
            stage: fleet.source(made[form], f"{model_id}-{layout}-{stage}", publish_stage=stage, **common)
            for stage in STAGES
        }
        published = {
            stage: [event["published"]["content_id"] for event in donor.loaded()] for stage, donor in donors.items()
        }
        receivers = {
            stage: fleet.target(
                bare(made[form]),
                f"{model_id}-{layout}-{stage}",
                env={"WEIGHTWIRE_STAGES": stage},
                faults=POISON,
                **common,
            )
            for stage in STAGES
        }
        baseline.loaded()
        wanted = said(baseline)
        for stage, receiver in receivers.items():
            reports = [event["report"] for event in receiver.loaded()]
            assert {(report["source"], report["stage"]) for report in reports} == {("peer", stage)}
            assert [report["content_id"] for report in reports] == published[stage]
            assert said(receiver) == wanted
            assert said(donors[stage]) == wanted
        assert [content for content, _ in wanted[0]] == published["PROCESSED"]
        fleet.end(baseline, *donors.values(), *receivers.values())
