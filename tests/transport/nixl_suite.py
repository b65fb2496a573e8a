"""The conformance suite over nixl. Not collected by itself: ``test_nixl`` runs it in a process of its own, once for
each UCX transport, because a process that made an agent keeps its libraries and their exit handlers.
"""

from __future__ import annotations

import os

import pytest
from transport import nixl_backends
from transport.conformance import Backend, Conformance
from transport.peers import Bytes, SourceProcess

from weightwire.transport.base import Registration, Transport
from weightwire.transport.nixl import NixlTransport

OVER_TCP = os.environ.get("UCX_TLS") == "tcp"


class TestNixl(Conformance):
    @pytest.fixture
    def backend(self) -> Backend:
        return Backend(
            make=nixl_backends.nixl,
            child="transport.nixl_backends:nixl",
            stranger=nixl_backends.nixl_stranger,
            gate_sees_reads=NixlTransport.GATE_SEES_READS,
            frozen_source_stalls=OVER_TCP,
            connect_s=8.0,
        )

    def test_h32_a_fenced_source_that_goes_on_later_writes_nothing(
        self, backend: Backend, remote: tuple[SourceProcess, Transport, Registration, list[Bytes]]
    ) -> None:
        if OVER_TCP:
            pytest.skip("UCX ends such a source when it goes on: nixl_hazards_tcp has a test of its own")
        super().test_h32_a_fenced_source_that_goes_on_later_writes_nothing(backend, remote)
