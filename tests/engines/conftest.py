from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_fleet import BIG, Fleet, write_bf16, zygote
from naive_models import write_all

from weightwire.auth import load_secret
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings

TIMES = Times(ttl_s=3.0, warming_s=0.0)


@pytest.fixture(scope="session")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "secret"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="session")
def server(secret_file: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(ServerSettings(secret=load_secret(secret_file), times=TIMES)) as running:
        yield running


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where ranks are forked."""
    with zygote(tmp_path_factory.mktemp("zygote") / "socket") as path:
        yield path


@pytest.fixture
def fleet(server: EmbeddedServer, secret_file: Path, forks: Path) -> Iterator[Fleet]:
    """Replicas of one test; whatever is left of them is killed."""
    started = Fleet(url=server.url, secret_file=secret_file, zygote=forks)
    yield started
    started.kill()


@pytest.fixture(scope="module")
def crew(server: EmbeddedServer, secret_file: Path, forks: Path) -> Iterator[Fleet]:
    """Replicas that the tests of one module share."""
    started = Fleet(url=server.url, secret_file=secret_file, zygote=forks)
    yield started
    started.kill()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small ones, and big ones: about 39 MB. The other ones have the same shapes, and other numbers."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "small": write_bf16(root / "small", seed=1),
        "other": write_bf16(root / "other", seed=2),
        "big": write_bf16(root / "big", BIG, seed=3),
        "other big": write_bf16(root / "other-big", BIG, seed=4),
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small ones in float32: each family by name, and Llama by the format that it is quantized in."""
    return write_all(tmp_path_factory.mktemp("models"))
