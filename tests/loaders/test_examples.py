"""The examples, run as their docstrings say."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weightwire.metadata.server.app import EmbeddedServer

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")


def environment(secret_file: Path, transports: str) -> dict[str, str]:
    return os.environ | {
        "WEIGHTWIRE_SECRET_FILE": str(secret_file),
        "WEIGHTWIRE_TRANSPORTS": transports,
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def running(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
        assert process.stdout is not None
        process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("transports", ["tcp", pytest.param("nixl", marks=pytest.mark.nixl)])
def test_any_module(server: EmbeddedServer, secret_file: Path, transports: str) -> None:
    env = environment(secret_file, transports)
    command = [sys.executable, str(EXAMPLES / "any_module.py")]
    with running([*command, "publish", server.url], env) as source:
        assert source.stdout is not None
        served = re.search(r"checksum ([\d.]+)", source.stdout.readline())
        done = subprocess.run(
            [*command, "receive", server.url], env=env, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    received = re.search(r"checksum ([\d.]+)", done.stdout)
    assert served is not None
    assert received is not None
    assert received[1] == served[1]
    assert f"over {transports}" in done.stdout
    assert "every byte verified: True" in done.stdout


def test_start_together(server: EmbeddedServer, secret_file: Path, tmp_path: Path) -> None:
    env = environment(secret_file, "tcp")
    command = [sys.executable, str(EXAMPLES / "start_together.py"), server.url, str(tmp_path / "weights.safetensors")]
    with running(command, env) as first:
        assert first.stdout is not None
        said = re.fullmatch(r"weights from: disk, checksum (.*); Enter ends it\n", first.stdout.readline())
        with running(command, env) as second:
            assert second.stdout is not None
            repeated = re.fullmatch(r"weights from: peer, checksum (.*); Enter ends it\n", second.stdout.readline())
    assert said is not None
    assert repeated is not None
    assert repeated[1] == said[1]


def test_two_ranks(server: EmbeddedServer, secret_file: Path) -> None:
    env = environment(secret_file, "tcp")
    script = [str(EXAMPLES / "two_ranks.py")]
    with running([*TORCHRUN, str(free_port()), *script, "publish", server.url], env) as source:
        assert source.stdout is not None
        served: set[tuple[str, str]] = set()
        told = ""
        while len(served) < 2:  # the ranks' lines may run into each other
            told += source.stdout.readline()
            served = set(re.findall(r"rank (\d) serves, sum (-?\d+\.\d{4})", told))
        done = subprocess.run(
            [*TORCHRUN, str(free_port()), *script, "receive", server.url],
            env=env,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"rank (\d) received.*?sum (-?\d+\.\d{4})", done.stdout)) == served
