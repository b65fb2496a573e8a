"""Checkpoints that leave modules out of their quantization: computed as transformers does, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_families import COMMON, NEW_TOKENS, PROMPTS, continued, write_family
from runtime_models import write_checkpoint
from runtime_mtp import write_mtp
from runtime_quantized import (
    BLOCK_DIMS,
    DIMS,
    FAMILY_BLOCK_DIMS,
    FAMILY_DIMS,
    KIMI,
    LEAVES_OUT,
    float_reference,
    leave_activations,
    quantized,
)
from runtime_ranks import child_environment
from safetensors.torch import load_file

from weightwire.engines.native.identity import native_identities
from weightwire.errors import CheckpointError, ConfigError
from weightwire.runtime import (
    DecoderForCausalLM,
    KernelLayout,
    LayerContext,
    LoaderSettings,
    Mapping,
    ModelLoader,
    SafetensorsLoader,
    TpGroup,
    construct,
    generate,
    prompt_logits,
    read_config,
)
from weightwire.runtime.layers.latent import KeyValueLinear
from weightwire.runtime.layers.linear import Linear
from weightwire.runtime.layers.moe import FusedMoE
from weightwire.runtime.quantization.left_out import LeftOut
from weightwire.types import Stage

CLOSE = 1e-5
"""As in ``test_quantized_families``."""

LATENT = "model.layers.0.self_attn."


@dataclass(frozen=True)
class Case:
    """A family, or ``kimi``, in a format, but for what is left out."""

    family: str
    form: str
    leave_out: tuple[str, ...]


CASES = {
    "kimi": Case("kimi", "nvfp4", LEAVES_OUT["kimi"]),
    "deepseek_attention": Case("deepseek_v3", "nvfp4", ("*self_attn*",)),
    "qwen3_moe_attention": Case("qwen3_moe", "nvfp4", ("*self_attn*",)),
    "llama_o_proj": Case("llama", "fp8_block", LEAVES_OUT["llama"]),
    "one_layer": Case("llama", "int8_weight_only", ("model.layers.1",)),
    # one of the two that are rotated has packed rows in another order
    "rotary_queries": Case("deepseek_v3", "nvfp4", (f"{LATENT}q_b_proj",)),
    "rotary_keys": Case("deepseek_v3", "nvfp4", (f"{LATENT}q_a_proj", f"{LATENT}kv_a_proj_with_mqa")),
    "shared_experts": Case("deepseek_v3", "fp8_block", ("*shared_experts*", "model.layers.1.self_attn.kv_b_proj")),
    # int8 is for linear layers alone
    "experts": Case("qwen3_moe", "int8_weight_only", ("*.mlp.experts.*",)),
}


@dataclass
class Made:
    """Checkpoints, each made once."""

    root: Path
    known: dict[str, Path] = field(default_factory=dict)

    def __call__(self, case: str) -> Path:
        if case not in self.known:
            given = CASES[case]
            blocks, source = given.form == "fp8_block", self.root / f"{case}-float"
            if given.family == "llama":
                write_checkpoint(source, BLOCK_DIMS if blocks else DIMS)
            elif given.family == "kimi":
                write_family(source, "deepseek_v3", changes=KIMI)
            else:
                dims = FAMILY_BLOCK_DIMS if blocks else FAMILY_DIMS
                write_family(source, given.family, changes=dims[given.family])
            self.known[case] = quantized(source, self.root / case, given.form, given.leave_out)
        return self.known[case]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    return Made(tmp_path_factory.mktemp("partly"))


def loaded(directory: Path, layout: KernelLayout = KernelLayout.PLAIN, *, mtp: bool = False) -> DecoderForCausalLM:
    settings = LoaderSettings(dtype=torch.float32, kernel_layout=layout, mtp=mtp)
    return ModelLoader(TpGroup.single(), settings, SafetensorsLoader()).load(directory).model


def stored_as(model: DecoderForCausalLM) -> Iterator[tuple[str, str, bool]]:
    """Of each linear layer and all experts of a layer: path, name of the method, whether its weight has scales."""
    for name, module in model.named_modules():
        if isinstance(module, Linear | FusedMoE | KeyValueLinear):
            leaves = [leaf for leaf, _ in module.named_parameters(recurse=False)]
            yield name, module.method.name, any("scal" in leaf or "alpha" in leaf for leaf in leaves)


@pytest.mark.parametrize("layout", KernelLayout)
@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_is_computed_as_transformers_does(
    case: str, layout: KernelLayout, made: Made, tmp_path: Path
) -> None:
    """All layers, through prefill and decoding, with activations in float32 on both sides."""
    form, directory = CASES[case].form, made(case)
    resmoothed = form == "fp8_block" and layout is KernelLayout.PACKED
    logits, tokens = continued(float_reference(directory, form, tmp_path / "reference", resmoothed=resmoothed))
    model = loaded(directory, layout)
    leave_activations(model)
    found = prompt_logits(model, PROMPTS)
    assert float((found - logits).norm() / logits.norm()) < CLOSE
    assert generate(model, PROMPTS, max_new_tokens=NEW_TOKENS) == tokens


@pytest.mark.parametrize("case", CASES)
def test_a_layer_knows_its_path_and_both_kinds_are_in_the_model(case: str, made: Made) -> None:
    directory = made(case)
    config, model = read_config(directory), loaded(directory)
    assert config.quantization is not None
    for name, module in model.loadable_layers():
        if isinstance(module, Linear | FusedMoE):
            assert module.context.path == name
            alone = LeftOut.parse(module.checkpoint_prefixes(name))
            assert replace(config.quantization, left_out=alone).partly(config.num_layers), name
    kinds = list(stored_as(model))
    assert {method for _, method, _ in kinds} == {"unquantized", config.quantization.name}
    for name, method, scaled in kinds:
        assert scaled is (method != "unquantized"), name
    assert config.partly_quantized
    names = model.raw_layout().split("/")[1].split("+")
    assert names == [config.quantization.name, "unquantized"]


def rewritten(source: Path, target: Path, **section: Any) -> Path:
    """The same tensors under another ``quantization_config``."""
    target.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    raw["quantization_config"] |= section
    (target / "config.json").write_text(json.dumps(raw))
    (target / "model.safetensors").symlink_to(source / "model.safetensors")
    return target


def test_a_layer_that_is_stored_the_other_way_is_refused_before_the_first_byte(made: Made, tmp_path: Path) -> None:
    """What the config says and what the files hold, each the other way round."""
    less = rewritten(made("qwen3_moe_attention"), tmp_path / "less", exclude_modules=["model.layers.0.self_attn*"])
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.1\.self_attn\.k_proj\.input_scale"):
        loaded(less)
    more = rewritten(made("qwen3_moe_attention"), tmp_path / "more", exclude_modules=["*self_attn*", "*experts*"])
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.0\.down_proj\.input_scale and .* has no place"):
        loaded(more)


@torch.no_grad()
def test_a_layer_that_took_the_other_method_s_bytes_would_compute_something_else(made: Made) -> None:
    """What the check of names keeps from happening: numbers without their scales."""
    model, whole = loaded(made("one_layer")), loaded(made("one_layer"))
    names = {name: method for name, method, _ in stored_as(model)}
    assert names["model.layers.0.mlp.down_proj"] == "int8_weight_only"
    quantized_layer, plain = (model.get_submodule(f"model.layers.{at}.mlp.down_proj") for at in (0, 1))
    assert isinstance(quantized_layer, Linear)
    assert isinstance(plain, Linear)
    quantized_layer.method = plain.method
    quantized_layer.weight = torch.nn.Parameter(quantized_layer.weight.t().float(), requires_grad=False)
    assert not torch.allclose(prompt_logits(model, PROMPTS), prompt_logits(whole, PROMPTS), rtol=0.1)


@pytest.mark.parametrize(
    ("case", "leave_out", "words"),
    [
        ("llama_o_proj", "model.layers.0.self_attn.k_proj", "self_attn.k_proj and not model.layers.0.self_attn.q_proj"),
        ("llama_o_proj", "*.1.mlp.gate_proj", "layers.1.mlp.gate_proj and not model.layers.1.mlp.up_proj"),
        ("qwen3_moe_attention", "*.experts.3.*", "experts.3.gate_proj and not model.layers.0.mlp.experts.0.gate_proj"),
        ("qwen3_moe_attention", "*.experts.*.up_proj", "experts.0.up_proj and not model.layers.0.mlp.experts.0.gate_"),
        ("shared_experts", f"{LATENT}q_a_proj", "self_attn.q_a_proj and not model.layers.0.self_attn.kv_a_proj_with"),
    ],
)  # fmt: skip
def test_a_layer_of_which_parts_are_left_out_is_refused_by_name(
    case: str, leave_out: str, words: str, made: Made, tmp_path: Path
) -> None:
    directory = rewritten(made(case), tmp_path / "some", ignore=[leave_out])
    with pytest.raises(ConfigError, match="both are parts of one layer") as caught:
        loaded(directory)
    assert words in str(caught.value)


def test_experts_of_which_another_rank_s_are_left_out_are_refused_on_every_rank(made: Made, tmp_path: Path) -> None:
    some = rewritten(made("qwen3_moe_attention"), tmp_path / "some", exclude_modules=["*self_attn*", "*.experts.7.*"])
    for rank in range(2):
        mapping = Mapping.for_tp(rank, 2, 2)
        context = LayerContext(TpGroup.offline(mapping.tp), torch.float32, placement=mapping)
        with pytest.raises(ConfigError, match=r"experts\.7\.gate_proj and not .*experts\.0\.gate_proj"):
            construct(read_config(some), {}, context)


def test_kv_b_proj_is_left_out_layer_by_layer(made: Made, tmp_path: Path) -> None:
    some = rewritten(made("deepseek_attention"), tmp_path / "some", exclude_modules=["model.layers.0.self_attn*"])
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.kv_b_proj with nvfp4 weights is not supported"):
        loaded(some)


def identities(directory: Path, mapping: Mapping | None = None) -> dict[Stage, str]:
    found = native_identities(
        directory,
        read_config(directory),
        model_id="one",
        revision=None,
        dtype="bfloat16",
        kernel_layout=KernelLayout.PLAIN,
        mapping=mapping or Mapping.for_tp(0, 1),
    )
    return {stage: identity.replica_key for stage, identity in found.items()}


def test_checkpoints_that_leave_out_different_things_share_no_identity(made: Made, tmp_path: Path) -> None:
    source = made("llama_o_proj")
    texts = ((), ("*.o_proj",), ("model.layers.0.self_attn.o_proj",), ("model.layers.1.self_attn.o_proj",))
    found = [identities(rewritten(source, tmp_path / str(at), ignore=list(text), modules_to_not_convert=[]))
             for at, text in enumerate(texts)]  # fmt: skip
    for stage in Stage:
        assert len({each[stage] for each in found}) == len(texts)
    assert found[1] == identities(tmp_path / "1")


def test_stages_of_which_one_is_quantized_and_one_is_not_share_an_identity(made: Made) -> None:
    first, second = (identities(made("one_layer"), Mapping.of_rank(rank, 2, pp_size=2)) for rank in range(2))
    assert first == second


def test_names_of_nothing_that_could_be_quantized_leave_nothing_out(made: Made, tmp_path: Path) -> None:
    names = ["lm_head", "model.norm", "model.layers.0.mlp.gate", "*.input_layernorm", "re:.*mlp.gate$", "vision_tower*"]
    for case, more in (("llama_o_proj", []), ("deepseek_attention", ["*kv_b_proj*"]), ("shared_experts", [])):
        field_ = {"exclude_modules": [*names, *more], "modules_to_not_convert": []}
        assert not read_config(rewritten(made(case), tmp_path / case, **field_)).partly_quantized
    latent = {"modules_to_not_convert": ["model.layers.1.self_attn.kv_b_proj"]}
    assert read_config(rewritten(made("shared_experts"), tmp_path / "latent", **latent)).partly_quantized


def test_a_layer_for_multi_token_prediction_is_left_out_by_its_number(tmp_path: Path) -> None:
    """As NVIDIA's checkpoints have it; it counts where the layer is part of the model."""
    depth = f"model.layers.{COMMON['num_hidden_layers']}."
    directory = quantized(write_mtp(tmp_path / "float"), tmp_path / "made", "fp8_dynamic", [f"{depth}*"])
    config = read_config(directory)
    assert (config.partly_quantized, config.with_mtp().partly_quantized) == (False, True)
    kinds = [(depth in name, method) for name, method, _ in stored_as(loaded(directory, mtp=True))]
    assert {method for inside, method in kinds if inside} == {"unquantized"}
    assert {method for inside, method in kinds if not inside} == {"fp8_qdq", "unquantized"}  # kv_b_proj


