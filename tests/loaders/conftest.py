from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings

HERE = Path(__file__).parent


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def server(secret_file: Path) -> Iterator[EmbeddedServer]:
    settings = ServerSettings(secret=load_secret(secret_file), times=Times(ttl_s=3.0, warming_s=0.0))
    with EmbeddedServer(settings) as running:
        yield running


@pytest.fixture
def settings(server: EmbeddedServer, secret_file: Path) -> Settings:
    return Settings(
        url=server.url,
        secret_file=secret_file,
        transports=("tcp",),
        stall_timeout=2.0,
        load_timeout=30.0,
        wait_for_loading=10.0,
    )


class Child:
    """A publishing process."""

    def __init__(self, script: str, arguments: list[str], secret_file: Path, transports: str) -> None:
        env = os.environ | {
            "WEIGHTWIRE_SECRET_FILE": str(secret_file),
            "WEIGHTWIRE_TRANSPORTS": transports,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
            "WEIGHTWIRE_STALL_TIMEOUT": "30",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(HERE / script), *arguments]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")

    def finish(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


Publish = Callable[..., Child]


@pytest.fixture
def publish(server: EmbeddedServer, secret_file: Path) -> Iterator[Publish]:
    """Starts processes that publish the Encoder made from a seed, and ends them."""
    with ExitStack() as stack:

        def start(seed: int = 1, revision: str = "r1", transports: str = "tcp") -> Child:
            child = Child("publish_encoder.py", [server.url, str(seed), revision], secret_file, transports)
            stack.callback(child.kill)
            return child

        yield start
