"""Every family's weights between replicas: donor from the disk, receiver without weights and with poisoned memory."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fleet import Fleet, bare
from runtime_families import NEW_TOKENS, PROMPTS, expected, write_family
from runtime_quantized import quantized

from weightwire.engines.native.support import ROWS, UNQUANTIZED, Row, parallel
from weightwire.errors import LoadError

# family, ranks, groups of experts among them
CASES = [
    ("qwen3", 1, 1),
    ("qwen3", 2, 1),
    ("qwen3_moe", 1, 1),
    ("qwen3_moe", 2, 1),
    ("qwen3_moe", 2, 2),
    ("qwen3_moe", 4, 2),
    ("deepseek_v3", 1, 1),
    ("deepseek_v3", 2, 1),
    ("deepseek_v3", 4, 2),
    ("gemma2", 1, 1),
    ("gemma2", 2, 1),
]
LAYOUTS = ["packed", "plain"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    torch.set_num_threads(1)
    return {name: write_family(root / name, name) for name in {case[0] for case in CASES}}


@pytest.fixture(scope="module")
def oracle() -> dict[str, list[list[int]]]:
    """What transformers continues with."""
    return {name: expected(name)[1] for name in {case[0] for case in CASES}}


def options(stage: str, tp: int, ep: int, layout: str = "packed") -> dict[str, Any]:
    return {"tp": tp, "ep": ep, "dtype": "float32", "kernel_layout": layout, "publish_stage": stage}


@pytest.mark.parametrize(("stage", "layout"), list(product(("LOADED", "PROCESSED"), LAYOUTS)))
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_h01_a_family_from_a_peer(
    case: tuple[str, int, int],
    stage: str,
    layout: str,
    fleet: Fleet,
    family: dict[str, Path],
    oracle: dict[str, list[list[int]]],
) -> None:
    name, tp, ep = case
    model_id, given = f"{name}-{tp}-{ep}-{stage}-{layout}", options(stage, tp, ep, layout)
    donor = fleet.source(family[name], model_id, **given)
    donor.loaded()
    env = {"WEIGHTWIRE_STAGES": stage}
    receiver = fleet.target(bare(family[name]), model_id, env=env, faults={"poison": True}, **given)
    reports = [event["report"] for event in receiver.loaded()]
    assert {(report["source"], report["stage"]) for report in reports} == {("peer", stage)}
    assert receiver.count("filling") == tp
    assert all(event["untouched"] for event in receiver.events if event["event"] == "filling")
    assert receiver.digest() == donor.digest()
    tokens = receiver.replica.generate(PROMPTS, NEW_TOKENS)
    assert tokens == donor.replica.generate(PROMPTS, NEW_TOKENS) == oracle[name]


def test_h43_another_expert_map_is_another_identity(fleet: Fleet, family: dict[str, Path]) -> None:
    """Equal names and byte sizes on every rank, and other experts, or halves of them, in them."""
    fleet.source(family["qwen3_moe"], "expert-map", **options("LOADED", 4, 2)).loaded()
    target = fleet.target(bare(family["qwen3_moe"]), "expert-map", **options("LOADED", 4, 4))
    with pytest.raises(LoadError, match="under another identity"):
        target.loaded()


def test_every_row_of_these_families_is_run_here() -> None:
    elsewhere = {row for row in ROWS if "pp" in row.parallel or "attention_dp" in row.parallel}
    run = {row for row in elsewhere if row.family != "llama"} | {
        Row(name, UNQUANTIZED, layout, parallel(tp=tp, ep=ep), stage)
        for name, tp, ep in CASES
        for layout in LAYOUTS
        for stage in ("LOADED", "PROCESSED")
    }
    assert {row for row in ROWS if row.family != "llama" and row.quantization == UNQUANTIZED} == run


def test_what_the_support_table_lacks_is_refused_by_name_and_read_from_the_disk(
    fleet: Fleet, family: dict[str, Path], tmp_path: Path
) -> None:
    unproven = quantized(family["qwen3"], tmp_path / "unproven", "int8_weight_only")
    reason = "is not in the support table: qwen3 is not proven with int8_weight_only weights"
    given = options("LOADED", 1, 1)
    (loaded,) = fleet.start(unproven, "unproven", **given).loaded()
    assert loaded["report"]["source"] == "disk"
    assert reason in loaded["report"]["steps"][0]["reason"]
    assert (loaded["published"]["attempted"], loaded["published"]["published"]) == (False, False)
    assert reason in loaded["published"]["reason"]
    assert fleet.sources("unproven") == []
    target = fleet.target(bare(unproven), "unproven", **given)
    with pytest.raises(LoadError, match="is not in the support table"):
        target.loaded()
