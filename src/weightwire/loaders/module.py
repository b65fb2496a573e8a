"""The library's verbs for any ``nn.Module``: ``publish``, ``receive``, and both at once: ``relay``."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from torch import nn

from weightwire.config import Settings
from weightwire.errors import ConfigError, WeightwireError
from weightwire.identity.identity import Identity
from weightwire.loaders.member import Member
from weightwire.loaders.relay import PublicationRelay
from weightwire.manifest.catalogue import Catalogue, ConstructionNames, catalogue
from weightwire.metadata.decision import DEFAULT_VOTE_S, DecisionStore, Group, TorchDecisions
from weightwire.observability.progress import Progress, silent
from weightwire.source.described import Claim
from weightwire.source.publication import Publication
from weightwire.source.publish import PublishReport, publish_shard
from weightwire.source.snapshot import Snapshot
from weightwire.target.discover import give_up
from weightwire.target.offer import Want
from weightwire.target.receiver import Receiver
from weightwire.target.report import LoadReport
from weightwire.types import Coordinates, Stage

log = logging.getLogger(__name__)


class Published:
    """A module that others can load from, until the ``with`` block ends or ``withdraw`` is called.

    Attributes:
        report: what was published.
        received: how the module got its weights, where ``relay`` filled it.
    """

    def __init__(
        self,
        member: Member,
        publication: Publication,
        report: PublishReport,
        module: nn.Module,
        received: LoadReport | None = None,
    ) -> None:
        self.report = report
        self.received = received
        self._member = member
        self._publication = publication
        self._module = module

    @property
    def readers(self) -> int:
        """Read leases that are open now."""
        return len(self._publication.leases)

    def pause(self) -> None:
        """Return once nobody reads and nobody can; the bytes may change until ``resume``."""
        self._publication.pause()

    def resume(self) -> None:
        """Offer the same bytes again. For bytes that changed, withdraw and publish anew."""
        self._publication.resume()

    def transforms(self) -> Snapshot:
        """Copy-on-transform: readers keep the published bytes while the module goes on to change itself.

        Enter ``.guard(submodule)`` around each submodule's transform.
        """
        return self._publication.guard(self._module)

    def withdraw(self) -> None:
        """End it; returns when the bytes may change or be freed. Idempotent."""
        self._publication.withdraw()
        self._member.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.withdraw()


def publish(  # noqa: PLR0913  (keyword-only, each with a default that is right for one rank)
    module: nn.Module,
    identity: Identity,
    *,
    url: str | None = None,
    coordinates: Coordinates | None = None,
    group: Group | None = None,
    names: ConstructionNames | None = None,
    classes: Mapping[str, str] | None = None,
    ordinal: int = 0,
    received: LoadReport | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Published:
    """Offer ``module``'s weights to others, as they are now, without copying them.

    The module must not change them while they are published; ``pause`` or ``transforms`` are for when it has to.

    Args:
        module: materialised, complete; parameters, buffers and declared attributes are offered.
        identity: what makes them interchangeable (``Identity``); its stage says when they were taken.
        url: metadata server, ``host:port``; default ``WEIGHTWIRE_URL``.
        coordinates: this rank's, for several ranks.
        group: the ranks (``ranks(...)``), for several ranks; all of them call ``publish``.
        names: of ``weightwire.capture(module)`` at construction, where aliases are wired or storage is bound later.
        classes: name or pattern -> ``weight``, ``derived`` or ``runtime``, for attributes that no module declares.
        ordinal: where several weights live under one identity, "latest" takes the highest.
        received: what ``receive`` returned for this very module and stage, if nothing has changed since: its bytes were
            just verified and are not digested again.
        settings: instead of the environment's.
        progress: see ``observability.progress``.

    Raises:
        CatalogueError: a tensor cannot be described; names it.
        PublishError: another rank cannot publish, or no transport can serve this memory.
        ConfigError: no metadata server is named, or settings contradict each other.
    """
    where, ranks_ = _alone(identity, coordinates, group)
    try:
        described = catalogue(module, names, classes=classes)
        member = Member(_settings(settings, url))
    except WeightwireError as error:
        ranks_.refuse(f"publish/{identity.stage.value}", error.problem)
        raise
    try:
        life = ranks_.once("replica", uuid.uuid4().hex)
        claim = Claim(
            identity=identity,
            coordinates=where,
            world_size=ranks_.size,
            replica_incarnation=str(life),
            ordinal=ordinal,
        )
        publication = member.node.announce(claim)
        manifest = received.manifest if received else None
        report = publish_shard(publication, described, ranks_, manifest=manifest, progress=progress)
    except BaseException:
        member.close()
        raise
    return Published(member, publication, report, module)


def receive(  # noqa: PLR0913  (as publish)
    module: nn.Module,
    identity: Identity | Sequence[Identity],
    *,
    url: str | None = None,
    coordinates: Coordinates | None = None,
    group: Group | None = None,
    names: ConstructionNames | None = None,
    classes: Mapping[str, str] | None = None,
    weights_id: str = "",
    latest: bool = False,
    has_fallback: bool = False,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> LoadReport:
    """Fill ``module`` from a running peer: every byte verified, or an error and no claim about the module's weights.

    Args:
        module: constructed and materialised; what its tensors hold does not matter.
        identity: of what is wanted; several of them, preferred first, if more than one stage will do. Its revision, if
            it names one, must be the source's.
        url: metadata server, ``host:port``; default ``WEIGHTWIRE_URL``.
        coordinates: this rank's, for several ranks.
        group: the ranks, for several ranks; all of them call ``receive`` and all succeed or all raise.
        names: as for ``publish``.
        classes: as for ``publish``.
        weights_id: take exactly these weights.
        latest: where several weights are ready, take those with the highest ordinal.
        has_fallback: the caller can load from elsewhere, so a metadata server that has just started is not waited for.
        settings: instead of the environment's.
        progress: see ``observability.progress``.

    Raises:
        NoSourceError: nobody serves this.
        MismatchError: the module is not what is offered, found before the first byte; or several weights are offered.
        TransferError: no peer delivered.
        DecisionError: another rank could not take its weights.
        MetadataUnreachable: the metadata server did not answer.
    """
    wanted = [identity] if isinstance(identity, Identity) else list(identity)
    where, ranks_ = _alone(wanted[0], coordinates, group)
    member = _member(settings, url, ranks_, serves=False)
    want = _want(wanted, where, member.settings)
    want = replace(want, pinned=weights_id, latest=latest, has_disk=has_fallback)
    with member:
        receiver = Receiver(reader=member.reader, want=want, group=ranks_.at("receive"), progress=progress)
        _fill(receiver, lambda: catalogue(module, names, classes=classes))
    return receiver.report


def relay(  # noqa: PLR0913  (as publish)
    module: nn.Module,
    identity: Identity | Sequence[Identity],
    *,
    url: str | None = None,
    coordinates: Coordinates | None = None,
    group: Group | None = None,
    names: ConstructionNames | None = None,
    classes: Mapping[str, str] | None = None,
    weights_id: str = "",
    latest: bool = False,
    has_fallback: bool = False,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Published:
    """``receive`` and ``publish`` in one: what arrives is passed on to others at once, and offered when all is there.

    Replicas that start together this way take little more than one shard from their source. As for ``publish``, the
    module must not change its weights until it is paused or withdrawn; ``received`` tells how it was filled.

    Args:
        module: as for ``receive``.
        identity: as for ``receive``.
        url: as for ``receive``.
        coordinates: as for ``receive``.
        group: as for ``receive``.
        names: as for ``receive``.
        classes: as for ``receive``.
        weights_id: as for ``receive``.
        latest: as for ``receive``.
        has_fallback: as for ``receive``.
        settings: as for ``receive``.
        progress: as for ``receive``.

    Raises:
        WeightwireError: as ``receive``, and as ``publish``; nothing is offered then.
    """
    wanted = [identity] if isinstance(identity, Identity) else list(identity)
    where, ranks_ = _alone(wanted[0], coordinates, group)
    member = _member(settings, url, ranks_, serves=True)
    want = _want(wanted, where, member.settings)
    want = replace(want, pinned=weights_id, latest=latest, has_disk=has_fallback)
    announced: list[Publication] = []

    def announce(stage: Stage) -> Publication:
        claim = Claim(
            identity=want.stages[stage],
            coordinates=where,
            world_size=ranks_.size,
            replica_incarnation=str(ranks_.once("replica", uuid.uuid4().hex)),
        )
        announced.append(member.node.announce(claim))
        return announced[-1]

    try:
        passing_on = PublicationRelay(lambda offer: announce(offer.choice.stage))
        receiver = Receiver(
            reader=member.reader, want=want, group=ranks_.at("receive"), progress=progress, relay=passing_on
        )
        described = _fill(receiver, lambda: catalogue(module, names, classes=classes))
        if announced[-1].over and not passing_on.broken:  # derived tensors came from another peer after all
            again = announce(announced[-1].claim.identity.stage)
            again.learn(receiver.header.build_facts, receiver.header.ordinal)
        report = publish_shard(announced[-1], described, ranks_, manifest=receiver.manifest, progress=progress)
    except BaseException:
        member.close()
        raise
    return Published(member, announced[-1], report, module, receiver.report)


def ranks(store: Any, rank: int, size: int, epoch: str = "0", vote_s: float = DEFAULT_VOTE_S) -> Group:
    """The ranks of one replica, for ``publish`` and ``receive``.

    Args:
        store: a ``torch.distributed`` store that all ranks reach (``TCPStore``, ``PrefixStore``), or a
            ``DecisionStore``.
        rank: this process's.
        size: how many there are.
        epoch: different for each use of one store; equal on all ranks.
        vote_s: seconds to wait for the others at one step; longer where ranks may finish far apart.
    """
    decisions: DecisionStore = store if hasattr(store, "record") else TorchDecisions(store)
    return Group(decisions, rank, size, epoch, vote_s)


def _member(settings: Settings | None, url: str | None, ranks_: Group, *, serves: bool) -> Member:
    """This process; where it cannot be one, the other ranks are told that it will not come."""
    try:
        return Member(_settings(settings, url), serves=serves)
    except WeightwireError as error:
        give_up(ranks_.at("receive"), error)
        raise


def _want(wanted: Sequence[Identity], where: Coordinates, settings: Settings) -> Want:
    return Want(
        stages={each.stage: each for each in wanted}, coordinates=where, accept_unpinned=settings.accept_unpinned
    )


def _fill(receiver: Receiver, describe: Callable[[], Catalogue]) -> Catalogue:
    """Find, then fill what ``describe`` gives; all of it in the receiver's report."""
    reader = receiver.reader
    receiver.report.warnings += [f"{name} is not available: {why}" for name, why in reader.unavailable.items()]
    try:
        receiver.find()
    except WeightwireError as error:
        log.info("nothing was received: %s", error)
        raise
    try:
        described = describe()
    except WeightwireError as error:
        receiver.decline(error)
        raise
    receiver.fill(described)
    return described


def _settings(settings: Settings | None, url: str | None) -> Settings:
    if settings is None:
        return Settings.from_env(url=url)
    if url is not None and settings.url != url:
        raise ConfigError("url is given twice", "put it into settings, or give url alone")
    return settings


def _alone(identity: Identity, coordinates: Coordinates | None, group: Group | None) -> tuple[Coordinates, Group]:
    where = coordinates or Coordinates()
    if group is None:
        if coordinates is not None and where != Coordinates():
            raise ConfigError("coordinates are given without a group", "give group=weightwire.ranks(store, rank, size)")
        return where, Group.solo()
    identity.shard_key(where)  # sizes that contradict each other are found here
    return where, group
