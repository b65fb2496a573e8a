"""Sleep and reload, without an engine: vLLM's CPU worker calls no sleep backend, so what it would call is called here.

Only the inner backend, which frees memory on a GPU, is a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
from vllm_replicas import Place

from weightwire.config import Settings
from weightwire.engines.vllm import ranks
from weightwire.engines.vllm.options import Options
from weightwire.engines.vllm.serving import Loaded, Serving
from weightwire.engines.vllm.sleep import PublishingSleepBackend
from weightwire.identity.identity import module_identity
from weightwire.manifest.catalogue import capture, catalogue
from weightwire.metadata.decision import Group
from weightwire.source.described import Claim
from weightwire.source.publication import Publication
from weightwire.source.publish import publish_shard
from weightwire.types import Coordinates, Role, Stage
from weightwire.wire.messages import PublicationState

IDENTITY = module_identity("sleep/tiny", "Linear", "float32", revision="r1")


class Inner(SleepModeBackend):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Notes what was published when it was called."""

    def __init__(self, publication: Publication) -> None:
        super().__init__()
        self.publication = publication
        self.states: list[PublicationState] = []

    def suspend(self, level: int = 1) -> None:
        assert level in (1, 2)
        self.states.append(self.publication.state)

    def resume(self, tags: list[str] | None = None) -> None:
        assert tags is None or tags
        self.states.append(self.publication.state)


@pytest.fixture
def serving() -> Iterator[Serving]:
    serving = Serving()
    yield serving
    serving.close()


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(64, 64)


@pytest.fixture
def publication(serving: Serving, model: nn.Module, place: Place) -> Publication:
    settings = Settings(url=place.url, secret_file=place.state / "secret", transports=("tcp",))
    claim = Claim(identity=IDENTITY, coordinates=Coordinates(), world_size=1, replica_incarnation="a" * 32)
    made = serving.member(settings).node.announce(claim)
    publish_shard(made, catalogue(model), Group.solo())
    serving.hold(Role.TARGET, made)
    return made


def test_asleep_it_is_paused_and_awake_it_is_offered_again(serving: Serving, publication: Publication) -> None:
    inner = Inner(publication)
    backend = PublishingSleepBackend(inner, serving)
    backend.suspend(1)
    backend.suspend(1)
    backend.resume(["kv_cache"])
    assert publication.offered is None
    backend.resume()
    assert inner.states == [PublicationState.PAUSED] * 4
    assert publication.state is PublicationState.READY
    assert publication.offered is not None


@torch.no_grad()
def test_what_came_back_otherwise_is_withdrawn(serving: Serving, publication: Publication, model: nn.Module) -> None:
    backend = PublishingSleepBackend(Inner(publication), serving)
    backend.suspend(1)
    next(model.parameters()).add_(1)
    backend.resume()
    assert publication.over, "found by the scrub, perhaps, but not at once"


def test_weights_that_sleep_drops_are_withdrawn_first(serving: Serving, publication: Publication) -> None:
    inner = Inner(publication)
    backend = PublishingSleepBackend(inner, serving)
    backend.suspend(2)
    assert publication.over
    backend.resume()
    assert serving.publication(Role.TARGET) is None


def test_after_a_reload_nobody_knows_which_weights_these_are(
    serving: Serving, publication: Publication, model: nn.Module
) -> None:
    serving.loaded[Role.TARGET] = Loaded(
        options=Options(),
        place=ranks.Place(Coordinates(), 0, 1, 0),
        identities={Stage.LOADED: IDENTITY},
        names=capture(model),
        raw=catalogue(model).layout,
        state={},
        weights_id="b" * 64,
    )
    serving.changing()
    assert publication.over
    assert serving.loaded[Role.TARGET].weights_id == ""
