"""The one place that turns our errors into gRPC statuses and gRPC's into our errors.

An error of ours travels as a stable code in the trailing metadata, so that the other side raises the same class; the
gRPC status code beside it is for proxies and tools. What carries no code of ours is translated by status code and by
what was called (``Callee``).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import grpc

from weightwire import errors
from weightwire.errors import WeightwireError

KIND_KEY = "weightwire-error"
PROBLEM_KEY = "weightwire-problem-bin"
REMEDY_KEY = "weightwire-remedy-bin"
MAX_TEXT = 1024
UNAUTHENTICATED = "unauthenticated"
"""The whole of what a stranger is told, whatever was wrong."""

Trailing = tuple[tuple[str, str | bytes], ...]


class Callee(enum.Enum):
    """Who was called, which decides what silence means."""

    METADATA = "metadata server"
    PEER = "peer"


KINDS: dict[str, type[WeightwireError]] = {
    "error": errors.WeightwireError,
    "config": errors.ConfigError,
    "auth": errors.AuthError,
    "publish": errors.PublishError,
    "catalogue": errors.CatalogueError,
    "mismatch": errors.MismatchError,
    "identity-mismatch": errors.IdentityMismatch,
    "manifest-mismatch": errors.ManifestMismatch,
    "weights-conflict": errors.WeightsConflict,
    "no-source": errors.NoSourceError,
    "transfer": errors.TransferError,
    "peer-lost": errors.PeerLost,
    "peer-stalled": errors.PeerStalled,
    "source-busy": errors.SourceBusy,
    "not-yet": errors.NotYet,
    "digest-mismatch": errors.DigestMismatch,
    "generation-moved": errors.GenerationMoved,
    "protocol": errors.ProtocolError,
    "fence-timeout": errors.FenceTimeout,
    "metadata": errors.MetadataError,
    "metadata-unreachable": errors.MetadataUnreachable,
    "decision": errors.DecisionError,
    "rank-lost": errors.RankLost,
    "checkpoint": errors.CheckpointError,
    "load": errors.LoadError,
}
"""Codes are part of the protocol: never reused, never renamed."""

_CODES = {kind: code for code, kind in KINDS.items()}

_STATUS: tuple[tuple[type[WeightwireError], grpc.StatusCode], ...] = (
    (errors.ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.AuthError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.NoSourceError, grpc.StatusCode.NOT_FOUND),
    (errors.PeerLost, grpc.StatusCode.UNAVAILABLE),
    (errors.PeerStalled, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.SourceBusy, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DigestMismatch, grpc.StatusCode.DATA_LOSS),
    (errors.MetadataUnreachable, grpc.StatusCode.UNAVAILABLE),
    (errors.WeightwireError, grpc.StatusCode.FAILED_PRECONDITION),
)
"""The first class that fits."""

_LOST = {Callee.METADATA: errors.MetadataUnreachable, Callee.PEER: errors.PeerLost}
_SLOW = {Callee.METADATA: errors.MetadataUnreachable, Callee.PEER: errors.PeerStalled}
_REFUSED = {Callee.METADATA: errors.MetadataError, Callee.PEER: errors.TransferError}

_GONE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED})
_DENIED = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})
_FOREIGN = frozenset(
    {
        grpc.StatusCode.OK,  # an ending without what had to come
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.DATA_LOSS,
    }
)


def to_status(error: WeightwireError) -> tuple[grpc.StatusCode, str, Trailing]:
    """Status code, details and trailing metadata of one of our errors."""
    code = next(status for kind, status in _STATUS if isinstance(error, kind))
    if isinstance(error, errors.AuthError):
        return code, UNAUTHENTICATED, ()
    kind = next(_CODES[base] for base in type(error).__mro__ if base in _CODES)
    problem, remedy = error.problem[:MAX_TEXT], error.remedy[:MAX_TEXT]
    return code, kind, ((KIND_KEY, kind), (PROBLEM_KEY, problem.encode()), (REMEDY_KEY, remedy.encode()))


def from_status(
    code: grpc.StatusCode | None,
    details: str,
    trailing: Iterable[tuple[str, str | bytes]],
    callee: Callee,
    target: str,
) -> WeightwireError:
    """Our error for a call that failed.

    Args:
        code: gRPC status; None counts as UNKNOWN.
        details: what gRPC or the other side says; untrusted, shortened to one line.
        trailing: trailing metadata of the call.
        callee: who was called.
        target: ``host:port``, for the message.
    """
    found = dict(trailing)
    kind = KINDS.get(_line(found.get(KIND_KEY, b"")))
    if kind is not None:
        return kind(_line(found.get(PROBLEM_KEY, b"")) or "no reason given", _line(found.get(REMEDY_KEY, b"")))
    return _from_code(code or grpc.StatusCode.UNKNOWN, _line(details), callee, target)


def from_call(error: grpc.RpcError, callee: Callee, target: str) -> WeightwireError:
    """The same, from what the synchronous client raises."""
    call: Any = error  # what a call raises is the call itself
    return from_status(call.code(), call.details() or "", call.trailing_metadata() or (), callee, target)


def stalled(callee: Callee, target: str) -> WeightwireError:
    """Our error for a callee that stays silent."""
    who = f"the {callee.value} at {target}"
    return _SLOW[callee](f"{who} did not answer in time", "check its load and the network, or allow more time")


def _from_code(code: grpc.StatusCode, details: str, callee: Callee, target: str) -> WeightwireError:
    who = f"the {callee.value} at {target}"
    if code in _DENIED:
        return errors.AuthError(f"{who} refused our credentials", "give both sides the same secret file")
    if code in _GONE:
        return _LOST[callee](f"{who} cannot be reached ({details})", "check that it runs, its address and the network")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return stalled(callee, target)
    if code in _FOREIGN:
        return errors.ProtocolError(
            f"{who} answered outside the protocol ({code.name}: {details})",
            "check that weightwire listens there, in the same version",
        )
    return _REFUSED[callee](f"{who} refused: {code.name} ({details})", "see its log")


def _line(value: str | bytes) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return "".join(sign if sign.isprintable() else " " for sign in text[:MAX_TEXT]).strip()
