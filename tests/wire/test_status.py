from __future__ import annotations

import inspect

import grpc
import pytest

from weightwire import errors
from weightwire.errors import AuthError, WeightwireError
from weightwire.wire import status
from weightwire.wire.status import KINDS, Callee, from_status, to_status

ALL = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, WeightwireError)]


def test_every_error_of_ours_has_a_code_of_its_own() -> None:
    assert set(KINDS.values()) == set(ALL)
    assert len(set(KINDS.values())) == len(KINDS)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_it_was_raised(kind: type[WeightwireError]) -> None:
    code, details, trailing = to_status(kind("the problem", "the remedy"))
    found = from_status(code, details, trailing, Callee.PEER, "host:1")
    assert type(found) is kind
    if kind is not AuthError:  # which says nothing to a stranger
        assert (found.problem, found.remedy) == ("the problem", "the remedy")


@pytest.mark.parametrize("callee", Callee)
@pytest.mark.parametrize("code", [*grpc.StatusCode, None])
def test_every_status_of_grpc_is_one_of_ours(code: grpc.StatusCode | None, callee: Callee) -> None:
    found = from_status(code, "details", (), callee, "host:1")
    family = errors.MetadataError if callee is Callee.METADATA else errors.TransferError
    assert isinstance(found, (family, AuthError, errors.ProtocolError))
    assert "host:1" in str(found)


def test_silence_is_named_by_who_was_silent() -> None:
    gone, slow = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED
    kinds = {
        (code, callee): type(from_status(code, "", (), callee, "h:1")) for code in (gone, slow) for callee in Callee
    }
    assert kinds == {
        (gone, Callee.METADATA): errors.MetadataUnreachable,
        (slow, Callee.METADATA): errors.MetadataUnreachable,
        (gone, Callee.PEER): errors.PeerLost,
        (slow, Callee.PEER): errors.PeerStalled,
    }


def test_what_a_peer_says_cannot_forge_lines_or_flood_the_log() -> None:
    trailing = ((status.KIND_KEY, "metadata"), (status.PROBLEM_KEY, b"a\nERROR fake\x1b[2J" + b"x" * 10_000))
    found = from_status(grpc.StatusCode.ABORTED, "", trailing, Callee.METADATA, "h:1")
    assert type(found) is errors.MetadataError
    assert str(found).isprintable()
    assert len(str(found)) <= status.MAX_TEXT
    unknown = from_status(grpc.StatusCode.ABORTED, "x\ny", ((status.KIND_KEY, "no-such"),), Callee.PEER, "h:1")
    assert isinstance(unknown, errors.PeerLost)
    assert str(unknown).isprintable()


def test_subclasses_travel_as_the_nearest_known_kind() -> None:
    class Special(errors.PeerLost):
        pass

    assert type(from_status(*to_status(Special("p", "r")), Callee.PEER, "h:1")) is errors.PeerLost
