"""Publishing one rank's shard together with the other ranks: digest, agree on the weights id, register, offer."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field

import torch

from weightwire.errors import PublishError, WeightwireError
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.records import Manifest, weights_id
from weightwire.metadata.decision import Group, Verdict, Vote
from weightwire.observability.progress import Progress, silent
from weightwire.source.described import Holding
from weightwire.source.publication import Publication
from weightwire.types import Json

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PublishReport:
    """What came of publishing. Attempted and published are different facts: a failed attempt is never made up for.

    Attributes:
        stage: of the bytes.
        attempted: publishing began.
        published: the shard is offered (or held).
        reason: why not, one line.
        content_id: of the shard.
        weights_id: of the replica.
        nbytes: offered.
        relayed: bytes that others asked for while this shard was still being received, over transports that tell.
        held: bytes kept a second time for readers of the raw stage.
        transports: that serve it.
        unavailable: transport name -> why it does not.
        seconds: phase -> seconds (``digest``, ``decide``, ``register``).
    """

    stage: str
    attempted: bool = True
    published: bool = False
    reason: str = ""
    content_id: str = ""
    weights_id: str = ""
    nbytes: int = 0
    relayed: int = 0
    held: int = 0
    transports: list[str] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def publish_shard(
    publication: Publication,
    catalogue: Catalogue,
    group: Group,
    *,
    manifest: Manifest | None = None,
    progress: Progress = silent,
    hold: bool = False,
) -> PublishReport:
    """Offer ``catalogue``'s bytes as they are now. All ranks call it; all publish, or none does.

    The bytes must not change until the publication is paused or withdrawn (copy-on-transform: ``publication.guard``).

    Args:
        publication: announced, still ``LOADING``.
        catalogue: taken at this stage.
        group: the ranks; its epoch is this publication's alone.
        manifest: what the bytes were just verified to be, by a rank that received them; else they are digested here.
        progress: see ``observability.progress``.
        hold: stop at ``HELD``; the engine calls ``publication.offer()`` once it may be read.

    Raises:
        PublishError: this rank, or another, cannot publish; the publication is withdrawn.
    """
    claim = publication.claim
    report = PublishReport(stage=claim.identity.stage.value)
    clock = _Clock(report.seconds)
    mine = Vote(ok=False)
    failed: WeightwireError | None = None
    try:
        catalogue.check_mirrors()
        if manifest is None:
            manifest = Manifest(layout=catalogue.layout, digests=_digests(catalogue, progress))
        mine = Vote(ok=True, value=[claim.coordinates.label(), manifest.content_id])
    except WeightwireError as error:
        failed, mine = error, Vote(ok=False, reason=error.problem)
    clock.lap("digest")
    verdict = group.vote(f"publish/{report.stage}", mine)
    clock.lap("decide")
    if failed is not None or manifest is None or not verdict.ok:
        publication.withdraw(0.0)
        reason = failed.problem if failed else f"not all ranks can publish: {verdict.reason}"
        raise PublishError(reason, failed.remedy if failed else "see that rank's log") from failed
    together = _together(verdict)
    memory = catalogue.bind(manifest.layout)
    publication.hold(Holding(manifest=manifest, memory=memory, weights_id=together))
    if not hold:
        publication.offer()
    clock.lap("register")
    report.published, report.content_id, report.weights_id = True, manifest.content_id, together
    report.nbytes, report.unavailable = manifest.layout.nbytes, dict(publication.memory.failed)
    report.transports, report.relayed = publication.served, publication.relayed
    log.info("published %s of %s: %d bytes", report.stage, claim.identity.model_id, report.nbytes)
    return report


def _digests(catalogue: Catalogue, progress: Progress) -> bytes:
    memory, leaves = catalogue.memory, catalogue.layout.leaves
    for device in memory.devices() - {"cpu"}:
        torch.cuda.synchronize(device)  # asynchronous work that still writes the bytes must be over (hazard H30)
    total, done = catalogue.layout.nbytes, 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("digest", done, total, "bytes")

    return digest_leaves(memory, leaves, threads=min(4, os.cpu_count() or 1), progress=advance)


def _together(verdict: Verdict) -> str:
    return weights_id(dict(map(_pair, verdict.values)))


def _pair(value: Json) -> tuple[str, str]:
    match value:
        case [str(label), str(content)]:
            return label, content
    raise PublishError("a rank's content id is malformed", "do all ranks run the same version?")


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self.last
        self.last = now
