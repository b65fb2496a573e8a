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
    """A module that its program is filling from its own disk; ``filling`` and ``relay`` make it. For one thread.

    Attributes:
        followed: whether others can take what is final; if not, they wait until all of it is published.
    """

    def __init__(
        self,
        publication: Publication,
        described: Catalogue,
        reading: Reading | None,
        outcome: list[Published],
        progress: Progress,
    ) -> None:
        entries = described.layout.entries
        self._publication, self._reading, self._outcome, self._progress = publication, reading, outcome, progress
        self._homes = {name: entry.name for entry in entries for name in (entry.name, *entry.aliases)}
        self._left = {entry.name: entry.nbytes for entry in entries}
        self._done, self._total = 0, described.layout.nbytes
        self.followed = reading is not None

    @property
    def published(self) -> Published:
        """What the module is published as, from the end of the ``with`` block on.

        Raises:
            PublishError: the block has not ended, or raised.
        """
        if not self._outcome:
            raise PublishError("nothing is published while it is being filled", "ask after the with block")
        return self._outcome[0]

    def final(self, names: Collection[str]) -> None:
        """These tensors hold what they are to hold: nothing writes them again. Returns at once.

        What is never named is final at the end of the block. A later write that torch does not count (through
        ``.data``, NumPy or a pointer) is found by readers' digests and by the scrub, not at the end of the block.

        Args:
            names: of parameters and buffers, at construction; of a tied tensor any of its names, after the last of them
                was written. Names that are not the module's do nothing, nor do views and derived tensors.
        """
        given = (names,) if isinstance(names, str) else names
        self._done += sum(self._left.pop(self._homes.get(name, ""), 0) for name in given)
        self._publication.progress(self._done, self._total)  # others wait for as long as this moves
        self._progress("read checkpoint", self._done, self._total, "bytes")
        if self._reading is not None:
            self._reading.final(given)


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
        reading, outcome = Reading.begin(publication, lambda: described), list[Published]()
        try:
            yield Filling(publication, described, reading, outcome, self.progress)
            loaded = self.describe()
            manifest = reading.finish(loaded) if reading is not None else None
        except BaseException as error:
            publication.withdraw(0.0)  # readers are cut off before anything else is done
            if reading is not None:
                reading.abandon()
            reason = error.problem if isinstance(error, WeightwireError) else type(error).__name__
            self.group.refuse(f"publish/{publication.claim.identity.stage.value}", reason)
            raise
        outcome.append(self.publish(member, publication, loaded, manifest))
