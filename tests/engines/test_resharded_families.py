"""Another tensor-parallel size on the two sides, for every family and every quantization: right, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fleet import Fleet, bare
from manifest_support import logical_bytes, manifest_of
from naive_models import BLOCKS_PARTLY, FORMS, Side, empty, loaded
from runtime_families import NEW_TOKENS, PROMPTS
from runtime_models import write_checkpoint
from runtime_quantized import DIMS, quantized

from weightwire.errors import ConfigError, LoadError, ManifestMismatch
from weightwire.manifest import state as declared
from weightwire.manifest.reshard import plan_reshard
from weightwire.manifest.scatter import Scatter
from weightwire.manifest.tree import module_paths
from weightwire.types import Stage

# model, (ranks, groups of experts) of the source, of the target
EXACT = [
    *((name, have, want) for name in ("qwen3", "qwen3_moe", "deepseek_v3") for have, want in [(2, 1), (1, 2), (4, 2)]),
    *(("gemma2", have, want) for have, want in [(2, 1), (1, 2)]),
    *((form, have, want) for form in FORMS if not form.startswith("nvfp4") for have, want in [(2, 1), (1, 2)]),
    *((BLOCKS_PARTLY, have, want) for have, want in [(2, 1), (1, 2)]),
]


def fill(sources: list[Side], target: Side) -> Side:
    """What ``Resharding`` does, with a copy in place of the wire."""
    held = [source.catalogue() for source in sources]
    offered = [manifest_of(each) for each in held]
    declared.apply(module_paths(target.model, target.names.modules), offered[0].layout.state)
    described = target.catalogue()
    planned = plan_reshard(described.layout, offered, stage=Stage.LOADED, max_amplification=1e9)
    scatter = Scatter(described, [each.layout for each in held], planned)
    scatter.zero()
    for number, (each, ranked) in enumerate(zip(held, planned.ranks, strict=True)):
        data = logical_bytes(each.memory)
        for leaf in ranked.leaves:
            span = each.layout.leaves[leaf].span
            scatter.take(
                number, span.offset, torch.frombuffer(bytearray(data[span.offset : span.end]), dtype=torch.uint8)
            )
    described.restore_references()
    return target


def ranks(directory: Path, size: int, ep: int = 1) -> list[Side]:
    return [loaded(directory, tp=size, rank=rank, ep=ep) for rank in range(size)]


@pytest.mark.parametrize(("name", "have", "want"), EXACT)
def test_what_is_declared_gives_what_the_disk_would_have_given(
    name: str, have: int, want: int, models: dict[str, Path]
) -> None:
    sources = ranks(models[name], have)
    for rank in range(want):
        filled = fill(sources, empty(models[name], tp=want, rank=rank))
        assert filled.manifest().content_id == loaded(models[name], tp=want, rank=rank).manifest().content_id


@pytest.mark.parametrize(("have", "want"), [((4, 2), (1, 1)), ((1, 1), (4, 2)), ((4, 4), (4, 2)), ((2, 2), (2, 1))])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_what_experts_declare_is_true_under_expert_parallelism_too(
    name: str, have: tuple[int, int], want: tuple[int, int], models: dict[str, Path]
) -> None:
    """Engines do not ask for it (their ranks' keys differ in more than one size), but the plan would be right."""
    sources = ranks(models[name], *have)
    for rank in range(want[0]):
        filled = fill(sources, empty(models[name], tp=want[0], rank=rank, ep=want[1]))
        wanted = loaded(models[name], tp=want[0], rank=rank, ep=want[1])
        assert filled.manifest().content_id == wanted.manifest().content_id


@pytest.mark.parametrize("form", ["nvfp4", "nvfp4_awq"])
@pytest.mark.parametrize(("have", "want"), [(2, 1), (1, 2)])
def test_interleaved_scales_are_refused_by_name(form: str, have: int, want: int, models: dict[str, Path]) -> None:
    with pytest.raises(
        ManifestMismatch, match=r"weight_scale cannot be resharded .*: its block scales are interleaved"
    ):
        fill(ranks(models[form], have), empty(models[form], tp=want, rank=0))


@pytest.mark.parametrize("form", ["fp8_block", "w4a16_awq"])
def test_blocks_that_a_cut_goes_through_are_refused_by_name_when_the_model_is_built(form: str, tmp_path: Path) -> None:
    """Halves of 160 are no whole blocks of 128; eighths no whole groups of 16."""
    checkpoint = quantized(write_checkpoint(tmp_path / "plain", DIMS), tmp_path / form, form)
    with pytest.raises(ConfigError, match=rf"{form}: .* would cut through (128|16) weights"):
        empty(checkpoint, tp=2 if form == "fp8_block" else 8, rank=0)


def options(tp: int, ep: int = 1) -> dict[str, Any]:
    return {"tp": tp, "ep": ep, "dtype": "float32", "max_amplification": 100.0}


@pytest.mark.parametrize(
    ("name", "have", "want"),
    [
        ("qwen3", 2, 1),
        ("qwen3_moe", 1, 2),
        ("deepseek_v3", 2, 1),
        ("gemma2", 1, 2),
        ("fp8_block", 2, 1),
        ("w4a16_awq", 1, 2),
    ],
)
def test_replicas_of_another_size_hold_what_the_disk_would_have_given_them(
    name: str, have: int, want: int, fleet: Fleet, models: dict[str, Path]
) -> None:
    model_id = f"another-size-{name}"
    source = fleet.source(models[name], model_id, **options(have))
    same = fleet.source(models[name], f"{model_id}-disk", load_format="auto", **options(want))
    source.loaded()
    target = fleet.target(bare(models[name]), model_id, faults={"poison": True}, **options(want))
    for event in target.loaded():
        report = event["report"]
        assert (report["source"], report["verified"], report["resharded_from"]) == ("peer", True, have)
    same.loaded()
    assert target.digest() == same.digest()
    assert target.replica.generate(PROMPTS, NEW_TOKENS) == same.replica.generate(PROMPTS, NEW_TOKENS)


def test_what_cannot_be_resharded_is_refused_by_name_and_read_from_the_disk(
    fleet: Fleet, models: dict[str, Path]
) -> None:
    sources = [
        fleet.source(models["qwen3_moe"], "shared-experts", **options(2, 2)),
        fleet.source(models["nvfp4"], "interleaved", **options(2)),
    ]
    for source in sources:
        source.loaded()
    shared = fleet.target(bare(models["qwen3_moe"]), "shared-experts", **options(1))
    swizzled = fleet.target(models["nvfp4"], "interleaved", **options(1))
    with pytest.raises(LoadError, match="ep_size 1 here, 2 there"):
        shared.loaded()
    report = swizzled.report()
    assert (report["source"], report["resharded_from"]) == ("disk", 0)
    assert "its block scales are interleaved" in report["steps"][0]["reason"]
