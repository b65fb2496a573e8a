"""What a stage of a pipeline holds, and what ranks hold that share a batch: nothing of others', nothing twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runtime_families import FAMILIES, write_family
from runtime_models import CASES, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from weightwire.errors import CheckpointError, ConfigError, ManifestMismatch
from weightwire.manifest.catalogue import Catalogue, capture, catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.plan import plan
from weightwire.manifest.records import Manifest
from weightwire.runtime import (
    DecoderForCausalLM,
    LoaderSettings,
    ModelLoader,
    NoHooks,
    SafetensorsLoader,
    TpCoordinates,
    TpGroup,
    Weights,
)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    found = {name: write_family(root / name, name) for name in FAMILIES}
    return found | {"tied llama": write_checkpoint(root / "llama", CASES["biased_tied"])}


class Names(NoHooks):
    """Takes them at construction, before aliases are wired."""

    def constructed(self, model: nn.Module) -> None:
        self.taken = capture(model)


@dataclass
class Loaded:
    model: DecoderForCausalLM
    described: Catalogue

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """By canonical names, ties once each."""
        return {name: self.described.tensors[name] for name in self.described.parameters}

    @property
    def manifest(self) -> Manifest:
        layout = self.described.layout
        return Manifest(layout=layout, digests=digest_leaves(self.described.memory, layout.leaves))


def load(directory: Path, rank: int, size: int, pp: int = 1, *, adp: bool = False) -> Loaded:
    group = TpGroup.offline(TpCoordinates(size=size, rank=rank))
    settings, names = LoaderSettings(dtype=torch.float32, pp_size=pp, attention_dp=adp), Names()
    model = ModelLoader(group, settings, SafetensorsLoader(), names).load(directory).model
    return Loaded(model, catalogue(model, names.taken))


@pytest.mark.parametrize("family", [*FAMILIES, "tied llama"])
def test_stages_hold_every_parameter_once_but_for_the_embedding_of_a_tied_head(
    family: str, families: dict[str, Path]
) -> None:
    whole = load(families[family], 0, 1).parameters
    stages = [load(families[family], rank, 2, pp=2).parameters for rank in range(2)]
    tied = {"model.embed_tokens.weight"} if family in ("gemma2", "tied llama") else set()
    assert set(stages[0]) & set(stages[1]) == tied
    assert set(stages[0]) | set(stages[1]) == set(whole)
    assert all(tensor.numel() for stage in stages for tensor in stage.values())
    for stage in stages:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in stage.items())


def test_a_tied_head_stays_tied_on_the_last_stage(families: dict[str, Path]) -> None:
    first, last = (load(families["gemma2"], rank, 2, pp=2).model for rank in range(2))
    assert last.lm_head.weight is last.model.embed_tokens.weight
    assert not hasattr(first, "lm_head")
    assert not hasattr(first.model, "norm")


def test_h22_the_shard_of_another_stage_is_refused_before_the_first_byte(families: dict[str, Path]) -> None:
    """By names; in a table by tp rank alone, as others keep it, the second stage stands where the first one stood."""
    stages = [load(families["qwen3"], rank, 2, pp=2) for rank in range(2)]
    by_tp_rank = {stage.model.context.mapping.tp_rank: stage.manifest for stage in stages}
    assert len(by_tp_rank) == 1
    with pytest.raises(ManifestMismatch, match="model"):
        plan(stages[0].described.layout, by_tp_rank[0])
    plan(stages[1].described.layout, by_tp_rank[0])


def test_what_no_stage_takes_is_refused_and_what_one_lacks_is_named(families: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "odd"
    directory.mkdir()
    (directory / "config.json").write_text((families["qwen3"] / "config.json").read_text())
    tensors = load_file(families["qwen3"] / "model.safetensors")
    extra = tensors | {"model.layers.3.odd.weight": torch.zeros(2)}
    save_file(extra, directory / "model.safetensors", metadata={"format": "pt"})
    for rank in range(2):
        with pytest.raises(CheckpointError, match=r"model\.layers\.3\.odd\.weight has no place"):
            load(directory, rank, 2, pp=2)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    load(directory, 0, 2, pp=2)
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        load(directory, 1, 2, pp=2)


def test_more_stages_than_layers_are_refused(families: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="3 layers cannot be shared by 4 pipeline stages"):
        load(families["qwen3"], 0, 4, pp=4)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_ranks_that_share_a_batch_hold_all_but_experts_whole(family: str, families: dict[str, Path]) -> None:
    whole = load(families[family], 0, 1).parameters
    for rank in range(2):
        mine = load(families[family], rank, 2, adp=True).parameters
        cut = {name for name, tensor in mine.items() if tensor.shape != whole[name].shape}
        assert cut == {name for name in whole if ".experts." in name}
        assert all(torch.equal(mine[name], whole[name]) for name in set(mine) - cut)


def test_h15_experts_that_were_cut_before_are_not_cut_again_where_ranks_share_a_batch(
    families: dict[str, Path],
) -> None:
    """Attention's coordinates are 1 of 1 there with and without ``presharded``; those of experts must not follow."""
    loaded = load(families["qwen3_moe"], 1, 2, adp=True)
    kept = {name: tensor.clone() for name, tensor in loaded.parameters.items()}
    tensors = load_file(families["qwen3_moe"] / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.chunk(2, dim=1 if "down_proj" in name else 0)[1].contiguous()
    loaded.model.load_weights(Weights.of(tensors, presharded=True))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.parameters.items())


def test_a_model_without_experts_has_nothing_to_share_in_a_batch(families: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="has no experts to share; leave attention-dp out"):
        load(families["qwen3"], 0, 2, adp=True)
