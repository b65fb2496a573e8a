"""A short soak (``bench/soak.py``): random loads while processes are killed, frozen, cut off, capped and corrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "bench" / "soak.py"
SEED = 3156
"""Of its first eight loads, every kind of strike comes early."""


@pytest.mark.timeout(280)
def test_random_loads_end_verified_or_in_a_typed_error() -> None:
    command = [sys.executable, str(SOAK), "--seed", str(SEED), "--loads", "8", "--transports", "tcp", "--verbose"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "8 loads in" in done.stdout
    assert done.stdout.count(": verified ") >= 3, done.stdout
    assert "in mid-load" in done.stdout
