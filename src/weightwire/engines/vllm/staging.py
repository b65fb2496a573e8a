"""A refresh before vLLM has a part in it: what is asked for, which weights that is, and whether there is room.

Imports nothing of vLLM and no gRPC.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from weightwire.errors import ConfigError, ManifestMismatch, NoSourceError, PublishError, WeightsConflict
from weightwire.types import Json, State
from weightwire.wire.messages import ReplicaListing, WeightsGroup

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
SPARE_BYTES = 256 << 20
"""Host memory that staging leaves to others."""
TOKEN = re.compile(r"[0-9a-f]{32}")
WEIGHTS_ID = re.compile(r"[0-9a-f]{64}")
MAX_ORDINAL = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What ``update_weights`` is told; exactly one of the first three, or ``abandon``.

    Attributes:
        ordinal: take the weights with this one, newer or older.
        weights_id: take exactly these weights.
        latest: take those with the highest ordinal, which must be higher than the present one.
        republish: offer the new weights to others from the staging memory; default: on the CPU, where raw bytes are
            held in full anyway.
        background: stage in a thread, and return at once.
        tell: record at the metadata server, under ``told_key``, that staging in the background is over.
        abandon: forget what was staged.
    """

    ordinal: int | None = None
    weights_id: str | None = None
    latest: bool = False
    republish: bool | None = None
    background: bool = False
    tell: str = ""
    abandon: bool = False

    @classmethod
    def parse(cls, given: Any) -> Self:
        """From ``update_info``.

        Raises:
            ConfigError: it is no mapping, or holds something else.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(f"update_info cannot be {str(given)[:64]!r}", LEGAL)
        unknown = sorted(str(key) for key in given if key not in cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"update_info holds an unknown key {unknown[0][:64]!r}", LEGAL)
        return cls(**given)

    def to_json(self) -> dict[str, Json]:
        """What ``parse`` reads."""
        plain: dict[str, Json] = dataclasses.asdict(self)
        return {name: value for name, value in plain.items() if value != type(self).__dataclass_fields__[name].default}

    def same(self, other: Request) -> bool:
        """Whether both name the same weights."""
        mine, theirs = ((one.ordinal, one.weights_id, one.latest, one.abandon) for one in (self, other))
        return mine == theirs

    def describe(self) -> str:
        """In words."""
        if self.weights_id is not None:
            return f"weights {self.weights_id[:12]}"
        return "any weights" if self.latest else f"ordinal {self.ordinal}"

    def __post_init__(self) -> None:
        whole = self.ordinal is None or (type(self.ordinal) is int and 0 <= self.ordinal <= MAX_ORDINAL)
        legal = {
            "ordinal": whole,
            "weights_id": self.weights_id is None or bool(WEIGHTS_ID.fullmatch(str(self.weights_id))),
            "latest": type(self.latest) is bool,
            "abandon": type(self.abandon) is bool,
            "background": type(self.background) is bool,
            "tell": self.tell == "" or bool(TOKEN.fullmatch(str(self.tell))),
            "republish": self.republish is None or type(self.republish) is bool,
        }
        for name, fits in legal.items():
            if not fits:
                raise ConfigError(f"update_info: {name} cannot be {str(getattr(self, name))[:64]!r}", LEGAL)
        asked = [self.ordinal is not None, self.weights_id is not None, self.latest, self.abandon]
        if sum(asked) != 1:
            raise ConfigError("update_info does not name one thing to move to", LEGAL)


def told_key(token: str) -> str:
    """Where the end of staging in the background is recorded; ``token``: 32 hex digits that only the caller knows."""
    return f"weightwire/vllm/refresh/{token}/over"


LEGAL = 'give {"ordinal": N}, {"latest": true} or {"weights_id": "64 hex digits"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a replica holds now; ``weights_id`` is empty where it is not known."""

    ordinal: int
    weights_id: str


