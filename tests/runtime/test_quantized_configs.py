"""What a ``quantization_config`` may say: which layers are left out; other tools' names are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import write_checkpoint
from runtime_quantized import DIMS, quantized
from safetensors.torch import load_file, save_file

from weightwire.errors import CheckpointError, ConfigError
from weightwire.runtime import LoaderSettings, ModelLoader, SafetensorsLoader, TpGroup, read_config

GROUP: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
    "input_activations": None,
}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}


def with_section(checkpoint: Path, **section: Any) -> Path:
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(raw | {"quantization_config": section}))
    return checkpoint


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "plain", DIMS)


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "exclude_modules"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, "ignore"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "modules_to_not_convert"),
        ({"quant_method": "fbgemm_fp8"}, "modules_to_not_convert"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}}, "ignore"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["quant_method"],
)
@pytest.mark.parametrize("left_out", ["model.layers.0.mlp.down_proj", "model.layers.1*", "re:.*self_attn.*"])
def test_what_is_left_out_is_read_from_each_tool_s_field(
    method: dict[str, Any], field: str, left_out: str, plain: Path
) -> None:
    none = read_config(with_section(plain, **method, **{field: ["lm_head"]}))
    some = read_config(with_section(plain, **method, **{field: ["lm_head", left_out]}))
    assert (none.partly_quantized, some.partly_quantized) == (False, True)
    for wrong in (left_out, {left_out: None}, [left_out, 1]):
        with pytest.raises(CheckpointError, match=f"quantization_config.{field} is not a list of names"):
            read_config(with_section(plain, **method, **{field: wrong}))
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config leaves out re:\(\?!x\), an expression"):
        read_config(with_section(plain, **method, **{field: ["re:(?!x)"]}))


def test_a_group_for_some_layers_alone_is_refused_by_name(plain: Path) -> None:
    group = GROUP | {"targets": ["re:.*mlp.*"]}
    with pytest.raises(ConfigError, match=r"config_groups is for \['re:\.\*mlp\.\*'\]"):
        read_config(with_section(plain, quant_method="compressed-tensors", config_groups={"group_0": group}))


@pytest.mark.parametrize("section", [AWQ, AWQ | {"quant_method": "gptq"}, AWQ | {"quant_method": "auto-awq"}])
def test_other_tools_methods_are_refused_by_name(section: dict[str, Any], plain: Path) -> None:
    with pytest.raises(ConfigError, match=f"quant_method='{section['quant_method']}'"):
        read_config(with_section(plain, **section))


def test_autoawq_s_names_under_another_tool_s_config_are_refused_before_the_first_byte(
    plain: Path, tmp_path: Path
) -> None:
    checkpoint = quantized(plain, tmp_path / "awq", "w4a16_awq")
    tensors = load_file(checkpoint / "model.safetensors")
    prefix = "model.layers.0.mlp.down_proj."
    for ours, theirs in (("weight", "qweight"), ("weight_scale", "scales")):
        tensors[prefix + theirs] = tensors.pop(prefix + ours)
    tensors[prefix + "qzeros"] = torch.zeros(10, 10, dtype=torch.int32)
    (checkpoint / "model.safetensors").unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.0\.mlp\.down_proj\.weight"):
        ModelLoader(TpGroup.single(), LoaderSettings(), SafetensorsLoader()).load(checkpoint)


def test_a_layer_that_is_not_quantized_though_nothing_says_so_is_refused_by_name(plain: Path, tmp_path: Path) -> None:
    checkpoint = quantized(plain, tmp_path / "int8", "int8_weight_only")
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = load_file(plain / "model.safetensors")[name]
    (checkpoint / "model.safetensors").unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"o_proj\.weight is torch\.float32, not torch\.int8"):
        ModelLoader(TpGroup.single(), LoaderSettings(), SafetensorsLoader()).load(checkpoint)
