"""Pipeline stages, and ranks that share a batch: baseline and donor from the disk, receiver without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fleet import Fleet, bare
from runtime_families import COMMON, FAMILIES, NEW_TOKENS, PROMPTS, expected, write_family
from runtime_models import write_checkpoint

from weightwire.engines.native.support import ROWS, UNQUANTIZED, Row, parallel
from weightwire.errors import LoadError

STAGED = [{"tp": 1, "pp": 2}, {"tp": 2, "pp": 2}]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, layout) for family in ("llama", "qwen3", "qwen3_moe", "deepseek_v3", "gemma2") for layout in STAGED),
    ("deepseek_v3", {"tp": 2, "pp": 2, "ep": 2}),
    ("deepseek_v3", {"tp": 2, "attention_dp": True}),
    ("deepseek_v3", {"tp": 2, "ep": 2, "attention_dp": True}),
    ("qwen3_moe", {"tp": 2, "ep": 2, "attention_dp": True}),
]
LAYOUTS = ("plain", "packed")
POISON = {"poison": True, "nan": True}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    torch.set_num_threads(1)
    llama = {"num_hidden_layers": COMMON["num_hidden_layers"], "tie_word_embeddings": True}
    found = {name: write_family(root / name, name) for name in {case[0] for case in CASES} & set(FAMILIES)}
    return found | {"llama": write_checkpoint(root / "llama", llama)}


@pytest.fixture(scope="module")
def oracle() -> dict[str, list[list[int]]]:
    """What transformers continues with; of llama its own rank alone says it (``tests/runtime`` compares the two)."""
    return {name: expected(name)[1] for name in {case[0] for case in CASES} & set(FAMILIES)}


def options(layout: dict[str, Any], stage: str = "LOADED", kernel_layout: str = "packed") -> dict[str, Any]:
    return {"dtype": "float32", "publish_stage": stage, "kernel_layout": kernel_layout, **layout}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{parallel(**case[1])}")
def test_h22_both_stages_and_kernel_layouts(
    case: tuple[str, dict[str, Any]], fleet: Fleet, family: dict[str, Path], oracle: dict[str, list[list[int]]]
) -> None:
    """Equal bytes on every rank, and the tokens of one rank alone, with memory that is full of what is no number."""
    name, layout = case
    wanted = oracle.get(name)
    if wanted is None:
        wanted = fleet.start(family[name], f"{name}-alone", **options({})).replica.generate(PROMPTS, NEW_TOKENS)
    for kernel_layout in LAYOUTS:
        given = options(layout, kernel_layout=kernel_layout) | {"load_format": "auto"}
        baseline = fleet.start(family[name], name, env={"WEIGHTWIRE_ROLE": "off"}, **given)
        baseline.loaded()
        digest = baseline.digest()
        for stage in ("LOADED", "PROCESSED"):
            model_id = f"{name}-{parallel(**layout)}-{stage}-{kernel_layout}"
            given = options(layout, stage, kernel_layout)
            donor = fleet.source(family[name], model_id, **given)
            donor.loaded()
            env = {"WEIGHTWIRE_STAGES": stage}
            receiver = fleet.target(bare(family[name]), model_id, env=env, faults=POISON, **given)
            reports = [event["report"] for event in receiver.loaded()]
            assert {(report["source"], report["stage"]) for report in reports} == {("peer", stage)}
            assert all(event["untouched"] for event in receiver.events if event["event"] == "filling")
            assert receiver.digest() == donor.digest() == digest
            assert len({content for content, _ in receiver.digest()}) == len(reports)  # no two ranks alike
            tokens = receiver.replica.generate(PROMPTS, NEW_TOKENS)
            assert tokens == donor.replica.generate(PROMPTS, NEW_TOKENS) == wanted
            fleet.end(donor, receiver)
        fleet.end(baseline)


def test_every_row_of_these_layouts_is_run_here() -> None:
    run = {
        Row(name, UNQUANTIZED, kernel_layout, parallel(**layout), stage)
        for name, layout in CASES
        for kernel_layout in LAYOUTS
        for stage in ("LOADED", "PROCESSED")
    }
    assert {row for row in ROWS if "pp" in row.parallel or "attention_dp" in row.parallel} == run


def test_h43_what_is_shared_otherwise_is_another_identity(fleet: Fleet, family: dict[str, Path]) -> None:
    """Two ranks each: tensors, layers, a batch. Of none of them does another one find a source."""
    layouts: list[dict[str, Any]] = [{"tp": 2, "ep": 2}, {"pp": 2}, {"tp": 2, "ep": 2, "attention_dp": True}]
    for at, layout in enumerate(layouts):
        source = fleet.source(family["deepseek_v3"], f"shared-{at}", **options(layout))
        source.loaded()
        targets = [
            fleet.target(bare(family["deepseek_v3"]), f"shared-{at}", **options(other))
            for other in layouts
            if other is not layout
        ]
        for target in targets:
            with pytest.raises(LoadError, match="under another identity"):
                target.loaded()
        fleet.end(source)
        for target in targets:
            target.kill()


def test_h22_h41_stages_under_keys_of_the_tensor_parallel_rank_alone_are_never_taken(
    fleet: Fleet, family: dict[str, Path]
) -> None:
    """The control: one stage's record stands for both, and one of the target's stages would get the other's layers."""
    flat, hasty = {"flat": True}, {"WEIGHTWIRE_WAIT_FOR_LOADING": "0.5"}
    source = fleet.source(family["qwen3"], "flat", faults=flat, **options({"pp": 2}))
    source.loaded()
    assert len({view.record.shard_key for view in fleet.sources("flat")}) == 1
    target = fleet.target(bare(family["qwen3"]), "flat", faults=flat, env=hasty, **options({"pp": 2}))
    with pytest.raises(LoadError, match="of 2 ranks have published"):
        target.loaded()
