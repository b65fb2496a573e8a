"""The library's verbs: ``publish``, ``filling``, ``receive``, all at once: ``relay``; and ``receive_tensors``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from weightwire.config import Settings
from weightwire.errors import ConfigError, FenceTimeout, WeightwireError
from weightwire.identity.identity import Identity
from weightwire.loaders.announced import Announced
from weightwire.loaders.filling import Filling, LocalShard
from weightwire.loaders.ladder import disk_read, step_down
from weightwire.loaders.member import Member
from weightwire.loaders.published import Published
from weightwire.loaders.relay import PublicationRelay
from weightwire.loaders.tensors import NamedTensors, take_tensors
from weightwire.manifest.catalogue import Catalogue, ConstructionNames, catalogue
from weightwire.metadata.decision import DEFAULT_VOTE_S, DecisionStore, Group, TorchDecisions
from weightwire.observability.progress import Progress, silent
from weightwire.source.publication import Publication
from weightwire.target.discover import give_up
from weightwire.target.offer import Want
from weightwire.target.receiver import Receiver
from weightwire.target.report import LoadReport
from weightwire.types import Coordinates

log = logging.getLogger(__name__)


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
    shard = _shard(module, identity, coordinates, group, names, classes, progress)
    with _offering(shard, identity, ordinal, settings, url) as (member, publication, described):
        return shard.publish(member, publication, described, received.manifest if received else None)


@contextmanager
def filling(  # noqa: PLR0913  (as publish)
    module: nn.Module,
    identity: Identity,
    *,
    url: str | None = None,
    coordinates: Coordinates | None = None,
    group: Group | None = None,
    names: ConstructionNames | None = None,
    classes: Mapping[str, str] | None = None,
    ordinal: int = 0,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Iterator[Filling]:
    """``publish`` for a module that the ``with`` block fills from this program's own disk: others follow it meanwhile.

        with weightwire.filling(module, identity, url=url) as disk:
            for name, tensor in checkpoint:
                module.get_parameter(name).copy_(tensor)
                disk.final([name])
        with disk.published:
            ...serve...

    From the beginning of the block on, others find the module, and ``relay`` and ``receive`` take what is final of it.
    At its end the module is published. Where the block raises, all is withdrawn, and followers get an error.

    The block must fill the tensors in place. Where they cannot be followed (they are a device's, or no transport serves
    them), others wait until all of it is published at the end.

    Args:
        module: materialised; what its tensors hold does not matter.
        identity: as for ``publish``.
        url: as for ``publish``.
        coordinates: as for ``publish``.
        group: the ranks, for several ranks; all of them call ``filling``, and all publish or all raise.
        names: as for ``publish``.
        classes: as for ``publish``.
        ordinal: as for ``publish``.
        settings: as for ``publish``.
        progress: as for ``publish``; ``read checkpoint`` tells how much is final.

    Raises:
        WeightwireError: as ``publish``.
        PublishError: at the end of the block: a tensor was written after it was final, which is named, or was replaced.
            Nothing is published then, and who followed gets an error.
    """
    shard = _shard(module, identity, coordinates, group, names, classes, progress)
    with (
        _offering(shard, identity, ordinal, settings, url) as (member, publication, described),
        shard.filling(member, publication, described) as disk,
    ):
        yield disk


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


def receive_tensors(  # noqa: PLR0913  (as publish)
    identity: Identity,
    *,
    max_nbytes: int,
    url: str | None = None,
    coordinates: Coordinates | None = None,
    group: Group | None = None,
    weights_id: str = "",
    latest: bool = False,
    has_fallback: bool = False,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> NamedTensors:
    """``receive`` without a module: the tensors that a peer publishes, by name, in host memory that is made for them.

    Args:
        identity: of what is wanted; as the source published it.
        max_nbytes: nothing is allocated where this rank is offered more.
        url: as for ``receive``.
        coordinates: as for ``receive``.
        group: as for ``receive``.
        weights_id: as for ``receive``.
        latest: as for ``receive``.
        has_fallback: as for ``receive``.
        settings: as for ``receive``.
        progress: as for ``receive``.

    Raises:
        WeightwireError: as ``receive``.
        MismatchError: more is offered than ``max_nbytes``, or something that is no tensor: declared state, build facts.
        LoadError: there is no memory for it.
    """
    if isinstance(max_nbytes, bool) or not isinstance(max_nbytes, int) or max_nbytes < 1:
        raise ConfigError(f"max_nbytes is {max_nbytes!r}", "give a number of bytes")
    where, ranks_ = _alone(identity, coordinates, group)
    member = _member(settings, url, ranks_, serves=False)
    want = _want([identity], where, member.settings)
    want = replace(want, pinned=weights_id, latest=latest, has_disk=has_fallback)
    with member:
        receiver = Receiver(reader=member.reader, want=want, group=ranks_.at("receive"), progress=progress)
        _note_unavailable(receiver)
        return take_tensors(receiver, max_nbytes)


def relay(  # noqa: PLR0913  (as publish)
    module: nn.Module,
    identity: Identity | Sequence[Identity],
    *,
    disk: Callable[[Filling], None] | None = None,
    url: str | None = None,
    coordinates: Coordinates | None = None,
    group: Group | None = None,
    names: ConstructionNames | None = None,
    classes: Mapping[str, str] | None = None,
    weights_id: str = "",
    latest: bool = False,
    has_fallback: bool = False,
    ordinal: int = 0,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Published:
    """``receive`` and ``publish`` in one: what arrives is passed on to others at once, and offered when all is there.

    Replicas that start together this way take little more than one shard from their source. As for ``publish``, the
    module must not change its weights until it is paused or withdrawn; ``received`` tells how it was filled.

    With ``disk`` they need no source: each is announced before it asks, so that of those that start together the first
    reads its disk and the others follow it. Where no peer delivers, ``disk`` is called to fill the module, as the block
    of ``filling`` does, unless the settings say that a miss is an error.

    Args:
        module: as for ``receive``.
        identity: as for ``receive``; what ``disk`` reads is of the first.
        disk: fills the module from this program's own disk, and says what is final of it: ``disk(filling)`` calls
            ``filling.final(names)``.
        url: as for ``receive``.
        coordinates: as for ``receive``.
        group: as for ``receive``.
        names: as for ``receive``.
        classes: as for ``receive``.
        weights_id: as for ``receive``.
        latest: as for ``receive``.
        has_fallback: as for ``receive``; with ``disk`` there always is one.
        ordinal: of what ``disk`` reads; see ``publish``.
        settings: as for ``receive``.
        progress: as for ``receive``.

    Raises:
        WeightwireError: as ``receive``, and as ``publish``; with ``disk``, as ``filling``. Nothing is offered then.
        LoadError: no peer delivered, and ``disk`` may not be called (``on_miss``).
        Exception: whatever ``disk`` raised; nothing is offered then.
    """
    wanted = [identity] if isinstance(identity, Identity) else list(identity)
    shard = _shard(module, wanted[0], coordinates, group, names, classes, progress)
    member = _member(settings, url, shard.group, serves=True)
    want = _want(wanted, shard.coordinates, member.settings)
    want = replace(want, pinned=weights_id, latest=latest, has_disk=has_fallback or disk is not None)
    try:
        announced = shard.announced(member, want.stages, ordinal)
        if disk is not None:  # before it asks: of those that start together the first one reads
            claim = announced.anew(want.identity.stage).claim
            want = replace(want, replica_incarnation=claim.replica_incarnation)
        return _relayed(shard, member, want, announced, disk)
    except BaseException:
        member.close()
        raise


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


def _shard(
    module: nn.Module,
    identity: Identity,
    coordinates: Coordinates | None,
    group: Group | None,
    names: ConstructionNames | None,
    classes: Mapping[str, str] | None,
    progress: Progress,
) -> LocalShard:
    where, ranks_ = _alone(identity, coordinates, group)
    return LocalShard(
        module=module,
        describe=lambda: catalogue(module, names, classes=classes),
        coordinates=where,
        group=ranks_,
        progress=progress,
    )


@contextmanager
def _offering(
    shard: LocalShard, identity: Identity, ordinal: int, settings: Settings | None, url: str | None
) -> Iterator[tuple[Member, Publication, Catalogue]]:
    """What the block is going to publish, announced; nothing of it stays where the block raises."""
    try:
        described = shard.describe()
        member = Member(_settings(settings, url))
    except WeightwireError as error:
        shard.group.refuse(f"publish/{identity.stage.value}", error.problem)
        raise
    try:
        announced = shard.announced(member, {identity.stage: identity}, ordinal)
        yield member, announced.anew(identity.stage), described
    except BaseException:
        member.close()
        raise


def _relayed(
    shard: LocalShard,
    member: Member,
    want: Want,
    announced: Announced,
    disk: Callable[[Filling], None] | None,
) -> Published:
    """The shard as it was received and passed on, or as ``disk`` filled it."""

    def again() -> None:
        if disk is not None:  # it will be read: others may wait for that
            announced.anew(want.identity.stage)

    passing_on = PublicationRelay(lambda offer: announced.of(offer.choice.stage), again)
    receiver = Receiver(
        reader=member.reader, want=want, group=shard.group.at("receive"), progress=shard.progress, relay=passing_on
    )
    try:
        described = _fill(receiver, shard.describe)
    except FenceTimeout:  # a peer may still write into this memory
        raise
    except WeightwireError as error:
        if disk is None:
            raise
        step_down(receiver.report, error, member.settings.on_miss)
        return _read(shard, member, announced.of(want.identity.stage), receiver.report, disk)
    publication = announced.publication
    assert publication is not None
    if publication.over and not passing_on.broken:  # derived tensors came from another peer after all
        publication = announced.anew(publication.claim.identity.stage)
        publication.learn(receiver.header.build_facts, receiver.header.ordinal)
    return shard.publish(member, publication, described, receiver.manifest, receiver.report)


def _read(
    shard: LocalShard,
    member: Member,
    publication: Publication,
    report: LoadReport,
    disk: Callable[[Filling], None],
) -> Published:
    """The shard as ``disk`` fills it; ``report`` is of the load that found no peer, and goes on."""
    began = time.monotonic()
    with shard.filling(member, publication, shard.describe()) as filling:
        disk(filling)
        disk_read(report, "", time.monotonic() - began, missed=True)
    published = filling.published
    published.received = report
    report.content_id, report.weights_id = published.report.content_id, published.report.weights_id
    return published


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
    _note_unavailable(receiver)
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


def _note_unavailable(receiver: Receiver) -> None:
    unavailable = receiver.reader.unavailable.items()
    receiver.report.warnings += [f"{name} is not available: {why}" for name, why in unavailable]


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
