"""Digest of the part of a model's config file that decides bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from weightwire.errors import ConfigError

COSMETIC = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "model_name"})
"""Left out at every level: where the file came from and who wrote it."""

COVERED = frozenset({"dtype", "torch_dtype"})
"""Left out at the top level only: the identity has a field ``dtype`` of its own, and an engine may override the file.
Parts of a model that name another dtype (deeper levels) count."""

MAX_DEPTH = 32
MAX_BYTES = 4 << 20


def config_digest(config: Mapping[str, Any], drop: Collection[str] = COSMETIC) -> str:
    """64 hex digits, the same whatever the order of keys.

    Args:
        config: the config *file*'s content, before an engine touches it; JSON values.
        drop: keys to leave out at every level; ``COVERED`` is left out at the top besides.

    Raises:
        ConfigError: a value is not JSON, not finite, or the whole is too large.
    """
    kept = _without({key: value for key, value in config.items() if key not in COVERED}, frozenset(drop), 0)
    try:
        text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config is not plain JSON: {error}", "give the content of the config file") from error
    if len(text) > MAX_BYTES:
        raise ConfigError(f"the config is larger than {MAX_BYTES} bytes", "leave out what decides no bytes")
    return hashlib.sha256(text.encode()).hexdigest()


def _without(value: Any, drop: frozenset[str], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ConfigError(f"the config is nested deeper than {MAX_DEPTH}", "give the content of the config file")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ConfigError("the config has a key that is not text", "give the content of the config file")
        return {key: _without(item, drop, depth + 1) for key, item in value.items() if key not in drop}
    if isinstance(value, list | tuple):
        return [_without(item, drop, depth + 1) for item in value]
    return value
