"""From a float checkpoint to a quantized one, with the names and the ``quantization_config`` of the field's tools.

For tests and trials. Weights are rounded to the nearest; what calibration would find (static activation scales, AWQ's
input scales) is made up, from fixed patterns, so that a layer which loses it computes something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from weightwire.errors import ConfigError
from weightwire.runtime.quantization import config, fp8, integers, nvfp4
from weightwire.runtime.quantization.left_out import LeftOut

Tensors = dict[str, torch.Tensor]

LARGEST_INPUT = 24.0
"""Of a static activation scale: larger activations are clamped."""
AWQ_GROUP = 16
FORMATS = (
    config.INT8_WEIGHT_ONLY,
    "fp8_static",
    "fp8_dynamic",
    config.FP8_ROWWISE,
    config.FP8_BLOCK,
    config.NVFP4,
    config.NVFP4_AWQ,
    config.W4A16_AWQ,
)
"""What ``quantize`` knows; ``fp8_static`` and ``fp8_dynamic`` are both ``fp8_qdq``."""

_LINEAR = re.compile(r"(.*\.)((\w+_proj|kv_a_proj_with_mqa)\.)weight")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_KEY_VALUES = "*kv_b_proj*"
_PATTERNS, _LISTS = "exclude_modules", ("modules_to_not_convert", "ignore")


def quantize(
    tensors: Mapping[str, torch.Tensor], form: str, leave_out: Iterable[str] = ()
) -> tuple[Tensors, dict[str, Any]]:
    """Linear layers and experts of a Hugging Face checkpoint quantized, and its ``quantization_config``.

    ``kv_b_proj`` of latent attention is left out, but by ``fp8_block``: its rows are reordered and multiplied head by
    head, which TensorRT-LLM, too, does with blocks of FP8 or in the model's own dtype. Experts have input scales of
    their own. What is left out is written as each format's tools do it: modelopt's has the patterns, the others list
    every module.

    Args:
        tensors: of the checkpoint, by name; those of linear layers are called ``…_proj.weight``, or
            ``kv_a_proj_with_mqa.weight``.
        form: one of ``FORMATS``.
        leave_out: names and patterns of what is not quantized, as ``LeftOut`` reads them.

    Raises:
        ConfigError: an unknown form, or patterns that are not read.
    """
    if form not in _EXPORTERS:
        raise ConfigError(f"unknown format {form!r}", f"use one of: {', '.join(FORMATS)}")
    export, section = _EXPORTERS[form]
    patterns = [*leave_out, *([] if form == config.FP8_BLOCK else [_KEY_VALUES])]
    found, plain, left_out = Tensors(), list[str](), LeftOut.parse(patterns)
    for name, tensor in tensors.items():
        linear, module = _LINEAR.fullmatch(name), name.rpartition(".")[0]
        if linear is None or left_out.has(module):
            found[name] = tensor
            plain += [module] if linear else []
            continue
        made = export(tensor.float())
        expert = _EXPERT.search(name)
        if expert and "input_scale" in made:
            made["input_scale"] = made["input_scale"] * (1 + int(expert[1]) % 5 / 4)
        found |= {linear[1] + linear[2] + leaf: value.contiguous() for leaf, value in made.items()}
    return found, _leaving_out(section, patterns, plain) if plain else section


def _leaving_out(section: dict[str, Any], patterns: Sequence[str], modules: Sequence[str]) -> dict[str, Any]:
    """``section``, and in the field that it has for it what is left out."""
    if _PATTERNS in section:
        return section | {_PATTERNS: [*section[_PATTERNS], *patterns]}
    field = next((field for field in _LISTS if field in section), _LISTS[0])
    return section | {field: [*section.get(field, []), *modules]}


def _int8(weight: torch.Tensor) -> Tensors:
    numbers, scales = integers.quantise_int8(weight)
    return {"weight": numbers, "weight_scale": scales.unsqueeze(1)}


def _fp8(weight: torch.Tensor) -> Tensors:
    scale = fp8.scale_of(weight)
    return {"weight": fp8.quantise(weight, scale), "weight_scale": scale}


def _fp8_static(weight: torch.Tensor) -> Tensors:
    return _fp8(weight) | {"input_scale": torch.tensor(LARGEST_INPUT / fp8.LARGEST)}


def _fp8_rowwise(weight: torch.Tensor) -> Tensors:
    scales = fp8.scale_of(weight, 1)
    return {"weight": fp8.quantise(weight, scales), "weight_scale": scales}


def _fp8_block(weight: torch.Tensor) -> Tensors:
    scales = fp8.block_scales(weight)
    return {"weight": fp8.quantise(weight, fp8.expand(scales, *weight.shape)), "weight_scale_inv": scales}


def _nvfp4(weight: torch.Tensor) -> Tensors:
    scale_2 = nvfp4.global_scale(weight)
    packed, scales = nvfp4.quantise(weight, scale_2)
    given = torch.tensor(LARGEST_INPUT / (6 * 448))
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": scale_2, "input_scale": given}


def _pre_quant_scale(columns: int) -> torch.Tensor:
    return torch.exp2((torch.arange(columns) % 5 - 2) / 2)


def _nvfp4_awq(weight: torch.Tensor) -> Tensors:
    scale = _pre_quant_scale(weight.shape[1])
    return _nvfp4(weight / scale) | {"pre_quant_scale": scale}


def _w4a16_awq(weight: torch.Tensor) -> Tensors:
    scale = _pre_quant_scale(weight.shape[1])
    packed, scales = integers.quantise_int4(weight / scale, AWQ_GROUP)
    return {"weight": packed, "weight_scale": scales, "pre_quant_scale": scale}


def _modelopt(algo: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algo, "exclude_modules": ["lm_head"], **more}


_COMPRESSED_INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            "input_activations": None,
        }
    },
}

_EXPORTERS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    config.INT8_WEIGHT_ONLY: (_int8, _COMPRESSED_INT8),
    "fp8_static": (_fp8_static, _modelopt("FP8")),
    "fp8_dynamic": (_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    config.FP8_ROWWISE: (
        _fp8_rowwise,
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
    config.FP8_BLOCK: (
        _fp8_block,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    config.NVFP4: (_nvfp4, _modelopt("NVFP4", group_size=16)),
    config.NVFP4_AWQ: (_nvfp4_awq, _modelopt("NVFP4_AWQ", group_size=16)),
    config.W4A16_AWQ: (_w4a16_awq, _modelopt("W4A16_AWQ", group_size=AWQ_GROUP)),
}
