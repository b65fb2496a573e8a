"""One rank's load from peers, start to end: agree, plan, pull, verify, agree again."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

from weightwire.errors import (
    DecisionError,
    DigestMismatch,
    FenceTimeout,
    WeightwireError,
)
from weightwire.manifest.availability import Availability
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.plan import TransferPlan
from weightwire.manifest.provisional import Provisional
from weightwire.manifest.records import Manifest, weights_id
from weightwire.manifest.reshard import ReshardPlan
from weightwire.metadata.decision import Group, Vote
from weightwire.observability.metrics import PHASES, RECEIVED, process_metrics
from weightwire.observability.progress import Progress, silent
from weightwire.target.discover import Discovery
from weightwire.target.family import gather
from weightwire.target.fetch import Fetch
from weightwire.target.following import outcome, refuse_conflict
from weightwire.target.offer import Offer, Want
from weightwire.target.reader import Reader
from weightwire.target.relaying import NoRelay, Relay
from weightwire.target.report import LoadReport, Step
from weightwire.target.reshard import Resharding, plan_offer
from weightwire.transport.base import Registration
from weightwire.types import Json, State, TensorClass
from weightwire.wire.messages import FindShard, ManifestHeader

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
        relay: passes on what has arrived, from the ranks' agreement on. It goes on after ``fill`` has returned; where
            ``fill`` raises, it was ended before anything else was done to the memory.
        report: filled as the load goes on; complete when ``fill`` returns or raises.
    """

    reader: Reader
    want: Want
    group: Group
    progress: Progress = silent
    poison: bool = False
    relay: Relay = field(default_factory=NoRelay)
    report: LoadReport = field(default_factory=LoadReport)
    _offer: Offer | None = None
    _declined: WeightwireError | None = None

    def find(self) -> Offer:
        """Agree with the other ranks on what to take, and fetch this rank's manifest.

        Raises:
            NoSourceError, WeightsConflict, MetadataError: as ``Discovery.choose``; every rank raises the same.
            TransferError: this rank cannot get its manifest. The other ranks are told so at once.
        """
        discovery = self._discovery
        with self.report.phase("discover"):
            choice = discovery.choose()
            try:
                resharded = choice.source_tp > 0
                self._offer = gather(self.reader, self.want, choice) if resharded else discovery.offer(choice)
            except WeightwireError as error:
                self.decline(error)
                raise
        self.report.stage = choice.stage.value
        self.report.weights_id, self.report.followed = choice.weights_id, choice.follow
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
            agreed = self._agree(catalogue, self._offer)
        kept = catalogue.save(_not_refillable(catalogue))
        if self.poison:
            catalogue.poison()
            if self._offer.shards:
                catalogue.restore(kept)  # derived tensors do not travel then
        began = time.monotonic()
        try:
            manifest = self._take(catalogue, agreed, self._offer)
        except WeightwireError as error:
            self.relay.end()
            if not isinstance(error, FenceTimeout):
                catalogue.restore(kept)
            self._step("failed", error, began)
            self._finish(Vote(ok=False, reason=error.problem))
            raise
        _measure(self.report)
        told = [self.want.coordinates.label(), manifest.content_id, self.report.weights_id]
        verdict = self._finish(Vote(ok=True, value=list[Json](told)))
        if verdict is not None:
            self.relay.end()
            catalogue.restore(kept)
            self._step("failed", verdict, began)
            raise verdict
        self._step("ok", None, began)
        process_metrics().load("peer")
        self.report.source, self.report.verified = "peer", True
        self.report.content_id = manifest.content_id
        self.report.manifest = manifest
        self._offer = replace(self._offer, agreed=manifest)
        return self.report

    @property
    def header(self) -> ManifestHeader:
        """What came with the manifest. Legal after ``find``."""
        assert self._offer is not None
        return self._offer.header

    @property
    def state(self) -> State:
        """Declared state of the source, which its modules' equals take over before their catalogue is taken."""
        assert self._offer is not None
        return self._offer.offered.state

    @property
    def manifest(self) -> Manifest:
        """What was received: a publication of the same stage takes it over as it is."""
        assert self._offer is not None
        return self._offer.manifest

    def _agree(self, catalogue: Catalogue, offer: Offer) -> TransferPlan | ReshardPlan:
        planned: TransferPlan | ReshardPlan
        try:
            if offer.shards:
                planned = plan_offer(catalogue, offer, self.want)
            else:
                planned = offer.offered.plan(catalogue.layout, provisional=bool(offer.choice.follow))
                offer = self._offer = replace(offer, agreed=planned.manifest)
        except WeightwireError as error:
            self.decline(error)
            raise
        verdict = self.group.vote("plan", Vote(ok=True))
        if not verdict.ok:
            raise DecisionError(f"not all ranks can take their weights from a peer: {verdict.reason}", "see that rank")
        if offer.choice.follow and isinstance(planned, TransferPlan):  # only now may leaves of theirs be counted
            growing = Provisional(planned.layout)
            growing.tell(0, offer.manifest.digests)
            self._offer = replace(offer, provisional=growing)
        return planned

    def _take(self, catalogue: Catalogue, planned: TransferPlan | ReshardPlan, offer: Offer) -> Manifest:
        """Fill ``catalogue``; the manifest of what it holds then."""
        if isinstance(planned, TransferPlan):
            deadline = time.monotonic() + self.reader.load_s
            received = self._pull(catalogue, planned)
            assert self._offer is not None
            growing = self._offer.provisional
            return received if growing is None else self._confirm(growing.manifest(), self._offer, deadline)
        resharding = Resharding(
            reader=self.reader, offer=offer, planned=planned, report=self.report, progress=self.progress
        )
        return resharding.run(catalogue)

    def _confirm(self, manifest: Manifest, offer: Offer, deadline: float) -> Manifest:
        """Of what was followed: what it turned out to be. Until then nothing of it counts."""
        find = FindShard(
            shard_key=offer.origin.record.shard_key,
            weights_id="",
            exclude=(self.reader.incarnation,),
            following=offer.choice.follow,
        )
        with self.report.phase("confirm"):
            weights = outcome(self.reader, find, offer.candidates, manifest, deadline)
            if self.group.rank == 0:
                asked = self._discovery
                same = replace(asked.query, replica_keys=(offer.choice.replica_key,))  # other stages have other ids
                refuse_conflict(self.reader, same, asked.policy, weights)
        self.report.weights_id = weights
        return manifest

    @property
    def _discovery(self) -> Discovery:
        return Discovery(reader=self.reader, want=self.want, group=self.group, progress=self.progress)

    def _pull(self, catalogue: Catalogue, planned: TransferPlan) -> Manifest:
        memory = catalogue.bind(planned.layout)
        assert self._offer is not None
        available = Availability(len(planned.layout.leaves))
        with self.report.phase("register"):
            served = self.relay.begin(self._offer, memory, available)
            own = {name: each.register(memory) for name, each in self.reader.transports.items() if name not in served}
        fetch = Fetch(
            reader=self.reader,
            want=self.want,
            offer=self._offer,
            into={name: own.get(name) or served[name] for name in self.reader.transports},
            report=self.report,
            progress=self.progress,
            relay=self.relay,
            available=available,
            relaying=bool(served),
        )
        try:
            with self.report.phase("transfer"):
                self._offer = fetch.run(planned)
        finally:
            self._release(own)
        if self.relay.broken:
            raise DigestMismatch("bytes changed in memory after they were verified", "suspect this machine's memory")
        catalogue.apply_copies(planned.copies)
        catalogue.restore_references()
        return self._offer.manifest  # not the planned one: derived tensors may have come from another peer

    def _release(self, into: dict[str, Registration]) -> None:
        for name, registration in into.items():
            self.reader.transports[name].deregister(registration, time.monotonic() + self.reader.stall_s)

    def _finish(self, mine: Vote) -> WeightwireError | None:
        """Say how it went here and hear how it went everywhere; what is wrong, if anything."""
        with self.report.phase("decide"):
            verdict = self.group.vote("received", mine, timeout=self.reader.load_s + self.group.vote_s)
        if not verdict.ok:
            return DecisionError(f"not all ranks received their weights: {verdict.reason}", "see that rank's log")
        ranks = list(map(_received, verdict.values))
        received = weights_id({label: content for label, content, _ in ranks})
        if self.report.resharded_from:  # new weights to others: the source's were checked when they were found
            self.report.weights_id = received
        elif {told for _, _, told in ranks} != {received}:
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


def _measure(report: LoadReport) -> None:
    """What the process's metrics are told of a load whose bytes have arrived."""
    metrics = process_metrics()
    for phase in PHASES:
        if phase in report.seconds:
            metrics.phase(phase, report.seconds[phase])
    for share in report.shares:
        transport = share.path.partition("/")[0]
        metrics.moved(transport, RECEIVED, share.nbytes)
        metrics.relayed(RECEIVED, share.relayed)
        metrics.path(transport, share.path)


def _not_refillable(catalogue: Catalogue) -> list[str]:
    """Entries that a disk loader may leave as they are: everything that is no parameter."""
    return [
        entry.name
        for entry in catalogue.layout.entries
        if entry.kind is TensorClass.DERIVED or entry.name not in catalogue.parameters
    ]


def _received(value: Json) -> tuple[str, str, str]:
    """A rank's label, the content id of what it received, and the weights id that it was to be part of."""
    match value:
        case [str(label), str(content), str(told)]:
            return label, content, told
    raise DecisionError("a rank's vote is malformed", "do all ranks run the same version?")
