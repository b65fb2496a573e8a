"""Every RPC of ours as data, read from the proto descriptors: one table for clients, servers and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from weightwire.wire.generated import auth_pb2, metadata_pb2, peer_pb2


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC.

    Attributes:
        path: ``/weightwire.v1.Service/Name``.
        request: generated class of the request.
        response: generated class of the response.
        client_streams: requests come as a stream.
        server_streams: responses come as a stream.
    """

    path: str
    request: Any
    response: Any
    client_streams: bool
    server_streams: bool


def _methods(service: ServiceDescriptor) -> dict[str, Method]:
    return {
        method.name: Method(
            f"/{service.full_name}/{method.name}",
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
            method.client_streaming,
            method.server_streaming,
        )
        for method in service.methods
    }


AUTH_SERVICE = "weightwire.v1.Auth"
METADATA_SERVICE = "weightwire.v1.Metadata"
PEER_SERVICE = "weightwire.v1.Peer"

AUTH = _methods(auth_pb2.DESCRIPTOR.services_by_name["Auth"])
METADATA = _methods(metadata_pb2.DESCRIPTOR.services_by_name["Metadata"])
PEER = _methods(peer_pb2.DESCRIPTOR.services_by_name["Peer"])
