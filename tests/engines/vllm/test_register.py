"""The entry point where vLLM is not installed."""

from __future__ import annotations

import subprocess
import sys

QUIET = """
import sys, threading
sys.modules["vllm"] = None  # as where it is not installed
from weightwire.engines.vllm import register
register()
register()
assert threading.active_count() == 1
assert "grpc" not in sys.modules
"""


def test_without_vllm_nothing_is_registered_and_nothing_said() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
