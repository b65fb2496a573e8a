"""The bytes of one load: which peers are read, one after another or together, and what is said of each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from weightwire.config import MAX_STREAMS
from weightwire.errors import (
    AuthError,
    FenceTimeout,
    GenerationMoved,
    ProtocolError,
    SourceBusy,
    TransferError,
    WeightwireError,
)
from weightwire.manifest.availability import Availability
from weightwire.manifest.leafset import indices
from weightwire.manifest.leaves import chunk_bytes
from weightwire.manifest.plan import TransferPlan
from weightwire.manifest.provisional import Expected
from weightwire.observability.metrics import process_metrics
from weightwire.observability.progress import Progress
from weightwire.target.discover import QUIET_S, fetch_manifest
from weightwire.target.following import still_followed
from weightwire.target.offer import Offer, Want
from weightwire.target.peers import Bounds, NothingNewError, PeerShare
from weightwire.target.places import Places
from weightwire.target.pull import Pull
from weightwire.target.reader import Reader
from weightwire.target.relaying import NoRelay, Relay
from weightwire.target.report import LoadReport, Share
from weightwire.target.schedule import Schedule
from weightwire.target.session import PeerSession, peer_label
from weightwire.target.supply import Supply
from weightwire.target.verification import BadLeaf
from weightwire.transport.base import Registration
from weightwire.wire.messages import Candidate, FindShard

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Fetch:
    """One load's leaves, from the candidates of its offer into registered memory.

    Attributes:
        reader: the means.
        want: what was asked for.
        offer: what was found. Derived leaves may come from another candidate, whose manifest it holds then.
        into: the target memory, registered with each transport by name; it outlives ``run``.
        report: gets shares, retries, waits and warnings as they happen.
        progress: see ``observability.progress``.
        relay: passes on what has arrived.
        available: what has arrived, for ``relay``; over the layout of the offer's manifest.
        relaying: whether it really is passed on: then others read here, and this target has a place among the relays.
    """

    reader: Reader
    want: Want
    offer: Offer
    into: dict[str, Registration]
    report: LoadReport
    progress: Progress
    relay: Relay = field(default_factory=NoRelay)
    available: Availability = field(default_factory=lambda: Availability(0))
    relaying: bool = False

    def __post_init__(self) -> None:
        self.manifest = self.offer.expected
        self._deadline = time.monotonic() + self.reader.load_s
        self._tally = _Tally(self.progress, self.offer.manifest.layout.nbytes)

    def run(self, planned: TransferPlan) -> Offer:
        """Fetch all leaves of ``planned`` into the registered memory, each verified.

        Returns the offer with the manifest that the derived leaves came under. Legal once.

        Raises:
            TransferError: no peer delivered.
            FenceTimeout: a peer may still write; the memory is condemned.
        """
        weights, end = planned.layout.weight_leaves, len(planned.layout.leaves)
        missing = set(range(end))
        try:
            self._leaves(self.manifest, missing, self._places(self.offer.candidates))
        except FenceTimeout:
            raise
        except TransferError:
            if not missing or min(missing) < weights or self.offer.provisional is not None:
                raise
            self.relay.end()  # what it passed on of these is about to be replaced
            self._derived(range(weights, end))
        self.report.nbytes = sum(share.nbytes for share in self.report.shares)
        return self.offer

    def _derived(self, derived: range) -> None:
        """Derived leaves differ innocently between replicas: all from one peer, under that peer's own manifest."""
        offer = self.offer
        others = [each for each in offer.candidates if each.record.incarnation != offer.origin.record.incarnation]
        for candidate in (offer.origin, *others):
            try:
                if candidate is not offer.origin:
                    self.offer = self._adopt(candidate, offer)
                places = self._places((candidate,), patient=candidate is (offer.origin, *others)[-1], search=False)
                self._leaves(self.offer.manifest, set(derived), places)
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
        header, offered = fetch_manifest(self.reader, candidate, offer.choice, self.want.coordinates)
        manifest = offered.under(offer.manifest.layout)
        if manifest is None:
            raise ProtocolError("it describes the same weights otherwise", "another source is tried")
        return replace(offer, header=header, offered=offered, agreed=manifest, origin=candidate)

    def _leaves(self, manifest: Expected, missing: set[int], places: Places) -> None:
        """Fetch ``missing``, and take from it; where the sources left are merely full, wait for a place and go on."""
        size = chunk_bytes(manifest.layout.nbytes)
        while True:
            schedule = Schedule(manifest.layout.leaves, missing, size)
            stall_s = self.reader.stall_s
            growth_s = stall_s if self.offer.provisional is None else max(QUIET_S, stall_s)
            bounds = Bounds(deadline=self._deadline, stall_s=stall_s, growth_s=growth_s, lanes=MAX_STREAMS)
            pull = Pull(manifest, self.into, schedule, bounds, self._tally, self._verified(manifest))
            supply = self._supply(places, pull)
            supply.peers = pull.peers
            try:
                pull.run(supply)
            except FenceTimeout:
                raise
            except TransferError:
                if not supply.busy:
                    raise
            finally:
                self._account(pull, supply)
                missing -= set(indices(schedule.verified))
            if schedule.finished:
                return
            with self.report.phase("queue"):
                places.wait(supply.busy.values(), manifest, self._deadline)

    def _supply(self, places: Places, pull: Pull) -> Supply:
        manifest = pull.manifest

        def find() -> tuple[Candidate, ...]:
            assert places.find is not None
            found: tuple[Candidate, ...] = ()
            try:
                found = self.reader.metadata.find_shard(places.find).candidates
            finally:  # whoever is followed may be gone together with the server
                self._check(pull, found + self.offer.candidates)
            return found

        return Supply(
            places.candidates,
            lambda candidate: PeerSession(self.reader, candidate, manifest),
            find if places.find is not None else None,
            seated=self.relaying,
            content_id=manifest.content_id,
            unusable=self._unusable,
        )

    def _verified(self, manifest: Expected) -> Callable[[int], None]:
        """What is told of leaves that are in place: a relay passes on what its own manifest says, and nothing else."""
        return self.available.add if manifest is self.manifest else lambda _: None

    def _places(self, candidates: tuple[Candidate, ...], *, patient: bool = True, search: bool = True) -> Places:
        find = FindShard(
            shard_key=candidates[0].record.shard_key,
            weights_id=self.offer.choice.weights_id,
            exclude=(self.reader.incarnation,),
            asker=self.reader.incarnation if self.relaying else "",
            following=self.offer.choice.follow,
        )
        patience = self.reader.wait_for_loading_s if patient else 0.0
        return Places(self.reader, candidates, find if search else None, patience)

    def _unusable(self, candidate: Candidate, error: TransferError | AuthError) -> None:
        if isinstance(error, SourceBusy):
            self._note_busy(candidate, error)
            return
        self.report.warnings.append(f"{candidate.record.incarnation[:8]} was not used: {error.problem}")
        log.warning("%s", error)

    def _check(self, pull: Pull, candidates: tuple[Candidate, ...]) -> None:
        """Where somebody is followed and nobody who was joined delivers: whether that is worth waiting for."""
        idle = pull.peers and not any(peer.useful for peer in pull.reading)
        if self.offer.choice.follow and idle:
            still_followed(self.reader, self.offer.choice.follow, candidates)

    def _note_busy(self, candidate: Candidate, error: SourceBusy) -> None:
        said = f"{peer_label(candidate)} had no place: {error.problem}"
        if said not in self.report.warnings:  # it is asked again and again
            self.report.warnings.append(said)
            log.info("%s", said)

    def _account(self, pull: Pull, supply: Supply) -> None:
        report = pull.report
        self.report.retries += report.retries
        self.report.duplicated += report.duplicated
        self.report.seconds["verify"] = self.report.seconds.get("verify", 0.0) + report.verify_s
        for share, session in zip(report.shares, supply.opened, strict=False):
            self.report.warnings += session.warnings
            self._note(share)
            if share.outrun:
                self.report.warnings.append(f"{share.peer} was much slower than others at the end: they took over")
            if session.paced_s:
                self.report.seconds["paced"] = self.report.seconds.get("paced", 0.0) + session.paced_s
            if isinstance(share.error, SourceBusy):
                supply.busy[session.record.incarnation, session.record.generation] = session.candidate
                self._note_busy(session.candidate, share.error)
            elif share.error is not None:
                self._judge(share, session)
            session.close()

    def _note(self, share: PeerShare) -> None:
        known = {(old.peer, old.path): at for at, old in enumerate(self.report.shares)}
        at = known.setdefault((share.peer, share.path), len(known))
        if at == len(self.report.shares):
            self.report.shares.append(Share(peer=share.peer, path=share.path, nbytes=0))
        old = self.report.shares[at]
        self.report.shares[at] = replace(
            old,
            nbytes=old.nbytes + share.nbytes,
            bad_leaves=old.bad_leaves + share.bad_leaves,
            relayed=old.relayed + (share.nbytes if share.relay else 0),
        )

    def _judge(self, share: PeerShare, session: PeerSession) -> None:
        error = share.error
        assert error is not None
        self.report.warnings.append(f"{share.peer} was dropped: {error.problem}")
        process_metrics().retry(type(error).__name__)
        process_metrics().bad_leaves(share.bad_leaves)
        if isinstance(error, GenerationMoved | NothingNewError) or session.moved():
            return  # it withdrew, as it may, or got nothing itself: no blame
        session.blame(error, error.leaf if isinstance(error, BadLeaf) else -1)


class _Tally:
    """Counts verified bytes for the progress callback; called from several lanes."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress("transfer", self.done, self.total, "bytes")
