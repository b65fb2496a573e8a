"""One rank's part of a module: announced, published, and filled from the program's own disk while others follow it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from weightwire.errors import PublishError, WeightwireError
from weightwire.identity.identity import Identity
from weightwire.loaders.announced import Announced
from weightwire.loaders.member import Member
from weightwire.loaders.published import Published
from weightwire.loaders.reading import Reading
from weightwire.manifest.catalogue import Catalogue
from weightwire.manifest.records import Manifest
from weightwire.metadata.decision import Group
from weightwire.observability.progress import Progress
from weightwire.source.described import Claim
from weightwire.source.publication import Publication
from weightwire.source.publish import publish_shard
from weightwire.target.report import LoadReport
from weightwire.types import Coordinates, Stage


class Filling:
    """A module that its program is filling from its own disk. For one thread.

    Attributes:
        followed: whether others can take what is final; if not, they wait until all of it is published.
    """

    def __init__(self, publication: Publication, described: Catalogue, progress: Progress) -> None:
        self._publication = publication
        self._progress = progress
        self._published: Published | None = None
        entries = described.layout.entries
        self._homes = {name: entry.name for entry in entries for name in (entry.name, *entry.aliases)}
        self._left = {entry.name: entry.nbytes for entry in entries}
        self._total = described.layout.nbytes
        self._reading = Reading.begin(publication, lambda: described)
        self.followed = self._reading is not None

    @property
    def published(self) -> Published:
        """What the module is published as, from the end of the ``with`` block on.

        Raises:
            PublishError: the block has not ended, or raised.
        """
        if self._published is None:
            raise PublishError("nothing is published while it is being filled", "ask after the with block")
        return self._published

    def final(self, names: Collection[str]) -> None:
        """These tensors hold what they are to hold: nothing writes them again. Returns at once.

        What is never named is final at the end of the block. A later write that torch does not count (through
        ``.data``, NumPy or a pointer) is found by readers' digests and by the scrub, not at the end of the block.

        Args:
            names: of parameters and buffers, at construction; of a tied tensor any of its names, after the last of them
                was written. Names that are not the module's do nothing, nor do views and derived tensors.
        """
        given = (names,) if isinstance(names, str) else names
        for name in given:
            self._left.pop(self._homes.get(name, ""), None)
        done = self._total - sum(self._left.values())
        self._publication.progress(done, self._total)  # others wait for as long as this moves
        self._progress("read checkpoint", done, self._total, "bytes")
        if self._reading is not None:
            self._reading.final(given)

    def finish(self, loaded: Catalogue) -> Manifest | None:
        """For ``LocalShard``: what was offered while it was filled; ``None`` where nothing was."""
        return self._reading.finish(loaded) if self._reading is not None else None

    def publish(self, published: Published) -> None:
        """For ``LocalShard``: this came of it."""
        self._published = published

    def abandon(self) -> None:
        """For ``LocalShard``: nothing comes of it. Readers are cut off before anything else is done. Idempotent."""
        self._publication.withdraw(0.0)
        if self._reading is not None:
            self._reading.abandon()


@dataclass(frozen=True, kw_only=True)
class LocalShard:
    """What all verbs need to know of this rank's part of a module.

    Attributes:
        module: the module.
        describe: its catalogue now.
        coordinates: this rank's.
        group: the ranks that decide together.
        progress: see ``observability.progress``.
    """

    module: nn.Module
    describe: Callable[[], Catalogue]
    coordinates: Coordinates
    group: Group
    progress: Progress

    def announced(self, member: Member, stages: Mapping[Stage, Identity], ordinal: int) -> Announced:
        """Announces this shard, of any of ``stages``, as one life of one replica."""
        life = str(self.group.once("replica", uuid.uuid4().hex))

        def announce(stage: Stage) -> Publication:
            claim = Claim(
                identity=stages[stage],
                coordinates=self.coordinates,
                world_size=self.group.size,
                replica_incarnation=life,
                ordinal=ordinal,
            )
            return member.node.announce(claim)

        return Announced(announce)

    def publish(
        self,
        member: Member,
        publication: Publication,
        described: Catalogue,
        manifest: Manifest | None = None,
        received: LoadReport | None = None,
    ) -> Published:
        """See ``publish_shard``."""
        report = publish_shard(publication, described, self.group, manifest=manifest, progress=self.progress)
        return Published(member, publication, report, self.module, received)

    @contextmanager
    def filling(self, member: Member, publication: Publication, described: Catalogue) -> Iterator[Filling]:
        """The block fills the module; then it is published, or nothing is, and the other ranks hear of it."""
        disk = Filling(publication, described, self.progress)
        try:
            yield disk
            loaded = self.describe()
            manifest = disk.finish(loaded)
        except BaseException as error:
            disk.abandon()
            reason = error.problem if isinstance(error, WeightwireError) else type(error).__name__
            self.group.refuse(f"publish/{publication.claim.identity.stage.value}", reason)
            raise
        disk.publish(self.publish(member, publication, loaded, manifest))
