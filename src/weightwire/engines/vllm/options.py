"""What ``--model-loader-extra-config`` may say. Imports nothing of vLLM, and no gRPC."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from weightwire.config import Settings
from weightwire.errors import ConfigError

DEFAULT_QUIET_S = 30.0
"""An engine that nobody declares ready is taken to be so this long after loading."""
MAX_SECONDS = 3600.0
SECRETIVE = ("secret", "token", "password", "credential", "apikey", "api_key")
SETTINGS = tuple(row.name for row in dataclasses.fields(Settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One replica's wishes: the process's settings, and what only vLLM's loader needs.

    Attributes:
        settings: from the environment, with the extra config on top.
        model_id: the name that the model is found under; needed where vLLM is given a path.
        revision: which weights, in the operator's words; a Hub model's commit where it is empty.
        weights_id: take exactly these weights.
        latest: where several weights are ready, take those with the highest ordinal.
        ordinal: this replica's place among several weights of one model, if it reads them from the disk.
        fallback_load_format: vLLM's load format where no replica can serve.
        quiet_s: seconds after loading at which the bytes are offered although nobody said that the engine is ready.
        vote_s: seconds that a worker waits for the other workers at one step; from the disk they may finish far apart.
        relay: pass on what is received from another replica while it is being received.
        poison: overwrite what is to be received first (a debugging aid: what was not filled then shows).
    """

    settings: Settings = field(default_factory=Settings)
    model_id: str | None = None
    revision: str | None = None
    weights_id: str = ""
    latest: bool = False
    ordinal: int = 0
    fallback_load_format: str = "auto"
    quiet_s: float = DEFAULT_QUIET_S
    vote_s: float = 120.0
    relay: bool = True
    poison: bool = False

    @classmethod
    def from_extra(cls, extra: Any) -> Self:
        """Options from ``model_loader_extra_config`` and the environment.

        Raises:
            ConfigError: no mapping, an unknown key, an illegal value, or a secret (vLLM prints all of this).
        """
        if not isinstance(extra, Mapping):
            raise ConfigError("model_loader_extra_config is no JSON object", 'give {"url": "host:port"}')
        own = {row.name: row.type for row in dataclasses.fields(cls) if row.name != "settings"}
        for key in extra:
            _check_key(key, (*own, *SETTINGS))
        given = {key: _typed(key, extra[key], str(own[key])) for key in extra if key in own and extra[key] is not None}
        return cls(settings=Settings.from_env(**{key: _text(extra[key]) for key in extra if key in SETTINGS}), **given)

    def __post_init__(self) -> None:
        for name in ("quiet_s", "vote_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= MAX_SECONDS):
                raise ConfigError(f"{name} cannot be {value}", f"give seconds, at most {MAX_SECONDS:g}")
        if self.fallback_load_format == "presharded":
            raise ConfigError("fallback_load_format cannot be presharded itself", "name one of vLLM's, such as auto")


def _check_key(key: str, known: tuple[str, ...]) -> None:
    if key in known:
        return
    if any(word in key.lower() for word in SECRETIVE):
        raise ConfigError(
            f"the extra config holds {key}, and vLLM prints the extra config",
            "take the secret out of it; name a file in WEIGHTWIRE_SECRET_FILE",
        )
    near = difflib.get_close_matches(key, known, n=1)
    raise ConfigError(
        f"the extra config holds an unknown key {key[:64]!r}",
        f"did you mean {near[0]}?" if near else f"legal: {', '.join(known)}",
    )


def _typed(key: str, value: Any, kind: str) -> Any:
    legal: tuple[type, ...] = (str,)
    if kind in ("bool", "int", "float"):
        legal = {"bool": (bool,), "int": (int,), "float": (int, float)}[kind]
    if not isinstance(value, legal) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{key} cannot be {value!r}", f"give a {kind.partition(' ')[0]}")
    return float(str(value)) if kind == "float" else value


def _text(value: Any) -> Any:
    """As an environment variable would say it, so that there is one parser."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return None if value is None else str(value)
