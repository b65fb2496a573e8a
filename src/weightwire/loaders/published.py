"""A module that others can load from."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from torch import nn

from weightwire.loaders.member import Member
from weightwire.source.publication import Publication
from weightwire.source.publish import PublishReport
from weightwire.source.snapshot import Snapshot
from weightwire.target.report import LoadReport


class Published:
    """A module that others can load from, until the ``with`` block ends or ``withdraw`` is called.

    Attributes:
        report: what was published.
        received: how the module got its weights, where ``relay`` filled it or had it filled.
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
