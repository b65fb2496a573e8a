"""What a receiver that knows names and sizes alone makes of each model, beside ours on the same case.

Each test carries the naive way out on a real model, shows what it computes then, and that ours is right or refuses.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from naive_models import FAMILIES, FORMS, Side, as_bytes, by_name, empty, loaded, parameters, receive, spoil
from safetensors.torch import load_file
from torch import nn

from weightwire.errors import ManifestMismatch
from weightwire.manifest.catalogue import capture
from weightwire.manifest.plan import plan
from weightwire.runtime import LayerContext, TpGroup, Weights, construct, read_config
from weightwire.runtime.layers.mla import MlaAttention
from weightwire.runtime.layers.rotary import RotaryEmbedding

QUANTIZED = ("fp8_static", "nvfp4_awq")
OWNER, VIEW = "model.layers.0.self_attn.kv_b_proj.weight", "model.layers.0.self_attn.v_b_proj"


def differ(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits are visibly other ones, or no numbers."""
    return not torch.allclose(found, wanted, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("case", [*FAMILIES, *QUANTIZED])
def test_h01_names_that_alias_wiring_made_leave_a_part_of_the_model_unfilled(
    case: str, models: dict[str, Path]
) -> None:
    source = loaded(models[case])
    source.model.setup_aliases()
    naive = empty(models[case])
    left = by_name(parameters(source), naive.model)
    assert "model.layers.1.self_attn.o_proj.weight" in left or "model.layers.1.self_attn.qkv_proj.weight" in left
    ours = receive(source, empty(models[case]))
    wanted = source.finish().logits()
    assert torch.equal(ours.logits(), wanted)
    assert ours.manifest().content_id == source.manifest().content_id
    assert differ(naive.finish().logits(), wanted)


def without_ties(directory: Path) -> Side:
    """Built as ``to_empty`` builds: each tie and view is a storage of its own."""
    model = construct(read_config(directory), {}, LayerContext(TpGroup.single(), torch.float32))
    names = capture(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module.cos_sin_cache = torch.empty_like(module.cos_sin_cache, device="cpu")
            module.init_derived()
    spoil(model)
    return Side(model=model, names=names)


def test_h02_a_tied_head_that_another_construction_untied_is_filled_though_nobody_lists_it(
    models: dict[str, Path],
) -> None:
    source = loaded(models["gemma2"])
    assert "lm_head.weight" not in parameters(source)
    assert sum(as_bytes(tensor).numel() for _, tensor in source.model.named_parameters(remove_duplicate=False)) > sum(
        entry.nbytes for entry in source.manifest().layout.entries if entry.name in parameters(source)
    )  # read by every name, it would travel twice
    naive, ours = without_ties(models["gemma2"]), without_ties(models["gemma2"])
    assert by_name(parameters(source), naive.model) == ["lm_head.weight"]
    assert naive.model.lm_head.weight is not naive.model.model.embed_tokens.weight
    receive(source, ours)
    wanted = source.finish().logits()
    assert differ(naive.finish().logits(), wanted)
    assert torch.equal(ours.logits(), wanted)
    assert ours.manifest().content_id == source.manifest().content_id


@torch.no_grad()
def test_h03_a_view_that_was_copied_as_a_tensor_of_its_own_does_not_follow_its_owner(models: dict[str, Path]) -> None:
    source = loaded(models["deepseek_v3"])
    twice = sum(tensor.nbytes for tensor in parameters(source).values())
    assert twice > sum(entry.nbytes for entry in source.manifest().layout.entries if entry.kind == "weight")
    naive, ours = empty(models["deepseek_v3"]), empty(models["deepseek_v3"])
    for module in naive.model.modules():
        if isinstance(module, MlaAttention):  # names and sizes say nothing of where a tensor lies
            module.v_b_proj = nn.Parameter(module.v_b_proj.detach().clone(), requires_grad=False)
    assert by_name(parameters(source), naive.model) == []
    receive(source, ours)
    tokens = source.finish().tokens()
    assert naive.finish().tokens() == ours.tokens() == tokens  # the bytes are right so far
    for side in (source, naive, ours):  # an update of what the checkpoint knows: the keys' and values' projection
        for module in side.model.modules():
            if isinstance(module, MlaAttention):
                module.kv_b_proj.weight[module.kv_b_proj.key_rows :].mul_(-1.5)
    assert ours.tokens() == source.tokens() != tokens
    assert naive.tokens() != source.tokens()
    assert VIEW not in ours.catalogue().tensors
    assert OWNER in ours.catalogue().tensors


@pytest.mark.parametrize(
    ("form", "refusal"),
    [
        ("w4a16_awq", r"pre_quant_scale.* is None here but a tensor at the source"),
        ("nvfp4_awq", r"pre_quant_scale.* is None here but a tensor at the source"),
        ("fp8_dynamic", r"input_scale.* is None at the source but a tensor here"),
        ("nvfp4", "scalar_alpha differ"),
    ],
    ids=["created", "created and scalar", "removed", "scalar"],
)
def test_h04_h05_h06_what_only_loading_decides_is_wrong_by_name_and_refused_where_it_did_not_travel(
    form: str, refusal: str, models: dict[str, Path]
) -> None:
    source = loaded(models[form])
    naive = empty(models[form])
    for name, tensor in naive.model.named_parameters():
        if name.endswith("input_scale"):
            tensor.fill_(1.0)  # what a constructor would have given it
    left = by_name(parameters(source), naive.model)
    assert bool(left) == (form == "fp8_dynamic")
    with pytest.raises(ManifestMismatch, match=refusal):
        plan(empty(models[form]).catalogue().layout, source.manifest())
    ours = receive(source, empty(models[form]))
    wanted = source.finish().logits()
    assert torch.equal(ours.logits(), wanted)
    assert differ(naive.finish().logits(), wanted)


def test_h04_a_scale_that_the_target_alone_has_is_refused_too(models: dict[str, Path]) -> None:
    """The other direction: a target that loaded before keeps what its old checkpoint had."""
    source, target = loaded(models["fp8_dynamic"]), loaded(models["fp8_static"])
    with pytest.raises(ManifestMismatch, match=r"is None at the source but a tensor here"):
        plan(target.catalogue().layout, source.manifest())
    with pytest.raises(ManifestMismatch, match=r"is None here but a tensor at the source"):
        plan(source.catalogue().layout, target.manifest())


def test_every_form_of_a_quantized_llama_is_received_exactly(models: dict[str, Path]) -> None:
    for form in FORMS:
        source = loaded(models[form])
        ours = receive(source, empty(models[form]))
        assert ours.manifest().content_id == source.manifest().content_id, form
        assert torch.equal(ours.logits(), source.finish().logits()), form


@torch.no_grad()
def test_h40_ids_that_are_kept_by_address_are_those_of_bytes_that_are_gone(models: dict[str, Path]) -> None:
    """A refresh in place: the same addresses, other weights."""
    source = loaded(models["qwen3_moe"])
    before = source.catalogue()
    old = source.manifest()
    by_address = {tensor.data_ptr(): bytes(as_bytes(tensor)[:64].numpy()) for tensor in before.tensors.values()}
    other = {name: tensor * 0.5 for name, tensor in load_file(models["qwen3_moe"] / "model.safetensors").items()}
    source.model.load_weights(Weights.of(other))
    now = source.catalogue()
    assert {tensor.data_ptr() for tensor in now.tensors.values()} == by_address.keys()  # nothing looks new
    stale = [n for n, t in now.tensors.items() if by_address[t.data_ptr()] != bytes(as_bytes(t)[:64].numpy())]
    assert len(stale) > 10
    assert source.manifest().content_id != old.content_id
    again = receive(source, empty(models["qwen3_moe"]))
    assert torch.equal(again.logits(), source.finish().logits())
