"""For all tests: how long an example takes is no matter for hypothesis, which the vLLM environment does not have; and
Ctrl-C reaches what they start, also where the tests themselves were started in the background by a shell without job
control, which makes its children ignore it (and so would theirs)."""

from __future__ import annotations

import contextlib
import signal

with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("unhurried", deadline=None)
    settings.load_profile("unhurried")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler is the default action again in what is started
