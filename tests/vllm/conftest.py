"""Real vLLM, on a CPU: ``make test-vllm``. Without vLLM nothing here is collected but the test that says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

spec = importlib.util.find_spec("vllm")
# this very directory is found as a package without an origin where vLLM is not installed
collect_ignore_glob = [] if spec is not None and spec.origin else ["test_vllm_*.py"]

if not collect_ignore_glob:
    from vllm_checkpoints import Checkpoints
    from vllm_replicas import Fleet, metadata_server, write_site, zygote

    @pytest.fixture(scope="session")
    def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("vllm")

    @pytest.fixture(scope="session")
    def checkpoints(state: Path) -> Checkpoints:
        return Checkpoints(state / "checkpoints")

    @pytest.fixture(scope="session")
    def forking(state: Path) -> Iterator[Path]:
        with zygote(state) as socket:
            yield socket

    @pytest.fixture(scope="session")
    def url(state: Path) -> Iterator[str]:
        with metadata_server(state) as url:
            yield url

    @pytest.fixture(scope="session")
    def site(state: Path) -> Path:
        return write_site(state / "site")

    @pytest.fixture(scope="session")
    def sources(state: Path, url: str, forking: Path, site: Path) -> Iterator[Fleet]:
        """Replicas that cases share."""
        fleet = Fleet(state=state, url=url, zygote=forking, site=site)
        try:
            yield fleet
        finally:
            fleet.kill()

    @pytest.fixture
    def fleet(state: Path, url: str, forking: Path, site: Path) -> Iterator[Fleet]:
        """Replicas of one case."""
        fleet = Fleet(state=state, url=url, zygote=forking, site=site)
        try:
            yield fleet
        finally:
            fleet.kill()
