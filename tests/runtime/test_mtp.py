"""Layers for multi-token prediction, against a computation straight from the checkpoint's tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runtime_families import PROMPTS, write_family
from runtime_mtp import expected_mtp, write_mtp
from safetensors.torch import load_file, save_file

from weightwire.errors import CheckpointError, ConfigError
from weightwire.manifest.catalogue import capture, catalogue
from weightwire.runtime import (
    DecoderForCausalLM,
    KernelLayout,
    LayerContext,
    LoaderSettings,
    ModelLoader,
    SafetensorsLoader,
    TpCoordinates,
    TpGroup,
    construct,
    generate,
    mtp_logits,
    prompt_logits,
    read_config,
)

LAYER = "model.layers.3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_mtp(tmp_path_factory.mktemp("mtp") / "deepseek")


def load(directory: Path, layout: KernelLayout = KernelLayout.PLAIN, *, mtp: bool = True) -> DecoderForCausalLM:
    settings = LoaderSettings(dtype=torch.float32, kernel_layout=layout, mtp=mtp)
    return ModelLoader(TpGroup.single(), settings, SafetensorsLoader()).load(directory).model


@pytest.mark.parametrize("layout", KernelLayout)
def test_drafts_equal_the_reference(layout: KernelLayout, checkpoint: Path) -> None:
    (drafted,) = mtp_logits(load(checkpoint, layout), PROMPTS)
    reference = expected_mtp(checkpoint)
    torch.testing.assert_close(drafted, reference, atol=5e-4, rtol=1e-4)
    assert len({int(token) for token in reference.argmax(-1)}) > 1


def test_the_model_itself_is_the_same_with_them_and_without(checkpoint: Path) -> None:
    models = [load(checkpoint, mtp=mtp) for mtp in (True, False)]
    logits = [prompt_logits(model, PROMPTS) for model in models]
    assert torch.equal(*logits)
    assert generate(models[0], PROMPTS, max_new_tokens=4) == generate(models[1], PROMPTS, max_new_tokens=4)
    with pytest.raises(ConfigError, match="loaded without layers for multi-token prediction"):
        mtp_logits(models[1], PROMPTS)


@pytest.mark.parametrize("pp", [1, 2])
def test_what_is_shared_with_the_model_is_held_and_described_once(pp: int, checkpoint: Path) -> None:
    ranks = TpGroup.offline(TpCoordinates(size=pp, rank=pp - 1))
    settings = LoaderSettings(dtype=torch.float32, mtp=True, pp_size=pp)
    loader = ModelLoader(ranks, settings, SafetensorsLoader())
    context = LayerContext.of(ranks, loader.mapping, torch.float32)
    names = capture(construct(read_config(checkpoint).with_mtp(), {}, context))
    described = catalogue(loader.load(checkpoint).model, names).layout
    found = [name for entry in described.entries for name in (entry.name, *(view.name for view in entry.views))]
    assert f"{LAYER}.eh_proj.weight" in found
    assert [name for name in found if name.endswith(("embed_tokens.weight", "head.weight"))] == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_is_none_is_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """The model's own would be used in its place: silently another draft."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[f"{LAYER}.{name}.weight"][7, 3] += 1
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{LAYER}.{name}.weight is not the model's own"):
        load(tmp_path)
    load(tmp_path, mtp=False)
    del tensors[f"{LAYER}.{name}.weight"]  # as checkpoints without copies
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)


def test_a_checkpoint_without_them_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[f"{LAYER}.eh_proj.weight"]
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks tensor {LAYER}.eh_proj.weight"):
        load(tmp_path)


def test_a_model_that_has_none_is_refused(tmp_path: Path) -> None:
    directory = write_family(tmp_path / "qwen3", "qwen3")
    assert "num_nextn_predict_layers" not in json.loads((directory / "config.json").read_text())
    with pytest.raises(ConfigError, match="names no layers for multi-token prediction; leave mtp out"):
        load(directory)
