"""Where the result of ``weightwire bench tune`` is kept, and what it is: one small JSON file of the user's."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from weightwire.errors import ConfigError

MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Tuned:
    """What suits this host's links.

    Attributes:
        streams: connections to one source over ``tcp``.
        read_bytes: what one read over ``tcp`` asks for.
    """

    streams: int
    read_bytes: int


def tuning_path(environ: Mapping[str, str] | None = None) -> Path:
    """The file, beside the user's own secret."""
    source = os.environ if environ is None else environ
    home = source.get("HOME") or str(Path.home())
    return Path(source.get("XDG_STATE_HOME") or f"{home}/.local/state") / "weightwire" / "tuning.json"


def load(path: Path) -> Tuned | None:
    """What was measured last; ``None`` where nothing was, or others' files cannot be read.

    Raises:
        ConfigError: it is not what ``save`` writes.
    """
    try:
        text = path.read_bytes()[: MAX_BYTES + 1]
    except OSError:
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and set(found) == {"streams", "read_bytes"}:
            values = (found["streams"], found["read_bytes"])
            if all(type(value) is int and value > 0 for value in values):
                return Tuned(*values)
    raise ConfigError(f"{path} is not what weightwire bench tune writes", "measure again, or delete it")


def save(tuned: Tuned, path: Path | None = None) -> None:
    """Replace the file, atomically.

    Raises:
        ConfigError: it cannot be written.
    """
    where = path or tuning_path()
    draft = where.with_name(f".{where.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        where.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.write_text(json.dumps(asdict(tuned)) + "\n")
        draft.replace(where)
    except OSError as error:
        raise ConfigError(f"cannot write {where}: {error.strerror}", "look at its folder's owner") from error
