"""The name of a model on the Hub and the same command on every replica: only the first one downloads the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download
from vllm_checkpoints import Checkpoints
from vllm_hub import Hub, hub
from vllm_replicas import Fleet, Offline

MODEL = "acme/tiny"


def replica(fleet: Fleet, endpoint: str, home: Path, **extra: Any) -> Offline:
    """The command of every replica; ``home`` is what its host has of the Hub already."""
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    named = {"model_id": None, "revision": None}  # by nothing but the Hub's name
    # a fresh interpreter: the Hub's client reads HF_* when it is imported
    return fleet.offline(Path(MODEL), MODEL, extra=named | extra, env=env, fresh=True).ready()


def revisions(fleet: Fleet, count: int, *watched: Offline) -> list[str]:
    """What ``count`` replicas say that they serve."""
    views = fleet.until(MODEL, count, 20, *watched).values()
    return sorted(one[0].record.revision for one in views)


def downloads(where: Hub) -> tuple[int, int]:
    """Bytes of weight files that were fetched since the last call, and of everything else."""
    asked = where.asked()
    weights = sum(one.nbytes for one in asked if one.of_weights)
    return weights, sum(one.nbytes for one in asked) - weights


@pytest.mark.timeout(300, method="signal", func_only=True)  # by signal: replicas are ended then
def test_only_the_first_replica_downloads(fleet: Fleet, checkpoints: Checkpoints, tmp_path: Path) -> None:
    with hub() as where:
        old = where.push(MODEL, checkpoints.full("llama"))
        first = replica(fleet, where.endpoint, tmp_path / "first")
        said = f"weightwire: up to {old.weights / 1e6:.1f} MB of {MODEL} are downloaded"
        assert first.lines("weightwire: no peer, reading the disk: no source")
        assert first.lines(said), first.tail()
        assert downloads(where)[0] == old.weights
        assert revisions(fleet, 1, first) == [old.sha]
        expected = first.tokens()

        second = replica(fleet, where.endpoint, tmp_path / "second", poison=True)
        assert second.lines("weightwire: received"), second.tail()
        assert not second.lines("are downloaded")
        assert not second.lines("UNPINNED")
        weights = [one for one in where.requests if one.file.endswith(".safetensors")]
        assert not weights, weights
        small = sum(blob.size for name, blob in old.files.items() if name != "model.safetensors")
        assert small <= downloads(where)[1] < small + (64 << 10)  # and a few descriptions
        assert second.tokens() == expected
        assert revisions(fleet, 2, first, second) == [old.sha] * 2
        assert first.stop() == 0

        new = where.push(MODEL, checkpoints.full("llama", seed=1))
        where.hangs_up_on = "blobs"  # which is how the size of a download is asked: to know it is not needed
        third = replica(fleet, where.endpoint, tmp_path / "first")  # whose cache still says that main is the old one
        assert not third.lines("weightwire: received"), third.tail()
        assert downloads(where)[0] == new.weights
        assert third.tokens() != expected
        assert revisions(fleet, 2, second, third) == sorted([old.sha, new.sha])
        assert [second.stop(), third.stop()] == [0, 0]


@pytest.mark.timeout(180, method="signal", func_only=True)
def test_nothing_is_downloaded_twice(fleet: Fleet, checkpoints: Checkpoints, tmp_path: Path) -> None:
    with hub() as where:
        commit = where.push(MODEL, checkpoints.full("llama"))
        snapshot_download(MODEL, endpoint=where.endpoint, cache_dir=tmp_path / "hub")
        assert downloads(where)[0] == commit.weights
        again = replica(fleet, where.endpoint, tmp_path, role="source")
        assert not again.lines("are downloaded")
        assert downloads(where)[0] == 0
        assert commit.sha in revisions(fleet, 1, again)
        assert again.stop() == 0
