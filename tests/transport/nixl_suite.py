"""The conformance suite over nixl. Not collected by itself: ``test_nixl`` runs it in a process of its own, once for
each UCX transport, because a process that made an agent is marked for life.
"""

from __future__ import annotations

import os

import pytest
from transport import nixl_backends
from transport.conformance import Backend, Conformance

from weightwire.transport.nixl import NixlTransport


class TestNixl(Conformance):
    @pytest.fixture
    def backend(self) -> Backend:
        return Backend(
            make=nixl_backends.nixl,
            child="transport.nixl_backends:nixl",
            stranger=nixl_backends.nixl_stranger,
            gate_sees_reads=NixlTransport.GATE_SEES_READS,
            frozen_source_stalls=os.environ.get("UCX_TLS") == "tcp",
            connect_s=3.0,
        )
