"""Staged post-load steps: what transforms declare and do, and weights that arrive in either stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runtime_hooks import SINGLE, Injecting, Poisoning, Recorder, attention_of, poison, settings
from runtime_models import CASES, PROMPTS, write_checkpoint
from torch import nn

from weightwire.errors import ConfigError
from weightwire.runtime import (
    Injected,
    KernelLayout,
    LoadFormat,
    LoadRequest,
    ModelLoader,
    SafetensorsLoader,
    Stage,
    Weights,
    prepare_processed,
    prepare_raw,
    prompt_logits,
)
from weightwire.runtime.layers.packing import PackedLinear


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", CASES["gqa_llama3"])


def test_what_transforms_declare_is_what_they_do(checkpoint: Path) -> None:
    hooks = Recorder()
    declared: dict[str, str] = {}
    before: dict[str, nn.Parameter] = {}

    class Declaring(Recorder):
        def loaded(self, model: nn.Module) -> None:
            super().loaded(model)
            for name, (module, leaf) in self.places.items():
                before[name] = getattr(module, leaf)
                if isinstance(module, PackedLinear) and leaf in module.transform_effect():
                    declared[name] = module.transform_effect()[leaf]

    hooks = Declaring()
    ModelLoader(SINGLE, settings(KernelLayout.PACKED), Poisoning(), hooks).load(checkpoint)
    for name, (module, leaf) in hooks.places.items():
        after = getattr(module, leaf)
        replaced = after.data_ptr() != before[name].data_ptr()
        changed = replaced or not torch.equal(after, hooks.raw[name])
        assert declared.get(name) == ("replaces" if replaced else "in_place" if changed else None), name
    assert sorted(set(declared.values())) == ["in_place", "replaces"]


def test_plain_layout_transforms_nothing(checkpoint: Path) -> None:
    hooks = Recorder()
    ModelLoader(SINGLE, settings(), SafetensorsLoader(), hooks).load(checkpoint)
    assert all(torch.equal(tensor, hooks.raw[name]) for name, tensor in hooks.snapshot().items())
    packed = [module for module, _ in hooks.places.values() if isinstance(module, PackedLinear)]
    assert packed
    assert not any(module.transform_effect() for module in packed)


def test_raw_bytes_do_not_depend_on_the_layout(checkpoint: Path) -> None:
    plain, packed = Recorder(), Recorder()
    one = ModelLoader(SINGLE, settings(), SafetensorsLoader(), plain).load(checkpoint).model
    other = ModelLoader(SINGLE, settings(KernelLayout.PACKED), SafetensorsLoader(), packed).load(checkpoint).model
    assert all(torch.equal(tensor, packed.raw[name]) for name, tensor in plain.raw.items())
    assert one.raw_layout() == other.raw_layout() == "llama/unquantized/v1"
    assert one.processed_layout() != other.processed_layout()


def test_transforms_run_once_and_stages_are_idempotent(checkpoint: Path) -> None:
    hooks = Recorder()
    model = ModelLoader(SINGLE, settings(KernelLayout.PACKED), SafetensorsLoader(), hooks).load(checkpoint).model
    first = hooks.snapshot()
    model.post_load_weights()
    for module, _ in hooks.places.values():
        if isinstance(module, PackedLinear):
            module.post_load_weights()
    assert all(torch.equal(tensor, first[name]) for name, tensor in hooks.snapshot().items())


def test_packed_attention_has_the_bits_of_plain(checkpoint: Path) -> None:
    """The permutation itself rounds nothing: the same numbers come out, element for element."""
    models = [
        ModelLoader(SINGLE, settings(layout), SafetensorsLoader()).load(checkpoint).model for layout in KernelLayout
    ]
    for layer in range(2):
        plain, packed = (attention_of(model, layer).qkv_proj for model in models)
        assert packed.weights_are_packed
        assert not torch.equal(plain.weight, packed.weight)
        heads = plain.weight[: plain.q_rows + plain.kv_rows].reshape(-1, plain.head_dim, plain.in_features)
        order = torch.arange(plain.head_dim).reshape(2, -1).t().flatten()
        assert torch.equal(packed.weight[: plain.q_rows + plain.kv_rows], heads[:, order].flatten(0, 1))
        assert torch.equal(packed.weight[plain.q_rows + plain.kv_rows :], plain.weight[plain.q_rows + plain.kv_rows :])


@pytest.mark.parametrize("layout", KernelLayout)
@pytest.mark.parametrize("stage", ["LOADED", "PROCESSED"])
@pytest.mark.parametrize("case", ["gqa_llama3", "biased_tied"])
def test_injected_weights_give_the_same_model(case: str, stage: Stage, layout: KernelLayout, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", CASES[case])
    source = Recorder()
    model = ModelLoader(SINGLE, settings(layout), SafetensorsLoader(), source).load(directory).model
    tensors = source.raw if stage == "LOADED" else source.snapshot()
    (directory / "model.safetensors").unlink()
    loader, hooks = Injecting(tensors, stage), Recorder()
    result = ModelLoader(SINGLE, settings(layout, LoadFormat.PRESHARDED), loader, hooks).load(directory)
    assert result.injected == Injected(stage, "report")
    assert ("loaded" in hooks.events) == (stage == "LOADED")
    transforms = stage == "LOADED" and layout is KernelLayout.PACKED  # plain changes nothing: there is nothing to guard
    assert any(event.startswith("before") for event in hooks.events) == transforms
    assert hooks.events[-1] == "post_loaded"
    assert loader.cleaned == 1
    assert torch.equal(prompt_logits(result.model, PROMPTS), prompt_logits(model, PROMPTS))


def test_a_failed_processed_receive_can_be_filled_raw(checkpoint: Path) -> None:
    """Shapes change for the processed stage; when its bytes do not come, the disk must find the raw ones again."""

    class Failing(SafetensorsLoader):
        def load_weights(self, request: LoadRequest) -> Weights:
            prepare_processed(request.model)
            poison(request.model)
            prepare_raw(request.model)
            return super().load_weights(request)

    presharded = settings(KernelLayout.PACKED, LoadFormat.PRESHARDED)
    model = ModelLoader(SINGLE, presharded, Failing()).load(checkpoint).model
    expected = ModelLoader(SINGLE, settings(KernelLayout.PACKED), SafetensorsLoader()).load(checkpoint).model
    assert torch.equal(prompt_logits(model, PROMPTS), prompt_logits(expected, PROMPTS))


def test_injection_is_refused_under_auto(checkpoint: Path) -> None:
    hooks = Recorder()
    ModelLoader(SINGLE, settings(), SafetensorsLoader(), hooks).load(checkpoint)
    loader = Injecting(hooks.raw, "LOADED")
    with pytest.raises(ConfigError, match="injected weights under load format auto"):
        ModelLoader(SINGLE, settings(), loader).load(checkpoint)
    assert loader.cleaned == 1
