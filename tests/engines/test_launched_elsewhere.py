"""Ranks that torchrun starts, without our launcher: they serve until SIGTERM, and tell Prometheus about it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from weightwire.config import Settings
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.rank import Rank
from weightwire.errors import ConfigError
from weightwire.metadata.server.app import EmbeddedServer
from weightwire.runtime import TpCoordinates, TpGroup

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def loaded(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        assert event["event"] != "failed", line
        if event["event"] == "loaded":
            return event
    raise AssertionError("a rank ended before it had loaded")


def test_torchrun_starts_a_source_that_serves_until_it_is_told_to_end(
    checkpoints: dict[str, Path], server: EmbeddedServer, secret_file: Path
) -> None:
    options = ReplicaOptions(
        model=str(checkpoints["small"]),
        model_id="torchrun",
        revision="r1",
        tp=2,
        load_format="presharded",
        metrics_port=0,
        until_signal=True,
    )
    env = os.environ | {
        "WEIGHTWIRE_URL": server.url,
        "WEIGHTWIRE_SECRET_FILE": str(secret_file),
        "WEIGHTWIRE_TRANSPORTS": "tcp",
        "OMP_NUM_THREADS": "1",
    }
    command = [*TORCHRUN, str(free_port()), "-m", "weightwire.engines.native.rank", options.to_json()]
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        ranks = [loaded(process), loaded(process)]
        assert process.poll() is None
        assert len({rank["metrics"] for rank in ranks}) == 2
        for rank in ranks:
            assert rank["published"]["published"]
            with urllib.request.urlopen(f"http://{rank['metrics']}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            assert 'weightwire_state{state="READY"} 1.0' in text
            assert 'weightwire_loads_total{outcome="disk"} 1.0' in text
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def test_another_number_of_ranks_than_the_options_name_is_refused(checkpoints: dict[str, Path]) -> None:
    """Else one torchrun with too many of them would cut tensors where stages were asked for."""
    options = ReplicaOptions(model=str(checkpoints["small"]), model_id="torchrun", tp=1, pp=1)
    with pytest.raises(ConfigError, match="2 ranks were started for tp 1 x pp 1; start 1, or change the options"):
        Rank(options, Settings(), TpGroup.offline(TpCoordinates(size=2, rank=0)))
