"""How a checkpoint says that it is quantized: ``quantization_config`` of ``config.json``, in the field's spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightwire.errors import ConfigError
from weightwire.runtime.config_fields import Fields
from weightwire.runtime.quantization.left_out import LeftOut

INT8_WEIGHT_ONLY = "int8_weight_only"
FP8_QDQ = "fp8_qdq"
FP8_ROWWISE = "fp8_rowwise"
FP8_BLOCK = "fp8_block"
NVFP4 = "nvfp4"
NVFP4_AWQ = "nvfp4_awq"
W4A16_AWQ = "w4a16_awq"

_BLOCK = [128, 128]
_MODELOPT = {"FP8": FP8_QDQ, "NVFP4": NVFP4, "NVFP4_AWQ": NVFP4_AWQ, "W4A16_AWQ": W4A16_AWQ}
_DEFAULT_GROUP = 128
_NVFP4_GROUP = 16
_LINEAR = ["Linear"]
_FIELDS = ("ignore", "exclude_modules", "modules_to_not_convert")
_GATED = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
_MLPS = ("mlp", "mlp.shared_experts", "mlp.experts.0")
_PARTS = (*(f"self_attn.{leaf}" for leaf in _ATTENTION), *(f"{mlp}.{leaf}" for mlp in _MLPS for leaf in _GATED))
"""What is quantized of a layer unless it is left out; of experts, which are all or none, the first."""
_KEY_VALUES = "self_attn.kv_b_proj"
"""Only ``fp8_block`` quantizes it."""


@dataclass(frozen=True)
class QuantizationConfig:
    """With what linear layers and experts (not embedding, head and routers) are quantized, but for those left out.

    Attributes:
        name: of the method.
        group: columns that share a scale, where the method leaves that open.
        left_out: which ones are not quantized.
    """

    name: str
    group: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)

    def partly(self, layers: int) -> bool:
        """Whether of so many layers anything is left out that the method can quantize: no head, no router."""
        parts = (*_PARTS, _KEY_VALUES) if self.name == FP8_BLOCK else _PARTS
        return any(self.left_out.has(f"model.layers.{layer}.{part}") for layer in range(layers) for part in parts)


def parse_quantization(fields: Fields) -> QuantizationConfig | None:
    """What ``quantization_config`` says; ``None`` where there is none.

    Raises:
        CheckpointError: it is malformed.
        ConfigError: it asks for something that this runtime does not compute.
    """
    raw = fields.get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise fields.fail("quantization_config", "is not an object")
    method = raw.get("quant_method")
    parse = {
        "modelopt": _parse_modelopt,
        "fp8": _parse_fp8,
        "fbgemm_fp8": lambda _: QuantizationConfig(FP8_ROWWISE),
        "compressed-tensors": _parse_compressed_tensors,
    }.get(str(method))
    found = parse(raw) if parse else None
    if found is None:
        raise ConfigError(
            f"{fields.path}: quantization_config {_summary(raw)} is not supported",
            "this runtime knows FP8, NVFP4, NVFP4_AWQ and W4A16_AWQ of modelopt, fp8, fbgemm_fp8, and int8 weights "
            "or fp8 of compressed-tensors",
        )
    _check_targets(fields, raw)
    return replace(found, left_out=_left_out(fields, raw))


def _left_out(fields: Fields, raw: Mapping[str, Any]) -> LeftOut:
    try:
        return LeftOut.parse(_entries(fields, raw))
    except ConfigError as error:
        raise ConfigError(f"{fields.path}: {error.problem}", error.remedy) from error


def _entries(fields: Fields, raw: Mapping[str, Any]) -> list[str]:
    """What the fields list that leave modules out; a checkpoint has one of them."""
    found: list[str] = []
    for key in _FIELDS:
        names = raw.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise fields.fail(f"quantization_config.{key}", "is not a list of names")
        found += names
    return found


def _check_targets(fields: Fields, raw: Mapping[str, Any]) -> None:
    groups = raw.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, dict) else ():
        targets = group.get("targets", _LINEAR) if isinstance(group, dict) else _LINEAR
        if targets != _LINEAR:
            raise ConfigError(
                f"{fields.path}: quantization_config.config_groups is for {str(targets)[:80]}",
                "this runtime reads groups for all of Linear, and what ignore leaves out of them",
            )


def _parse_modelopt(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    name = _MODELOPT.get(str(raw.get("quant_algo")))
    if name is None:
        return None
    group = raw.get("group_size", _NVFP4_GROUP if name in (NVFP4, NVFP4_AWQ) else _DEFAULT_GROUP)
    if name == W4A16_AWQ:
        return QuantizationConfig(name, group) if type(group) is int and group > 0 else None
    return QuantizationConfig(name) if name == FP8_QDQ or group == _NVFP4_GROUP else None


def _parse_fp8(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    block = raw.get("weight_block_size")
    if block is None:
        return QuantizationConfig(FP8_QDQ)
    dynamic = raw.get("activation_scheme", "dynamic") == "dynamic"
    return QuantizationConfig(FP8_BLOCK) if block == _BLOCK and dynamic else None


def _parse_compressed_tensors(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    """One group for all linear layers; weights by row or by tensor, symmetric."""
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return None
    (group,) = groups.values()
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or weights.get("num_bits") != 8 or weights.get("symmetric") is False:
        return None
    match (weights.get("type"), weights.get("strategy"), inputs):
        case ("int", "channel", None):
            return QuantizationConfig(INT8_WEIGHT_ONLY)
        case ("float", "tensor", {"num_bits": 8, "type": "float"}):
            return QuantizationConfig(FP8_QDQ)
        case ("float", "channel", {"num_bits": 8, "type": "float", "dynamic": True}):
            return QuantizationConfig(FP8_ROWWISE)
    return None


def _summary(raw: Mapping[str, Any]) -> str:
    known = ("quant_method", "quant_algo", "format", "weight_block_size", "activation_scheme", "group_size")
    return ", ".join(f"{key}={raw[key]!r}" for key in known if key in raw)[:200] or "without quant_method"
