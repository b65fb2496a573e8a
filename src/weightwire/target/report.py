"""What a load did, step by step: the return value of ``receive`` and the rows of every table that is printed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from weightwire.manifest.records import Manifest
from weightwire.types import Json


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rung of the fallback ladder.

    Attributes:
        way: ``peer``, ``tensors`` (another program's) or ``disk``.
        who: the peer's label, the checkpoint's path, or empty.
        outcome: ``ok``, ``skipped`` or ``failed``.
        reason: why it was skipped or failed, one line; empty if ok.
        seconds: how long it took.
    """

    way: str
    who: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one peer contributed: ``nbytes`` verified bytes over ``path``, ``relayed`` of them as a relay."""

    peer: str
    path: str
    nbytes: int
    bad_leaves: int = 0
    relayed: int = 0


@dataclass(kw_only=True)
class LoadReport:
    """The outcome of one rank's load.

    Attributes:
        source: ``peer``, ``tensors`` (those of another program, copied into the model) or ``disk``: where the weights
            finally came from.
        stage: stage of the received bytes, empty where they were loaded as a checkpoint is (``disk``, ``tensors``).
        verified: every byte of the manifest had its digest. Always true for what peers gave; a load that is not raises.
        content_id: of this rank's shard, empty where there is no stage before it is published.
        weights_id: of the whole replica, likewise.
        revision: the source's revision, or ``None``.
        unpinned: the target named no revision, so any source's was taken.
        nbytes: bytes received.
        seconds: phase -> seconds (``discover``, ``plan``, ``register``, ``transfer``, ``verify``, ``decide`` …).
            ``verify`` runs inside ``transfer`` and is summed over lanes; so do ``paced`` (our own reads were held back
            to keep to a source's cap, likewise summed) and ``queue`` (every source served as many readers as it takes).
        shares: who contributed what.
        followed: the replica incarnation that was still reading its disk when it was chosen, or empty.
        steps: the fallback ladder as it was climbed.
        retries: chunks that had to be asked again.
        duplicated: bytes that were asked for twice at the end, because one peer was much slower than another.
        warnings: slow paths and other things that a person should know, one line each.
        resharded_from: tensor-parallel size of the source where it was another one than ours, else 0. Then
            ``weights_id`` and ``content_id`` are of what this replica now holds.
        source_weights_id: what the source held, where it was resharded, or was another program's tensors.
        amplification: bytes read over bytes needed, where it was resharded.
        manifest: of the received bytes, for publishing them on; ``None`` for ``disk``. Not part of ``to_json``.
    """

    source: str = ""
    stage: str = ""
    verified: bool = False
    content_id: str = ""
    weights_id: str = ""
    followed: str = ""
    revision: str | None = None
    unpinned: bool = False
    nbytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    shares: list[Share] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    retries: int = 0
    duplicated: int = 0
    warnings: list[str] = field(default_factory=list)
    resharded_from: int = 0
    source_weights_id: str = ""
    amplification: float = 1.0
    manifest: Manifest | None = field(default=None, repr=False, compare=False)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds[name]``."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    @property
    def gigabytes_per_second(self) -> float:
        """Verified bytes over the transfer's wall time; 0 where nothing was transferred."""
        elapsed = self.seconds.get("transfer", 0.0)
        return self.nbytes / elapsed / 1e9 if elapsed else 0.0

    @property
    def paths(self) -> list[str]:
        """The distinct paths that carried bytes."""
        return sorted({share.path for share in self.shares if share.nbytes})

    def to_json(self) -> dict[str, Json]:
        """All of it as plain data."""
        plain: dict[str, Json] = asdict(replace(self, manifest=None))
        del plain["manifest"]
        return plain | {"paths": list(self.paths), "gigabytes_per_second": self.gigabytes_per_second}
