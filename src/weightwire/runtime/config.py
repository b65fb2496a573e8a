"""A model's configuration, read from a Hugging Face ``config.json`` into a frozen record, and build facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from weightwire.errors import CheckpointError, ConfigError
from weightwire.runtime.config_fields import Fields
from weightwire.runtime.family_config import FAMILIES, GemmaConfig, MlaConfig, MoeConfig, no_family
from weightwire.runtime.quantization.config import QuantizationConfig, parse_quantization

Scalar = bool | int | float | str | None
BuildFacts = dict[str, Scalar]

WORD_EMBEDDINGS_UNTIED = "word_embeddings_untied"
"""Build fact: the checkpoint carries an ``lm_head`` of its own although the config says that it is tied."""

_MAX_CONFIG_BYTES = 16 << 20
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class KernelLayout(Enum):
    """The layout that ``transform_weights`` brings the raw weights into.

    ``PLAIN`` changes nothing. ``PACKED`` permutes q and k rows in place for interleaved rotary embedding and replaces
    gate-up weights by their contiguous transpose. Loaded bytes are the same under both.
    """

    PLAIN = "plain"
    PACKED = "packed"

    @classmethod
    def parse(cls, value: object) -> KernelLayout:
        """Return the member that ``value`` names, in any case; ``ConfigError`` naming the legal ones otherwise."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.strip().upper() in cls.__members__:
            return cls[value.strip().upper()]
        raise ConfigError(f"unknown kernel layout {value!r}", "use one of: plain, packed")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base ``theta`` and, but for ``default``, how frequencies are stretched."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """What decides a model's tensors and arithmetic. Sizes are those of the whole model, not of one rank.

    ``mtp_layers`` for multi-token prediction are in the checkpoint; part of the model they are where it ``runs_mtp``.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: RopeConfig
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qk_norm: bool = False
    moe: MoeConfig | None = None
    mla: MlaConfig | None = None
    gemma: GemmaConfig | None = None
    mtp_layers: int = 0
    runs_mtp: bool = False
    quantization: QuantizationConfig | None = None

    @property
    def partly_quantized(self) -> bool:
        """Whether the checkpoint leaves something out of its quantization, of all layers that are part of the model."""
        layers = self.num_layers + (self.mtp_layers if self.runs_mtp else 0)
        return self.quantization is not None and self.quantization.partly(layers)

    def with_mtp(self) -> ModelConfig:
        """This config, with layers for multi-token prediction.

        Raises:
            ConfigError: there are none.
        """
        if not self.mtp_layers:
            raise ConfigError(
                f"{self.architecture}: the config names no layers for multi-token prediction", "leave mtp out"
            )
        return replace(self, runs_mtp=True)

    def with_build_facts(self, facts: Mapping[str, Scalar]) -> ModelConfig:
        """This config as the checkpoint's files (or a peer that saw them) correct it.

        Raises:
            ConfigError: a fact that this runtime does not know, by name, or one of the wrong type.
        """
        unknown = sorted(set(facts) - {WORD_EMBEDDINGS_UNTIED})
        if unknown:
            raise ConfigError(f"unknown build fact {unknown[0]!r}", "source and target must run the same version")
        untied = facts.get(WORD_EMBEDDINGS_UNTIED, False)
        if not isinstance(untied, bool):
            raise ConfigError(f"build fact {WORD_EMBEDDINGS_UNTIED} is {untied!r}", "it must be true or false")
        return replace(self, tie_word_embeddings=False) if untied else self


def read_config(checkpoint_dir: Path) -> ModelConfig:
    """Read ``config.json`` of a Hugging Face checkpoint directory.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON, or a field is missing or of the wrong type.
        ConfigError: it describes something that this runtime does not compute.
    """
    path = checkpoint_dir / "config.json"
    return parse_config(read_json_object(path, "give a Hugging Face checkpoint directory"), path)


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Decode one small JSON file that must hold an object; ``CheckpointError`` with ``remedy`` where it does not."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_CONFIG_BYTES >> 20} MiB", remedy)
        decoded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON", remedy) from error
    if not isinstance(decoded, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", remedy)
    return decoded


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """Turn a decoded ``config.json`` into a ``ModelConfig``; raises as ``read_config``."""
    fields = Fields(raw, path)
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise fields.fail("architectures", "is missing or not a list of names")
    heads = fields.whole("num_attention_heads")
    hidden = fields.whole("hidden_size")
    family = FAMILIES.get(architectures[0], no_family)(fields)
    common: dict[str, Any] = {
        "architecture": architectures[0],
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.whole("intermediate_size"),
        "num_layers": fields.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", heads),
        "head_dim": fields.whole("head_dim", hidden // heads),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "max_position": fields.whole("max_position_embeddings", 2048),
        "rope": _parse_rope(fields, path),
        "attention_bias": fields.flag("attention_bias"),
        "mlp_bias": fields.flag("mlp_bias"),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "eos_token_ids": _parse_eos(fields),
        "activation": _parse_activation(fields),
        "quantization": parse_quantization(fields),
    }
    return ModelConfig(**{**common, **family})


def _parse_activation(fields: Fields) -> str:
    name = fields.get("hidden_activation") or fields.get("hidden_act") or "silu"
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"{fields.path}: hidden_act {name!r} is not supported", f"this runtime computes {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _parse_eos(fields: Fields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise fields.fail("eos_token_id", f"is {value!r}, not token ids")
    return tuple(ids)


def _parse_rope(fields: Fields, path: Path) -> RopeConfig:
    """Both spellings: ``rope_parameters`` (newer) and ``rope_theta`` with ``rope_scaling`` (older)."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.fail("rope_parameters", "is not an object")
    rope = Fields(raw, path)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{path}: partial rotary embedding is not supported", "this runtime rotates whole heads")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=rope.number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.whole("original_max_position_embeddings"),
        )
    if kind == "yarn":
        return _parse_yarn(rope, theta)
    raise ConfigError(
        f"{path}: rope type {kind!r} is not supported", "this runtime knows default, linear, llama3 and yarn"
    )


def _parse_yarn(rope: Fields, theta: float) -> RopeConfig:
    def given(field: str) -> float | None:
        return None if rope.get(field) is None else rope.number(field)

    return RopeConfig(
        theta,
        "yarn",
        factor=rope.number("factor"),
        original_max_position=rope.whole("original_max_position_embeddings"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=given("mscale"),
        mscale_all_dim=given("mscale_all_dim"),
    )
