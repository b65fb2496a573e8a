"""Every error that weightwire raises, in one tree.

    WeightwireError
    ├── ConfigError            a setting, argument or environment variable is wrong (also a ValueError)
    ├── AuthError              the shared secret is missing or does not match
    ├── PublishError           this process cannot become a source
    │   └── CatalogueError     a module holds something that cannot be described exactly
    ├── MismatchError          source and target do not describe the same thing; found before the first byte
    │   ├── IdentityMismatch
    │   ├── ManifestMismatch
    │   └── WeightsConflict    several weights ids under one identity, none pinned
    ├── NoSourceError          nobody serves what was asked for
    ├── TransferError          a peer did not deliver
    │   ├── PeerLost           connection broken, process gone
    │   ├── PeerStalled        no progress within the bound
    │   ├── SourceBusy         a source serves as many readers as it takes; nothing is wrong with it
    │   ├── NotYet             a relay does not have these bytes yet; nothing is wrong with it
    │   ├── DigestMismatch     bytes arrived that are not what the manifest says
    │   ├── GenerationMoved    the source withdrew or changed what it had published
    │   ├── ProtocolError      a peer sent something out of its bounds
    │   └── FenceTimeout       a peer could not be stopped from writing; its memory is condemned
    ├── MetadataError          the metadata server said no
    │   └── MetadataUnreachable
    ├── DecisionError          the ranks of a replica did not decide together
    │   └── RankLost           a rank never posted anything
    ├── CheckpointError        a checkpoint on disk is missing, corrupt or incomplete
    └── LoadError              every step of the fallback ladder failed; carries the steps

Messages are one line: what is wrong, then what to do. ``remedy`` is the part after the semicolon.
"""

from __future__ import annotations


class WeightwireError(Exception):
    """Root of all errors raised on purpose; anything else that escapes is a bug.

    Args:
        problem: what is wrong, naming the thing; one line.
        remedy: what the reader can do about it; one line, may be empty.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)


class ConfigError(WeightwireError, ValueError):
    """A setting, an argument or an environment variable has no legal meaning."""


class AuthError(WeightwireError):
    """The shared secret is missing, unreadable, or is not the one that the other side has."""


class PublishError(WeightwireError):
    """This process cannot become a source; nothing was offered."""


class CatalogueError(PublishError):
    """A module holds a tensor or a state that cannot be described exactly."""


class MismatchError(WeightwireError):
    """Two sides do not describe the same bytes. Raised before the first byte is moved."""


class IdentityMismatch(MismatchError):
    """Two identities differ in a field that decides bytes."""


class ManifestMismatch(MismatchError):
    """Names, dtypes, shapes, element order, ties or declared state differ."""


class WeightsConflict(MismatchError):
    """Several weights ids are ready under one identity and none was pinned."""


class NoSourceError(WeightwireError):
    """No live, complete replica serves what was asked for."""


class TransferError(WeightwireError):
    """A peer did not deliver; another one, or the disk, may."""


class PeerLost(TransferError):
    """The connection to a peer broke, or its process is gone."""


class PeerStalled(TransferError):
    """A peer made no progress within the bound."""


class SourceBusy(TransferError):
    """The source serves as many readers as it takes: no blame, and there may be a place soon."""


class NotYet(TransferError):
    """A relay has not verified these bytes itself yet: no blame, and it may have them soon."""


class DigestMismatch(TransferError):
    """Bytes arrived that are not the bytes of the manifest."""


class GenerationMoved(TransferError):
    """The source withdrew or changed what it had published; no blame."""


class ProtocolError(TransferError):
    """A peer sent something outside the protocol's bounds."""


class FenceTimeout(TransferError):
    """A peer could not be stopped from writing in time; the memory that it may write to is condemned."""


class MetadataError(WeightwireError):
    """The metadata server refused a request."""


class MetadataUnreachable(MetadataError):
    """The metadata server did not answer within the bound."""


class DecisionError(WeightwireError):
    """The ranks of a replica did not come to one decision."""


class RankLost(DecisionError):
    """A rank posted nothing within the bound."""


class CheckpointError(WeightwireError):
    """A checkpoint on disk is missing, corrupt or incomplete."""


class LoadError(WeightwireError):
    """Every step of the fallback ladder failed; the message names the last one, the report has them all."""