def pick(request: Request, listing: ReplicaListing, held: Held) -> WeightsGroup | None:
    """The weights to move to, of those that complete replicas offer now; ``None`` where they are held already.

    Whatever revision they carry: naming an ordinal, an id or "latest" is the operator's word on that.

    Raises:
        NoSourceError: nobody offers them, or nothing is newer.
        WeightsConflict: several weights have that ordinal.
    """
    if listing.warming and request.weights_id is None:
        raise NoSourceError(
            "the metadata server has just started and may not know all sources",
            f"ask again in {listing.warming_s:.0f} s, or name a weights id",
        )
    found = [group for group in listing.groups if _asked(request, group)]
    if request.latest and found:
        newest = max(group.ordinal for group in found)
        found = [group for group in found if group.ordinal == newest]
    if not found:
        raise NoSourceError(f"no replica offers {request.describe()}{_instead(listing)}", "see: weightwire sources")
    if len(found) > 1:
        ids = ", ".join(sorted(group.weights_id[:12] for group in found))
        raise WeightsConflict(f"{len(found)} weights have ordinal {found[0].ordinal}: {ids}", "name one weights id")
    group = found[0]
    if group.weights_id == held.weights_id:
        if request.latest:
            raise NoSourceError(f"nothing newer than ordinal {held.ordinal} is offered", "publish newer weights first")
        return None
    if request.latest and group.ordinal <= held.ordinal:
        raise NoSourceError(f"nothing newer than ordinal {held.ordinal} is offered", "publish newer weights first")
    return group


def _asked(request: Request, group: WeightsGroup) -> bool:
    if request.weights_id is not None:
        return group.weights_id == request.weights_id
    return request.latest or group.ordinal == request.ordinal


def _instead(listing: ReplicaListing) -> str:
    offered = sorted({group.ordinal for group in listing.groups})
    parts = [f"offered: ordinal {', '.join(map(str, offered[:8]))}"] if offered else []
    loading = len(listing.loading)
    parts += [f"{loading} still loading"] if loading else []
    return f" ({'; '.join(parts)})" if parts else ""


def check_state(held: State, offered: State) -> None:
    """Check that what the new weights' loading decided can be set where the old weights' loading was.

    Raises:
        ManifestMismatch: they decided other attributes; names the first.
    """
    keys = [{(path, name) for path, values in state.items() for name in values} for state in (held, offered)]
    for path, name in sorted(keys[0] ^ keys[1]):
        raise ManifestMismatch(
            f"only one of the old and the new weights sets {path}.{name}", "start a new replica from the new weights"
        )


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the kernel tells what is free."""

    meminfo: Path = MEMINFO
    cgroup: Path = CGROUP
    spare: int = field(default=SPARE_BYTES)

    def available(self) -> int | None:
        """Bytes of host memory that can be had without swapping; ``None`` where nobody says."""
        told = [bytes_ for bytes_ in (self._of_host(), self._of_container()) if bytes_ is not None]
        return min(told) if told else None

    def check(self, nbytes: int, workers: int) -> None:
        """Check that ``workers`` workers of this host can each stage ``nbytes``.

        Raises:
            PublishError: they cannot; says what is missing.
        """
        free, need = self.available(), nbytes * workers + self.spare
        if free is not None and free < need:
            raise PublishError(
                f"staging {workers} x {nbytes} bytes beside the old weights needs {need} bytes of host memory, "
                f"{free} are available",
                "free some, or start a new replica from the new weights",
            )

    def _of_host(self) -> int | None:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(self.meminfo), re.MULTILINE)
        return int(found[1]) << 10 if found else None

    def _of_container(self) -> int | None:
        """Under a limit of cgroup v2; pages of files that nobody uses any more can be had too."""
        limit, used = _read(self.cgroup / "memory.max").strip(), _read(self.cgroup / "memory.current").strip()
        if not (limit.isdigit() and used.isdigit()):
            return None
        cached = re.search(r"^inactive_file (\d+)", _read(self.cgroup / "memory.stat"), re.MULTILINE)
        return max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
