"""Real vLLM, on a CPU: ``make test-vllm``. Without vLLM nothing here is collected but the test that says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

spec = importlib.util.find_spec("vllm")
# this very directory is found as a package without an origin where vLLM is not installed
collect_ignore_glob = [] if spec is not None and spec.origin else ["test_vllm_*.py"]

HERE = Path(__file__).parent
BUSY_S = 600
"""A case takes ten to twenty seconds where nothing else runs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(BUSY_S))


if not collect_ignore_glob:
    from vllm_checkpoints import Checkpoints
    from vllm_processes import metadata_server, zygote
    from vllm_replicas import Fleet, Place, Shared, write_site

    @pytest.fixture(scope="session")
    def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
        return Checkpoints(tmp_path_factory.mktemp("checkpoints"))

    @pytest.fixture(scope="session")
    def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
        """Where replicas run: a metadata server, and the process that forks them."""
        state = tmp_path_factory.mktemp("vllm")
        with zygote(state) as socket, metadata_server(state, "--ttl", "5") as url:
            yield Place(state=state, url=url, zygote=socket, site=write_site(state / "site"))

    @pytest.fixture
    def fleet(place: Place) -> Iterator[Fleet]:
        """Replicas of one case."""
        fleet = Fleet(place)
        try:
            yield fleet
        finally:
            fleet.kill()

    @pytest.fixture(scope="session")
    def shared(place: Place, checkpoints: Checkpoints) -> Iterator[Shared]:
        """Sources that cases share."""
        shared = Shared(Fleet(place), checkpoints)
        try:
            yield shared
        finally:
            shared.fleet.kill()
