"""Checkpoint loaders that return tensors which were cut before: each rank's own files, in Hugging Face's names.

The same manifests as from the full checkpoint, for experts, latent attention, replicated KV heads and all scales; and
what cutting them once more, or not cutting whole ones afterwards, makes of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from manifest_support import manifest_of
from naive_models import BLOCKS_PARTLY, FORMS, as_bytes, loaded, spoil
from presharded_files import RankFiles, rank_tensors, write_ranks
from runtime_models import write_checkpoint
from safetensors.torch import load_file
from torch import nn

from weightwire.errors import CheckpointError
from weightwire.manifest.catalogue import ConstructionNames, capture, catalogue
from weightwire.manifest.records import Manifest
from weightwire.runtime import (
    DecoderForCausalLM,
    LoaderSettings,
    Mapping,
    MemorySource,
    ModelLoader,
    NoHooks,
    TpCoordinates,
    TpGroup,
    Weights,
)
from weightwire.runtime.layers.linear import Linear
from weightwire.runtime.layers.moe import FusedMoE

# model, ranks, groups of experts among them
CASES = [
    ("qwen3", 2, 1),
    ("qwen3", 4, 1),
    ("qwen3_moe", 2, 1),
    ("qwen3_moe", 2, 2),
    ("qwen3_moe", 4, 2),
    ("deepseek_v3", 2, 1),
    ("deepseek_v3", 4, 2),
    ("gemma2", 2, 1),
    *((form, 2, 1) for form in (*FORMS, BLOCKS_PARTLY)),
]


class Raw(NoHooks):
    """Takes the manifest of the raw bytes, over memory that was full of garbage."""

    names: ConstructionNames
    manifest: Manifest

    def constructed(self, model: nn.Module) -> None:
        self.names = capture(model)

    def filling(self, model: nn.Module) -> None:
        spoil(model)

    def loaded(self, model: nn.Module) -> None:
        self.manifest = manifest_of(catalogue(model, self.names))


class Rank:
    """One rank of a replica that loads from its own file; ``model`` and ``raw`` are there once it has."""

    def __init__(self, directory: Path, tp: int, rank: int, ep: int = 1, *, presharded: bool = True) -> None:
        self.directory, self.raw = directory, Raw()
        group = TpGroup.offline(TpCoordinates(size=tp, rank=rank))
        settings = LoaderSettings(dtype=torch.float32, ep_size=ep)
        self.loader = ModelLoader(group, settings, RankFiles(presharded=presharded), self.raw)

    def load(self) -> DecoderForCausalLM:
        return self.loader.load(self.directory).model


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_h14_h15_h16_h18_each_rank_s_own_files_are_the_full_checkpoint_and_so_is_what_is_loaded_afterwards(
    case: tuple[str, int, int], models: dict[str, Path], tmp_path: Path
) -> None:
    name, tp, ep = case
    directory = write_ranks(models[name], tmp_path / "ranks", tp, ep)
    whole = Weights.of(load_file(models[name] / "model.safetensors"))
    for number in range(tp):
        wanted = loaded(models[name], tp=tp, rank=number, ep=ep).manifest()
        rank = Rank(directory, tp, number, ep)
        model = rank.load()
        assert rank.raw.manifest.content_id == wanted.content_id
        # naive: the flag sticks to the modules, and whole tensors are not cut
        with pytest.raises(CheckpointError, match="the model needs"):
            rank.loader.reload(model, Weights(whole.tensors, presharded=True))
        spoil(model)
        rank.loader.reload(model, whole)
        assert rank.raw.manifest.content_id == wanted.content_id
        # naive: no flag at all, and what was cut is cut again
        with pytest.raises(CheckpointError, match="the model needs"):
            Rank(directory, tp, number, ep, presharded=False).load()


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith(("fp8_static", "fp8_dynamic"))])
def test_h14_scales_that_were_cut_with_their_shard_and_once_more_are_refused_by_name_and_would_be_wrong(
    form: str, models: dict[str, Path]
) -> None:
    """A flag that only weights obey: the shard is whole, and its scales are a half of what belongs to it."""
    leaf = "weight_scale_inv" if form == "fp8_block" else "weight_scale"
    config, tensors = config_of(models[form]), load_file(models[form] / "model.safetensors")
    mine = rank_tensors(config, tensors, 2, 1)
    again = rank_tensors(config, {name: t for name, t in mine.items() if name.endswith(leaf)}, 2, 1)
    side = loaded(models[form], tp=2, rank=1)
    with pytest.raises(CheckpointError, match=rf"_proj\.{leaf} has shape"):
        side.model.load_weights(Weights.of(mine | again, presharded=True))
    side.model.load_weights(Weights.of(mine, presharded=True))
    layer = side.model.model.decoder_layers[0].mlp.down_proj
    if form in ("int8_weight_only", "fp8_rowwise"):  # there a row-parallel layer's scales are whole on every rank
        layer = side.model.model.decoder_layers[0].self_attn.qkv_proj
    assert isinstance(layer, Linear)
    right = layer.method.dequantised(layer).clone()  # type: ignore[attr-defined]
    scales = as_bytes(layer.weight_scale)
    half = scales.numel() // 2
    scales[:half] = scales[half : 2 * half].clone()  # what is left of them, where the naive copy puts it
    assert not torch.allclose(layer.method.dequantised(layer), right, rtol=0.01)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "tp", "ep"), [("qwen3_moe", 2, 1), ("deepseek_v3", 2, 1), ("qwen3_moe", 4, 2)])
@torch.no_grad()
def test_h15_experts_that_do_not_hear_of_it_are_cut_again_and_compute_something_else(
    name: str, tp: int, ep: int, models: dict[str, Path]
) -> None:
    config, tensors = config_of(models[name]), load_file(models[name] / "model.safetensors")
    x = torch.linspace(-1, 1, 3 * config["hidden_size"]).view(3, -1)
    outputs: dict[str, torch.Tensor] = {}
    for rank in range(0, tp, ep):  # those that share the first experts
        side = loaded(models[name], tp=tp, rank=rank, ep=ep)
        mine = rank_tensors(config, tensors, tp, rank, ep)
        target = next(
            each
            for each in side.model.weight_mapper().targets(side.model.loadable_layers())
            if isinstance(each.layer, FusedMoE)
        )
        layer = target.layer
        assert isinstance(layer, FusedMoE)
        sources = {key: MemorySource(key, tensor) for key, tensor in mine.items()}
        parts = side.model.weight_mapper().parts(target, sources)
        with pytest.raises(CheckpointError, match=r"experts\.0\..*the model needs"):
            layer.load_weights(parts, layer.context.tp)  # the layer's own coordinates, whatever the others do
        side.model.load_weights(Weights.of(mine, presharded=True))
        outputs["ours"] = outputs.get("ours", torch.zeros(())) + layer.method.apply(layer, 0, x)
        again = rank_tensors(config, {k: t for k, t in mine.items() if ".experts." in k}, tp, rank, ep)
        width = again[f"{target.prefixes[0]}.up_proj.weight"].shape[0]
        layer.w3_w1_weight[0].zero_()
        layer.w3_w1_weight[0, :width] = again[f"{target.prefixes[0]}.up_proj.weight"]
        layer.w3_w1_weight[0, layer.local_width :][:width] = again[f"{target.prefixes[0]}.gate_proj.weight"]
        outputs["naive"] = outputs.get("naive", torch.zeros(())) + layer.method.apply(layer, 0, x)
    whole = loaded(models[name])
    layer = next(module for module in whole.model.modules() if isinstance(module, FusedMoE))
    wanted = layer.method.apply(layer, 0, x)
    torch.testing.assert_close(outputs["ours"], wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs["naive"], wanted, rtol=0.01)


def naively_duplicated(k: torch.Tensor, head_dim: int, tp: int) -> torch.Tensor:
    """Heads repeated until there is one for each rank, counted by the rows that happen to be there."""
    heads = k.view(-1, head_dim, k.shape[-1])
    return heads.repeat_interleave(max(1, tp // heads.shape[0]), 0).flatten(0, 1)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_h16_kv_heads_are_those_of_the_model_not_of_the_shard_s_rows(
    tp: int, models: dict[str, Path], tmp_path: Path
) -> None:
    """Two KV heads: one a rank on two ranks, each on several beyond."""
    config, tensors = config_of(models["qwen3"]), load_file(models["qwen3"] / "model.safetensors")
    directory = write_ranks(models["qwen3"], tmp_path / "ranks", tp)
    key = "model.layers.0.self_attn.k_proj.weight"
    for number in range(tp):
        rank = Rank(directory, tp, number)
        rank.load()
        assert rank.raw.manifest.content_id == loaded(models["qwen3"], tp=tp, rank=number).manifest().content_id
        mine = rank_tensors(config, tensors, tp, number)
        mine[key] = naively_duplicated(mine[key], config["head_dim"], tp)
        assert len(mine[key]) > config["head_dim"]
        side = loaded(models["qwen3"], tp=tp, rank=number)
        with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape"):
            side.model.load_weights(Weights.of(mine, presharded=True))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "deepseek_v3", "gemma2", "fp8_rowwise"])
@torch.no_grad()
def test_h17_padding_rows_that_were_not_sent_are_garbage_that_a_plain_argmax_finds(
    name: str, models: dict[str, Path]
) -> None:
    """97 tokens on two ranks: the second one has a row that stands for none."""
    source, naive = (loaded(models[name], tp=2, rank=1) for _ in range(2))
    spoil(naive.model)
    real = source.model.lm_head.real_rows
    assert real == source.model.lm_head.weight.shape[0] - 1
    for mine, theirs in zip(naive.model.parameters(), source.model.parameters(), strict=True):
        rows = real if mine.shape[0] == real + 1 and mine.dim() > 1 else mine.shape[0]  # as the checkpoint has them
        as_bytes(mine[:rows]).copy_(as_bytes(theirs[:rows])) if mine.dim() else mine.copy_(theirs)
    hidden = torch.ones(source.model.config.hidden_size)
    tokens = [nn.functional.linear(hidden, side.model.lm_head.weight).argmax().item() for side in (source, naive)]
    assert tokens[0] < real == tokens[1]
    assert naive.manifest().content_id != source.manifest().content_id
    sent = {entry.name: entry for entry in source.manifest().layout.entries}["model.embed_tokens.weight"]
    assert sent.shape[0] == real + 1


def test_h18_a_biased_model_takes_its_ranks_files_too(tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": True}
    checkpoint = write_checkpoint(tmp_path / "biased", changes)
    directory = write_ranks(checkpoint, tmp_path / "ranks", 4)
    for number in range(4):
        rank = Rank(directory, 4, number)
        rank.load()
        assert rank.raw.manifest.content_id == loaded(checkpoint, tp=4, rank=number).manifest().content_id


def test_the_coordinates_of_a_case_are_those_of_the_mapping() -> None:
    """That the files are written for the ranks that read them is not by chance: four ranks, two groups of experts."""
    assert [Mapping.for_tp(rank, 4, 2).moe_ep.rank for rank in range(4)] == [0, 1, 0, 1]
    assert [Mapping.for_tp(rank, 4, 2).moe_tp.rank for rank in range(4)] == [0, 0, 1, 1]