@pytest.mark.parametrize(
    ("case", "spelled"),
    [
        ("kimi", {"exclude_modules": ["lm_head", *LEAVES_OUT["kimi"], "*kv_b_proj*"]}),
        ("llama_o_proj", {"modules_to_not_convert": [f"model.layers.{at}.self_attn.o_proj" for at in range(2)]}),
        ("one_layer", {"ignore": None}),
    ],
)
def test_the_tool_leaves_out_what_it_is_told_to_in_the_format_s_own_spelling(
    case: str, spelled: dict[str, Any], made: Made, tmp_path: Path
) -> None:
    tool, directory = Path(__file__).parents[2] / "tools" / "quantize_checkpoint.py", made(case)
    command = [sys.executable, str(tool), str(directory.with_name(f"{case}-float")), str(tmp_path / "written")]
    command += [CASES[case].form, "--leave-out", *CASES[case].leave_out]
    subprocess.run(command, check=True, env=child_environment(), timeout=60, stdout=subprocess.DEVNULL)
    assert read_config(tmp_path / "written") == read_config(directory)
    files = [load_file(each / "model.safetensors") for each in (tmp_path / "written", directory)]
    assert files[0].keys() == files[1].keys()
    section = json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"]
    for key, names in spelled.items():
        listed = [name for name in section[key] if name != "lm_head"]
        assert section[key] == names if names else all(name.startswith("model.layers.1.") for name in listed)
        assert not any(f"{name}.weight_scale" in files[0] for name in listed)
