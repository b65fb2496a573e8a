"""``bench/stage_cost.py`` on one row with two ranks: what copy-on-transform holds is what changed, to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "stage_cost.py"
ROW = {"family": "llama", "quantization": "unquantized", "parallel": "tp", "kernel-layout": "packed", "stage": "LOADED"}


@pytest.mark.timeout(300)
def test_copy_on_transform_holds_what_changed_on_every_rank() -> None:
    chosen = [f"--{name}={value}" for name, value in ROW.items()]
    command = [sys.executable, str(BENCH), *chosen, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)
    assert found["ranks"] == 2
    assert found["bounded"]
    assert 0 < found["clone"] <= found["module"] < found["held"] == found["changed"] < found["own"]
