"""A model's configuration, read from a Hugging Face ``config.json`` into a frozen record, and build facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from weightwire.errors import CheckpointError, ConfigError

Scalar = bool | int | float | str | None
BuildFacts = dict[str, Scalar]

WORD_EMBEDDINGS_UNTIED = "word_embeddings_untied"
"""Build fact: the checkpoint carries an ``lm_head`` of its own although the config says that it is tied."""

_MAX_CONFIG_BYTES = 16 << 20


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
    """Rotary embedding: base ``theta`` and, for ``llama3`` and ``linear``, how frequencies are stretched."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """What decides a model's tensors and arithmetic. Sizes are those of the whole model, not of one rank."""

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


class _Fields:
    """Typed reads from one decoded ``config.json``; every failure names the file and the field."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._raw = raw
        self._path = path

    def fail(self, field: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {field} {why}", "use the config.json of a complete checkpoint")

    def get(self, field: str) -> Any:
        return self._raw.get(field)

    def whole(self, field: str, default: int | None = None) -> int:
        value = self._raw.get(field)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(field, f"is {value!r}, not a positive whole number")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self._raw.get(field)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.fail(field, f"is {value!r}, not a positive number")
        return float(value)

    def flag(self, field: str) -> bool:
        value = self._raw.get(field, False)
        if not isinstance(value, bool):
            raise self.fail(field, f"is {value!r}, not true or false")
        return value


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
    fields = _Fields(raw, path)
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise fields.fail("architectures", "is missing or not a list of names")
    activation = fields.get("hidden_act") or "silu"
    if activation != "silu":
        raise ConfigError(f"{path}: hidden_act {activation!r} is not supported", "this runtime computes silu only")
    heads = fields.whole("num_attention_heads")
    hidden = fields.whole("hidden_size")
    return ModelConfig(
        architecture=architectures[0],
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=fields.whole("head_dim", hidden // heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=fields.whole("max_position_embeddings", 2048),
        rope=_parse_rope(fields, path),
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=_parse_eos(fields),
    )


def _parse_eos(fields: _Fields) -> tuple[int, ...]:
    value = fields.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise fields.fail("eos_token_id", f"is {value!r}, not token ids")
    return tuple(ids)


def _parse_rope(fields: _Fields, path: Path) -> RopeConfig:
    """Both spellings: ``rope_parameters`` (newer) and ``rope_theta`` with ``rope_scaling`` (older)."""
    raw = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.fail("rope_parameters", "is not an object")
    rope = _Fields(raw, path)
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
    raise ConfigError(f"{path}: rope type {kind!r} is not supported", "this runtime knows default, linear and llama3")
