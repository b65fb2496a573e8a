from __future__ import annotations

import contextlib
import dataclasses
import enum
import types
import typing
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_samples import record

from weightwire.errors import ProtocolError
from weightwire.types import Coordinates
from weightwire.wire import bounds, messages, requests
from weightwire.wire.codec import decode, encode
from weightwire.wire.generated import metadata_pb2 as pb
from weightwire.wire.methods import AUTH, METADATA, PEER

PROTO_OF = {
    messages.FindReplicas: METADATA["FindReplicas"].request,
    messages.FindShard: METADATA["FindShard"].request,
    messages.OpenRead: PEER["OpenRead"].request,
    requests.SourcesRequest: METADATA["Sources"].request,
    requests.DecideRequest: METADATA["Decide"].request,
    requests.ShardRequest: PEER["Status"].request,
    requests.ProgressRequest: PEER["Progress"].request,
    requests.CloseReadRequest: PEER["CloseRead"].request,
    requests.SelfCheckRequest: PEER["SelfCheck"].request,
    requests.SelfCheckResponse: PEER["SelfCheck"].response,
    messages.PeerStatus: PEER["Status"].response,
    messages.ProgressUpdate: PEER["Progress"].response,
}
STREAMED = {messages.ManifestHeader, messages.ReadGrant, messages.LeafRange}
"""By ``manifest_codec``, or only inside another."""

MESSAGES = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type)
    and dataclasses.is_dataclass(kind)
    and kind.__module__ == messages.__name__
    and kind not in STREAMED
] + [kind for kind in PROTO_OF if kind.__module__ == requests.__name__]


def proto(kind: type) -> Any:
    return PROTO_OF.get(kind) or getattr(pb, kind.__name__)


COORDINATES = st.tuples(st.integers(0, 4), st.integers(1, 5)).map(
    lambda pair: Coordinates(tp_rank=pair[0] % pair[1], tp_size=pair[1])
)
PRINTABLE = st.characters(exclude_categories=("C", "Zl", "Zp", "Zs"), include_characters=" ")


def values(name: str, hint: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(hint) is tuple:
        inner = values(name, typing.get_args(hint)[0])
        return st.lists(inner, max_size=min(3, bounds.COUNTS[name])).map(tuple)
    if isinstance(hint, types.UnionType):
        return st.none() | values(name, typing.get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        return COORDINATES if hint is Coordinates else instances(typing.cast("type", hint))
    if issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    scalars: dict[type, st.SearchStrategy[Any]] = {
        str: st.text(PRINTABLE, max_size=20),
        float: st.floats(0, 1),
        int: st.integers(0, 2**31 - 1),
        bool: st.booleans(),
        bytes: st.binary(max_size=30),
    }
    return scalars[hint]


def instances(kind: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: values(f.name, hints[f.name]) for f in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_sent_is_what_arrives(kind: type, data: st.DataObject) -> None:
    value = data.draw(instances(kind))
    raw = encode(value, proto(kind)).SerializeToString()
    assert decode(kind, proto(kind).FromString(raw)) == value


@given(raw=st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_protocol_error(raw: bytes) -> None:
    message = pb.PublicationRecord()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        return
    with contextlib.suppress(ProtocolError):
        decode(messages.PublicationRecord, message)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"shard_key": "k" * 257}, "shard_key"),
        ({"model_id": "two\nlines"}, "model_id"),
        ({"host": "\x1b[2J"}, "host"),
        ({"identity": "i" * (64 * 1024 + 1)}, "identity"),
        ({"endpoints": ("a:1",) * 17}, "endpoints"),
        ({"fraction": 1.5}, "fraction"),
        ({"fraction": float("nan")}, "fraction"),
        ({"nbytes": 2**63}, "nbytes"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    message = encode(record(**changes), pb.PublicationRecord)
    with pytest.raises(ProtocolError, match=names):
        decode(messages.PublicationRecord, message)


def test_unknown_enum_values_and_contradicting_coordinates_are_refused() -> None:
    message = encode(record(), pb.PublicationRecord)
    message.coordinates.tp_rank = 9
    with pytest.raises(ProtocolError, match="tp_rank 9"):
        decode(messages.PublicationRecord, message)
    message = encode(record(), pb.PublicationRecord)
    message.state = 99  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match="PublicationState"):
        decode(messages.PublicationRecord, message)


def test_numbers_that_do_not_fit_are_refused_when_sent() -> None:
    with pytest.raises(ProtocolError, match="PublicationRecord"):
        encode(record(world_size=-1), pb.PublicationRecord)


def test_our_messages_and_those_of_the_proto_files_have_the_same_fields() -> None:
    for method in (*AUTH.values(), *METADATA.values(), *PEER.values()):
        assert method.path.startswith("/weightwire.v1.")
    for kind in MESSAGES:
        names = {field.name for field in dataclasses.fields(kind)}
        assert names == {field.name for field in proto(kind).DESCRIPTOR.fields}, kind


def test_the_largest_answers_fit_into_one_message() -> None:
    full = record(
        **{name: "x" * limit for name, limit in bounds.TEXTS.items() if isinstance(getattr(record(), name, None), str)}
    )
    full = dataclasses.replace(full, endpoints=("e" * 300,) * 16, identity="")
    candidate = messages.Candidate(record=full, reason="r" * 1024)
    rejection = messages.Rejection(subject="s" * 512, reason="r" * 1024)
    listing = messages.ShardListing(candidates=(candidate,) * 64, rejected=(rejection,) * 128)
    assert encode(listing, pb.ShardListing).ByteSize() < bounds.MAX_MESSAGE_BYTES
    text = "x" * 256
    offer = messages.ReplicaOffer(
        replica_key=text, replica_incarnation=text, stage=full.stage, revision=text, ordinal=1, world_size=1,
        nbytes=1, suspect=True, reports=1, active_reads=1,
    )  # fmt: skip
    group = messages.WeightsGroup(
        replica_key=text, stage=full.stage, weights_id=text, ordinal=1, revisions=(text,) * 64, replicas=(offer,) * 64
    )
    other = messages.OtherReplica(
        replica_key=text, family_key=text, replica_incarnation=text, stage=full.stage, role=full.role,
        state=full.state, revision=text, world_size=1, ranks=1, identity="i" * 64 * 1024,
    )  # fmt: skip
    replicas = messages.ReplicaListing(groups=(group,) * 30, others=(other,) * 16, rejected=(rejection,) * 128)
    assert encode(replicas, pb.ReplicaListing).ByteSize() < bounds.MAX_MESSAGE_BYTES


def test_the_endpoint_bound_is_the_transports() -> None:
    from weightwire.transport import base

    assert bounds.MAX_ENDPOINT_BYTES == base.MAX_ENDPOINT_BYTES
