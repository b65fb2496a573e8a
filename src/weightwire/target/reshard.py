"""Filling one rank from the ranks of a source with another tensor-parallel size.

Whole leaves are read into bounded staging, each is verified there, and what is needed of them is copied into the live
tensors: a peer never writes into those. The ranks of the source are read one after the other; a peer that fails is
replaced by another one with the same content id, which goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from weightwire.errors import AuthError, FenceTimeout, GenerationMoved, TransferError, WeightwireError
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.digest import digest_leaves, digest_span
from weightwire.manifest.records import Manifest
from weightwire.manifest.reshard import ReshardPlan, leaf_runs, plan_reshard
from weightwire.manifest.scatter import Disagreement, Scatter
from weightwire.observability.metrics import process_metrics
from weightwire.observability.progress import Progress
from weightwire.target.offer import Offer, Shard, Want
from weightwire.target.pacing import patience_s
from weightwire.target.reader import Reader
from weightwire.target.report import LoadReport, Share
from weightwire.target.session import PeerSession
from weightwire.target.verification import BadLeaf
from weightwire.transport.base import Connection, Read, Registration, Transport
from weightwire.wire.messages import Candidate

log = logging.getLogger(__name__)

STAGING_BYTES = 32 * 1024 * 1024
RUN_BYTES = 4 * 1024 * 1024
"""Neighbouring leaves that are read together."""
FENCE_S = 10.0

_CONDEMNED: list[object] = []
"""Staging that a peer may still write to: kept for the life of the process, never used again."""


def plan_offer(catalogue: Catalogue, offer: Offer, want: Want) -> ReshardPlan:
    """How ``catalogue`` is filled from ``offer.shards``; raises as ``plan_reshard``."""
    return plan_reshard(
        catalogue.layout,
        [shard.manifest for shard in offer.shards],
        stage=offer.choice.stage,
        max_amplification=want.max_amplification,
    )


@dataclass(kw_only=True)
class Resharding:
    """One fill. Use once.

    Attributes:
        reader: the means.
        offer: with the shards of all source ranks.
        planned: by ``plan_offer``.
        report: of the load; shares, warnings, bytes and retries are added.
        progress: see ``observability.progress``.
    """

    reader: Reader
    offer: Offer
    planned: ReshardPlan
    report: LoadReport
    progress: Progress
    _staging: torch.Tensor = field(init=False)
    _deadline: float = field(init=False)
    _done: int = 0

    def run(self, catalogue: Catalogue) -> Manifest:
        """Fill and verify; the manifest of what ``catalogue`` now holds.

        Raises:
            TransferError: no peer delivered. Only tensors of class weight were written.
            DigestMismatch: two ranks of the source hold different bytes of what they should share.
        """
        self._staging, self._deadline = _memory(), time.monotonic() + self.reader.load_s
        self._tell()
        scatter = Scatter(catalogue, [shard.manifest.layout for shard in self.offer.shards], self.planned)
        with self.report.phase("transfer"):
            scatter.zero()
            for rank, shard in enumerate(self.offer.shards):
                self._read(rank, shard, scatter)
        catalogue.restore_references()
        self.report.nbytes = self._done
        with self.report.phase("verify"):
            digests = digest_leaves(catalogue.memory, catalogue.layout.leaves, threads=min(4, os.cpu_count() or 1))
        return Manifest(layout=catalogue.layout, digests=digests)

    def _tell(self) -> None:
        choice = self.offer.choice
        self.report.resharded_from, self.report.source_weights_id = choice.source_tp, choice.weights_id
        self.report.amplification = self.planned.amplification
        said = f"resharded from TP={choice.source_tp}, reading {self.planned.amplification:.2f} times what is needed"
        self.report.warnings.append(said)
        log.warning("no source of this size: %s", said)
        process_metrics().slow_path("peer", "resharded")

    def _read(self, rank: int, shard: Shard, scatter: Scatter) -> None:
        spans = [leaf.span for leaf in shard.manifest.layout.leaves]
        runs = deque(leaf_runs(spans, self.planned.ranks[rank].leaves, RUN_BYTES))
        last: WeightwireError = TransferError(f"no peer is left to read rank {rank} from", "see the reasons above")
        for candidate in shard.candidates if runs else ():
            try:
                self._read_from(candidate, rank, runs, scatter)
            except Disagreement:
                raise
            except (TransferError, AuthError) as error:
                last = error
                self.report.retries += 1
            if not runs:
                return
        if runs:
            raise last if isinstance(last, TransferError) else TransferError(last.problem, last.remedy)

    def _read_from(self, candidate: Candidate, rank: int, runs: deque[range], scatter: Scatter) -> None:
        """Read ``runs`` from one peer; those that remain in it afterwards did not arrive."""
        manifest = self.offer.shards[rank].manifest
        try:
            session = PeerSession(self.reader, candidate, manifest)
        except (TransferError, AuthError) as error:
            self.report.warnings.append(f"{candidate.record.incarnation[:8]} was not used: {error.problem}")
            raise
        lane = _Lane(self.reader, session, self._deadline, self._staging)
        before = self._done
        try:
            for run, data in lane.runs(manifest, runs):
                scatter.take(rank, manifest.layout.leaves[run[0]].span.offset, data)
                self._done += data.numel()
                self.progress("transfer", self._done, self.planned.read, "bytes")
        except Disagreement:
            raise
        except (TransferError, AuthError) as error:
            self._judge(lane.error or error, session)
            raise
        finally:
            if not lane.close():
                _CONDEMNED.append(self._staging)
                self._staging = _memory()
            session.close()
            self.report.warnings += session.warnings
            self.report.shares.append(
                Share(peer=session.label, path=lane.path, nbytes=self._done - before, bad_leaves=lane.bad_leaves)
            )

    def _judge(self, error: TransferError | AuthError, session: PeerSession) -> None:
        self.report.warnings.append(f"{session.label} was dropped: {error.problem}")
        log.warning("peer %s dropped: %s", session.label, error)
        process_metrics().retry(type(error).__name__)
        if isinstance(error, BadLeaf):
            process_metrics().bad_leaves(1)
        if isinstance(error, GenerationMoved) or session.moved():
            return  # it withdrew, as it may: no blame
        session.blame(error, error.leaf if isinstance(error, BadLeaf) else -1)


@dataclass
class _UnderWay:
    run: range
    registration: Registration
    data: torch.Tensor
    read: Read | None = None


class _Lane:
    """One connection to one peer, and the part of the staging that each of its reads lands in."""

    def __init__(self, reader: Reader, session: PeerSession, deadline: float, staging: torch.Tensor) -> None:
        self.path = ""
        self.bad_leaves = 0
        self.error: TransferError | None = None
        self._reader = reader
        self._session = session
        self._deadline = deadline
        self._staging = staging
        self._connection: Connection | None = None
        self._under_way: deque[_UnderWay] = deque()
        self._free = deque(staging.view(-1, RUN_BYTES).unbind())

    def runs(self, manifest: Manifest, runs: deque[range]) -> Iterator[tuple[range, torch.Tensor]]:
        """Each run's verified bytes, in order, valid until the next is asked for; it leaves ``runs`` only then."""
        self._open()
        while runs:
            self._start(manifest, list(islice(runs, len(self._under_way) + len(self._free))))
            yield self._finish(manifest)
            self._release()
            runs.popleft()

    def _open(self) -> None:
        self._session.watch(self._failed)
        self._connection = self._session.connect(min(self._deadline, time.monotonic() + self._reader.stall_s))
        self.path = self._connection.path

    def _start(self, manifest: Manifest, waiting: Sequence[range]) -> None:
        """Keep as many reads under way as pay, of the first of ``waiting``."""
        assert self._connection is not None
        most = min(self._connection.depth, len(waiting))
        while len(self._under_way) < most and self._free:
            run, slot = waiting[len(self._under_way)], self._free.popleft()
            leaves = manifest.layout.leaves
            begin, end = leaves[run[0]].span.offset, leaves[run[-1]].span.end
            data = slot[: end - begin]
            segment = Segment(begin, data.data_ptr(), end - begin, "cpu")
            region = Region(self._staging.data_ptr(), self._staging.numel(), "cpu")
            registration = self._transport.register(AddressSpace([segment], [region], self._staging))
            one = _UnderWay(run, registration, data)
            self._under_way.append(one)
            one.read = self._connection.read(registration.memory.span, registration)

    def _finish(self, manifest: Manifest) -> tuple[range, torch.Tensor]:
        """Wait for the first, and verify it."""
        one = self._under_way[0]
        assert one.read is not None
        outstanding = sum(other.data.numel() for other in self._under_way)
        patience = patience_s(self._reader.stall_s, outstanding, self._session.rate)
        one.read.wait(min(self._deadline, time.monotonic() + patience))
        for index in one.run:
            found = digest_span(one.registration.memory, manifest.layout.leaves[index].span)
            if found != manifest.digest(index):
                self.bad_leaves += 1
                raise BadLeaf(self._session.label, index)
        return one.run, one.data

    def _release(self) -> None:
        """What ``_finish`` gave is copied."""
        one = self._under_way.popleft()
        self._transport.deregister(one.registration, time.monotonic() + self._reader.stall_s)
        self._free.append(self._staging.narrow(0, _offset(self._staging, one.data), RUN_BYTES))

    def close(self) -> bool:
        """End the connection; whether the staging may be used again."""
        if not self._fence():
            return False
        if self._connection is not None:
            self.path = self._connection.path  # some know it only once they have read
        while self._under_way:
            self._release()
        return True

    @property
    def _transport(self) -> Transport:
        return self._reader.transports[self._session.transport]

    def _failed(self, error: TransferError) -> None:
        """From the session's thread: the source is of no more use."""
        self.error = self.error or error
        self._fence()

    def _fence(self) -> bool:
        if self._connection is None:
            return True
        try:
            self._connection.fence(time.monotonic() + FENCE_S)
        except FenceTimeout as error:
            log.error("%s", error)  # noqa: TRY400  (the one-line error is the message; its traceback says nothing)
            return False
        return True


def _memory() -> torch.Tensor:
    return torch.empty(STAGING_BYTES, dtype=torch.uint8)


def _offset(staging: torch.Tensor, part: torch.Tensor) -> int:
    return part.data_ptr() - staging.data_ptr()
