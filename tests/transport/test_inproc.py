from __future__ import annotations

import pytest
from transport import backends
from transport.conformance import Backend, Conformance


class TestInproc(Conformance):
    @pytest.fixture
    def backend(self) -> Backend:
        return Backend(make=backends.inproc)
