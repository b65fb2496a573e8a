"""One rank's load from peers, start to end: agree, plan, pull, verify, agree again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from weightwire.errors import (
    AuthError,
    DecisionError,
    FenceTimeout,
    GenerationMoved,
    ProtocolError,
    TransferError,
    WeightwireError,
)
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.leaves import chunk_bytes
from weightwire.manifest.plan import TransferPlan, plan
from weightwire.manifest.records import Manifest, weights_id
from weightwire.metadata.decision import Group, Vote
from weightwire.observability.metrics import PHASES, RECEIVED, process_metrics
from weightwire.observability.progress import Progress, silent
from weightwire.target.discover import Discovery, fetch_manifest
from weightwire.target.offer import Offer, Want
from weightwire.target.pull import BadLeaf, Bounds, PeerShare, Pull
from weightwire.target.reader import Reader
from weightwire.target.report import LoadReport, Share, Step
from weightwire.target.session import PeerSession
from weightwire.target.worklist import WorkList, chunked
from weightwire.transport.base import Registration
from weightwire.types import Json, TensorClass
from weightwire.wire.messages import Candidate, ManifestHeader

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Receiver:
    """One load of one rank. Use once: ``find`` before the model is constructed, then ``fill``.

    Attributes:
        reader: the means.
        want: what is asked for.
        group: the ranks that decide together; its epoch belongs to this load alone.
        progress: see ``observability.progress``.
        poison: overwrite everything before the first byte (a debugging aid: what was not filled then shows).
        report: filled as the load goes on; complete when ``fill`` returns or raises.
    """

    reader: Reader
    want: Want
    group: Group
    progress: Progress = silent
    poison: bool = False
    report: LoadReport = field(default_factory=LoadReport)
    _offer: Offer | None = None
    _declined: WeightwireError | None = None

    def find(self) -> Offer:
        """Agree with the other ranks on what to take, and fetch this rank's manifest.

        Raises:
            NoSourceError, WeightsConflict, MetadataError: as ``Discovery.choose``; every rank raises the same.
            TransferError: this rank cannot get its manifest. The other ranks are told so at once.
        """
        discovery = Discovery(reader=self.reader, want=self.want, group=self.group, progress=self.progress)
        with self.report.phase("discover"):
            choice = discovery.choose()
            try:
                self._offer = discovery.offer(choice)
            except WeightwireError as error:
                self.decline(error)
                raise
        self.report.stage = choice.stage.value
        self.report.weights_id = choice.weights_id
        self.report.revision = self._offer.header.revision or None
        self.report.unpinned = self.want.identity.revision is None
        if self.report.unpinned:
            self.report.warnings.append(
                f"UNPINNED: NO REVISION WAS NAMED, TOOK {self.report.revision or 'ONE THAT NAMES NONE'}"
            )
        return self._offer

    def decline(self, error: WeightwireError) -> None:
        """This rank cannot go on: tell the others before they start. Legal between ``find`` and ``fill``."""
        self._declined = error
        self.group.refuse("plan", error.problem)

    def fill(self, catalogue: Catalogue) -> LoadReport:
        """Fill ``catalogue``'s tensors with the verified bytes of the offer; returns when all ranks have succeeded.

        After an error before the first byte nothing was touched. After one later, tensors that a disk loader would not
        write (buffers, attributes) are as they were before, and parameters hold no meaning.

        Raises:
            DecisionError: another rank cannot go on, or did not finish; nobody may use its weights.
            MismatchError: this rank's model is not what is offered.
            TransferError: no peer delivered.
            FenceTimeout: the memory is condemned: do not fill it again, end the process.
        """
        assert self._offer is not None, "find first"
        with self.report.phase("plan"):
            agreed = self._agree(catalogue, self._offer.manifest)
        kept = catalogue.save(_not_refillable(catalogue))
        if self.poison:
            catalogue.poison()
        began = time.monotonic()
        try:
            self._pull(catalogue, agreed)
        except WeightwireError as error:
            if not isinstance(error, FenceTimeout):
                catalogue.restore(kept)
            self._step("failed", error, began)
            self._finish(Vote(ok=False, reason=error.problem))
            raise
        _measure(self.report)
        verdict = self._finish(Vote(ok=True, value=[self.want.coordinates.label(), agreed.manifest.content_id]))
        if verdict is not None:
            catalogue.restore(kept)
            self._step("failed", verdict, began)
            raise verdict
        self._step("ok", None, began)
        process_metrics().load("peer")
        self.report.source, self.report.verified = "peer", True
        self.report.content_id = agreed.manifest.content_id
        self.report.manifest = agreed.manifest
        return self.report

    @property
    def header(self) -> ManifestHeader:
        """What came with the manifest. Legal after ``find``."""
        assert self._offer is not None
        return self._offer.header

    @property
    def manifest(self) -> Manifest:
        """What was received: a publication of the same stage takes it over as it is."""
        assert self._offer is not None
        return self._offer.manifest

    def _agree(self, catalogue: Catalogue, manifest: Manifest) -> TransferPlan:
        try:
            planned = plan(catalogue.layout, manifest)
        except WeightwireError as error:
            self.decline(error)
            raise
        verdict = self.group.vote("plan", Vote(ok=True))
        if not verdict.ok:
            raise DecisionError(f"not all ranks can take their weights from a peer: {verdict.reason}", "see that rank")
        return planned

    def _pull(self, catalogue: Catalogue, planned: TransferPlan) -> None:
        memory = catalogue.bind(planned.layout)
        with self.report.phase("register"):
            into = {name: transport.register(memory) for name, transport in self.reader.transports.items()}
        try:
            with self.report.phase("transfer"):
                self._fetch(planned, into)
        finally:
            self._release(into)
        catalogue.apply_copies(planned.copies)
        catalogue.restore_references()

    def _release(self, into: dict[str, Registration]) -> None:
        for name, registration in into.items():
            self.reader.transports[name].deregister(registration, time.monotonic() + self.reader.stall_s)

    def _fetch(self, planned: TransferPlan, into: dict[str, Registration]) -> None:
        assert self._offer is not None
        deadline = time.monotonic() + self.reader.load_s
        tally = _Tally(self.progress, planned.layout.nbytes)
        weights, end = planned.layout.weight_leaves, len(planned.layout.leaves)
        if len(self._offer.candidates) == 1:  # derived leaves come from the same peer: no second connection
            weights = end
        self._run(planned.manifest, range(weights), into, self._offer.candidates, deadline, tally)
        if weights < end:
            self._fetch_derived(range(weights, end), into, deadline, tally)
        self.report.nbytes = sum(share.nbytes for share in self.report.shares)

    def _fetch_derived(
        self,
        derived: range,
        into: dict[str, Registration],
        deadline: float,
        tally: _Tally,
    ) -> None:
        """Derived leaves differ innocently between replicas: all from one peer, under that peer's own manifest."""
        assert self._offer is not None
        offer = self._offer
        others = [each for each in offer.candidates if each.record.incarnation != offer.origin.record.incarnation]
        for candidate in (offer.origin, *others):
            try:
                if candidate is not offer.origin:
                    self._offer = self._adopt(candidate, offer)
                self._run(self._offer.manifest, derived, into, (candidate,), deadline, tally)
            except FenceTimeout:
                raise
            except (TransferError, AuthError) as error:
                last: WeightwireError = error
                self.report.warnings.append(f"{candidate.record.incarnation[:8]} was not used: {error.problem}")
            else:
                return
        raise last

    def _adopt(self, candidate: Candidate, offer: Offer) -> Offer:
        """``offer`` with the manifest of another of its candidates, which must describe the same tensors."""
        header, manifest = fetch_manifest(self.reader, candidate, offer.choice, self.want.coordinates)
        if manifest.layout != offer.manifest.layout:
            raise ProtocolError("it describes the same weights otherwise", "another source is tried")
        return replace(offer, header=header, manifest=manifest, origin=candidate)

    def _run(
        self,
        manifest: Manifest,
        leaves: range,
        into: dict[str, Registration],
        candidates: tuple[Candidate, ...],
        deadline: float,
        tally: _Tally,
    ) -> None:
        size = chunk_bytes(manifest.layout.nbytes)
        work = WorkList(chunked(manifest.layout.leaves, leaves, size))
        bounds = Bounds(deadline=deadline, stall_s=self.reader.stall_s)
        pull = Pull(manifest, into, work, bounds, tally)
        opened: list[PeerSession] = []
        try:
            pull.run(self._sessions(candidates, manifest.content_id, opened))
        finally:
            self._account(pull, opened)

    def _sessions(
        self, candidates: tuple[Candidate, ...], content_id: str, opened: list[PeerSession]
    ) -> Iterator[PeerSession]:
        for candidate in candidates:
            try:
                session = PeerSession(self.reader, candidate, content_id)
            except (TransferError, AuthError) as error:
                self.report.warnings.append(f"{candidate.record.incarnation[:8]} was not used: {error.problem}")
                log.warning("%s", error)
                continue
            opened.append(session)
            yield session

    def _account(self, pull: Pull, opened: list[PeerSession]) -> None:
        report = pull.report
        self.report.retries += report.retries
        self.report.seconds["verify"] = self.report.seconds.get("verify", 0.0) + report.verify_s
        for share, session in zip(report.shares, opened, strict=False):
            self.report.warnings += session.warnings
            self._note(share)
            if share.error is not None:
                self._judge(share, session)
            session.close()

    def _note(self, share: PeerShare) -> None:
        known = {(old.peer, old.path): at for at, old in enumerate(self.report.shares)}
        at = known.get((share.peer, share.path))
        if at is None:
            self.report.shares.append(
                Share(peer=share.peer, path=share.path, nbytes=share.nbytes, bad_leaves=share.bad_leaves)
            )
            return
        old = self.report.shares[at]
        self.report.shares[at] = Share(
            peer=old.peer, path=old.path, nbytes=old.nbytes + share.nbytes, bad_leaves=old.bad_leaves + share.bad_leaves
        )

    def _judge(self, share: PeerShare, session: PeerSession) -> None:
        error = share.error
        assert error is not None
        self.report.warnings.append(f"{share.peer} was dropped: {error.problem}")
        process_metrics().retry(type(error).__name__)
        process_metrics().bad_leaves(share.bad_leaves)
        if isinstance(error, GenerationMoved) or session.moved():
            return  # it withdrew, as it may: no blame
        session.blame(error, error.leaf if isinstance(error, BadLeaf) else -1)

    def _finish(self, mine: Vote) -> WeightwireError | None:
        """Say how it went here and hear how it went everywhere; what is wrong, if anything."""
        with self.report.phase("decide"):
            verdict = self.group.vote("received", mine, timeout=self.reader.load_s + self.group.vote_s)
        if not verdict.ok:
            return DecisionError(f"not all ranks received their weights: {verdict.reason}", "see that rank's log")
        received = weights_id({str(pair[0]): str(pair[1]) for pair in map(_pair, verdict.values)})
        if received != self.report.weights_id:
            return DecisionError(
                "the ranks received different weights", "this is a bug or an attack; see the manifests"
            )
        return None

    def _step(self, outcome: str, error: WeightwireError | None, began: float) -> None:
        who = ", ".join(share.peer for share in self.report.shares if share.nbytes)
        seconds = time.monotonic() - began
        self.report.steps.append(
            Step(way="peer", who=who, outcome=outcome, reason=error.problem if error else "", seconds=seconds)
        )


class _Tally:
    """Counts verified bytes for the progress callback; called from several lanes."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress("transfer", self.done, self.total, "bytes")


def _measure(report: LoadReport) -> None:
    """What the process's metrics are told of a load whose bytes have arrived."""
    metrics = process_metrics()
    for phase in PHASES:
        if phase in report.seconds:
            metrics.phase(phase, report.seconds[phase])
    for share in report.shares:
        transport = share.path.partition("/")[0]
        metrics.moved(transport, RECEIVED, share.nbytes)
        metrics.path(transport, share.path)


def _not_refillable(catalogue: Catalogue) -> list[str]:
    """Entries that a disk loader may leave as they are: everything that is no parameter."""
    return [
        entry.name
        for entry in catalogue.layout.entries
        if entry.kind is TensorClass.DERIVED or entry.name not in catalogue.parameters
    ]


def _pair(value: Json) -> tuple[str, str]:
    match value:
        case [str(label), str(content)]:
            return label, content
    raise DecisionError("a rank's vote is malformed", "do all ranks run the same version?")
