"""For all tests: how long an example takes is no matter for hypothesis, which the vLLM environment does not have."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("unhurried", deadline=None)
    settings.load_profile("unhurried")
