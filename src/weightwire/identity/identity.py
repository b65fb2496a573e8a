"""What makes two shards interchangeable: a frozen record, its canonical JSON, and the three keys made from it.

``family_key`` leaves the parallel sizes out (resharding), ``replica_key`` has them, ``shard_key`` adds the rank's
coordinates. The revision is a constraint (``identity.revision``): compared, shown, never hashed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from weightwire.errors import ConfigError, IdentityMismatch, ProtocolError
from weightwire.identity.config import config_digest
from weightwire.identity.explain import FieldDifference, differences
from weightwire.types import Coordinates, Role, Stage

FORMAT = "weightwire.identity.v1"
"""Enters every key: a change of a field's meaning changes all of them."""

MAX_TEXT_CHARS = 1024
MAX_EXTRA = 64
MAX_SIZE = 1 << 20
_SIZES = ("tp_size", "pp_size", "ep_size", "dp_size")
_REQUIRED = ("model_id", "architecture", "dtype", "engine")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides whether a shard of one replica may stand in for the same shard of another.

    Attributes:
        model_id: the operator's name for the model, else its Hub id; never a path.
        architecture: class of the model.
        config_digest: of the byte-relevant config (``identity.config.config_digest``), or empty.
        dtype: of the weights, such as ``bfloat16``.
        quantization: name of the method, or ``None``.
        quantization_digest: of its config, or empty.
        role: target or draft model.
        stage: when the bytes were published.
        engine: who laid them out.
        engine_version: its version.
        layout_id: kernel backend, device architecture and transform protocol (``identity.layout``); may be empty in
            ``LOADED`` only, where every module declared its raw bytes independent of them.
        expert_map_digest: of the placement of experts, or empty.
        extra: whatever else decides bytes, by name; read-only.
        tp_size: ranks along each axis.
        pp_size: as above.
        ep_size: as above.
        dp_size: as above; counts only with ``dp_decides_bytes``.
        dp_decides_bytes: whether ranks along dp hold different bytes.
        revision: Hub commit or the operator's label; not hashed.

    Raises:
        ConfigError: a value is empty, too long, not plain text, or no legal size.
    """

    model_id: str
    architecture: str
    dtype: str
    engine: str
    engine_version: str = ""
    config_digest: str = ""
    quantization: str | None = None
    quantization_digest: str = ""
    role: Role = Role.TARGET
    stage: Stage = Stage.LOADED
    layout_id: str = ""
    expert_map_digest: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)
    tp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    dp_size: int = 1
    dp_decides_bytes: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in _TEXTS:
            _check_text(name, getattr(self, name), required=name in _REQUIRED)
        for name in ("quantization", "revision"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name), required=True)
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        _check_types(self)
        _check_model_id(self.model_id)
        object.__setattr__(self, "extra", _checked_extra(self.extra))
        if self.stage is Stage.PROCESSED and not self.layout_id:
            raise ConfigError("layout_id is empty in stage PROCESSED", "name backend, device and transform protocol")

    def __hash__(self) -> int:
        return hash((self.canonical_json(), self.revision))

    def __reduce__(self) -> tuple[Any, ...]:
        return Identity.from_dict, (self.to_dict(),)

    @functools.cached_property
    def family_key(self) -> str:
        """64 hex digits over everything but the parallel sizes: what could be resharded into one another."""
        return _digest({"format": FORMAT, **self._hashed(), "sizes": None})

    @functools.cached_property
    def replica_key(self) -> str:
        """64 hex digits over every hashed field."""
        return _digest({"format": FORMAT, **self._hashed()})

    def shard_key(self, coordinates: Coordinates) -> str:
        """64 hex digits over ``replica_key`` and the coordinates that decide bytes.

        Raises:
            ConfigError: the coordinates' sizes are not the identity's.
        """
        axes = ("tp", "pp", "ep", "dp") if self.dp_decides_bytes else ("tp", "pp", "ep")
        for axis in axes:
            mine, theirs = getattr(self, f"{axis}_size"), getattr(coordinates, f"{axis}_size")
            if mine != theirs:
                raise ConfigError(f"{axis}_size is {mine} in the identity, {theirs} at the rank", "make them equal")
        ranks = {axis: getattr(coordinates, f"{axis}_rank") for axis in axes}
        return _digest({"format": FORMAT, "replica": self.replica_key, "ranks": ranks})

    def canonical_json(self) -> str:
        """The hashed fields: sorted keys, no spaces, ASCII; equal text means interchangeable."""
        return _canonical(self._hashed())

    def with_stage(self, stage: Stage, layout_id: str | None = None) -> Identity:
        """The same at another stage.

        Args:
            stage: wanted.
            layout_id: of that stage; unchanged where ``None``.

        Raises:
            ConfigError: stage ``PROCESSED`` without a layout id.
        """
        return dataclasses.replace(self, stage=stage, layout_id=self.layout_id if layout_id is None else layout_id)

    def explain(self, other: Identity) -> list[FieldDifference]:
        """Every field that differs, in the order of the record's fields; empty for equal identities."""
        by_dp = self.dp_decides_bytes or other.dp_decides_bytes
        return differences(self.to_dict(), other.to_dict(), {"revision"} if by_dp else {"revision", "dp_size"})

    def require_match(self, other: Identity) -> None:
        """Check that shards of the two may be interchanged; revisions are not looked at.

        Raises:
            IdentityMismatch: a hashed field differs; names the first few.
        """
        if self.replica_key != other.replica_key:
            found = [str(one) for one in self.explain(other) if one.hashed]
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise IdentityMismatch(
                f"identities differ in {', '.join(found[:3])}{more}",
                "start both sides from the same model, configuration and engine",
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; ``from_dict`` gives an equal identity back."""
        plain = {name: getattr(self, name) for name in _FIELDS}
        return plain | {"role": self.role.value, "stage": self.stage.value, "extra": dict(self.extra)}

    @classmethod
    def from_dict(cls, values: Any) -> Identity:
        """The identity that ``to_dict`` described; for what comes over a wire.

        Raises:
            ProtocolError: a field is missing, unknown, of another type or out of bounds.
        """
        if not isinstance(values, Mapping) or set(values) != set(_FIELDS):
            raise ProtocolError("an identity has other fields than expected", "use the same version on both sides")
        try:
            role, stage = Role(values["role"]), Stage(values["stage"])
            return cls(**{**values, "role": role, "stage": stage})
        except (ValueError, TypeError) as error:
            raise ProtocolError(f"an identity is malformed: {error}", "use the same version on both sides") from error

    def _hashed(self) -> dict[str, Any]:
        plain = self.to_dict()
        sizes = {axis: plain[axis] for axis in _SIZES if axis != "dp_size" or self.dp_decides_bytes}
        unhashed = {*_SIZES, "dp_decides_bytes", "revision"}
        return {name: value for name, value in plain.items() if name not in unhashed} | {"sizes": sizes}


_FIELDS = tuple(one.name for one in dataclasses.fields(Identity))
_TEXTS = (
    "model_id",
    "architecture",
    "dtype",
    "engine",
    "engine_version",
    "config_digest",
    "quantization_digest",
    "layout_id",
    "expert_map_digest",
)


def module_identity(
    model_id: str,
    architecture: str,
    dtype: str,
    config: Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
    **fields: Any,
) -> Identity:
    """Identity of any ``nn.Module`` that its owner publishes as it is, without an engine.

    Args:
        model_id: what source and target call the model.
        architecture: name of its class.
        dtype: of its weights, such as ``float32``.
        config: what decides its shape; digested.
        revision: which weights, in the owner's words.
        fields: any other field of :class:`Identity`.

    Raises:
        ConfigError: a value is not legal.
    """
    digest = config_digest(config) if config is not None else ""
    given = {"engine": "module", "config_digest": digest, **fields}
    return Identity(model_id=model_id, architecture=architecture, dtype=dtype, revision=revision, **given)


def _check_text(name: str, value: Any, *, required: bool) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or not value.isprintable():
        raise ConfigError(f"{name} is not plain text of at most {MAX_TEXT_CHARS} characters", "shorten or correct it")
    if required and not value.strip():
        raise ConfigError(f"{name} is empty", "name it")


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise ConfigError(f"{name} is {value!r}", f"give a whole number from 1 to {MAX_SIZE}")


def _check_types(identity: Identity) -> None:
    for name, kind in (("role", Role), ("stage", Stage), ("dp_decides_bytes", bool)):
        if not isinstance(getattr(identity, name), kind):
            raise ConfigError(f"{name} is {getattr(identity, name)!r}", f"give a {kind.__name__}")


def _check_model_id(model_id: str) -> None:
    rooted = model_id.startswith(("/", "~", ".")) or model_id.endswith("/")
    if rooted or "\\" in model_id or "//" in model_id or model_id[1:2] == ":":
        raise ConfigError(f"model_id {model_id!r} looks like a path", "give a name that is the same on every host")


def _checked_extra(extra: Any) -> Mapping[str, str]:
    if not isinstance(extra, Mapping) or len(extra) > MAX_EXTRA:
        raise ConfigError(f"extra is no mapping of at most {MAX_EXTRA} names", "give fewer")
    for name, value in extra.items():
        _check_text("a name in extra", name, required=True)
        _check_text(f"extra[{name}]", value, required=False)
    return MappingProxyType(dict(sorted(extra.items())))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _digest(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
