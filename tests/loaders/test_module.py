from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

import pytest
import torch
from vision import Encoder, identity

import weightwire
from weightwire.config import Settings
from weightwire.errors import (
    AuthError,
    ConfigError,
    ManifestMismatch,
    MetadataUnreachable,
    NoSourceError,
    WeightsConflict,
)
from weightwire.metadata.decision import MemoryDecisions


class ChildProcess(Protocol):
    def line(self) -> list[str]: ...
    def finish(self) -> int: ...
    def kill(self) -> None: ...


class Publish(Protocol):
    def __call__(self, seed: int = ..., revision: str = ..., transports: str = ...) -> ChildProcess: ...


def poisoned(width: int = 8) -> Encoder:
    module = Encoder(width, seed=99)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)
    return module


def assert_same(left: Encoder, right: Encoder) -> None:
    for (name, a), (_, b) in zip(left.state_dict().items(), right.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    image = torch.ones(2, 3, 5, 5)
    assert torch.equal(left.eval()(image), right.eval()(image))


def test_a_module_is_received_from_another_process(publish: Publish, settings: Settings) -> None:
    source = publish(seed=1)
    ready, content_id, weights_id = source.line()
    assert ready == "ready"
    module = poisoned()
    report = weightwire.receive(module, identity(), settings=settings)
    assert_same(module, Encoder(8, seed=1))
    assert report.verified
    assert (report.content_id, report.weights_id) == (content_id, weights_id)
    assert report.paths == ["tcp"]
    assert report.nbytes == sum(share.nbytes for share in report.shares) > 4_000_000
    assert source.finish() == 0


def test_h03_the_view_is_still_a_view_afterwards(publish: Publish, settings: Settings) -> None:
    publish().line()
    module = poisoned()
    weightwire.receive(module, identity(), settings=settings)
    assert module.window.data_ptr() == module.big.weight.data_ptr()
    assert module.tied.weight is module.head.weight


def test_nobody_serves_it(settings: Settings) -> None:
    with pytest.raises(NoSourceError, match="nobody serves this model"):
        weightwire.receive(poisoned(), identity(), settings=settings)


def test_h57_another_revision_is_not_taken(publish: Publish, settings: Settings) -> None:
    publish(revision="r1").line()
    with pytest.raises(NoSourceError, match="not revision r2"):
        weightwire.receive(poisoned(), identity("r2"), settings=settings)


def test_h57_an_unnamed_revision_is_taken_only_on_demand(publish: Publish, settings: Settings) -> None:
    publish(revision="r1").line()
    with pytest.raises(NoSourceError, match="names no revision"):
        weightwire.receive(poisoned(), identity(None), settings=settings)
    report = weightwire.receive(poisoned(), identity(None), settings=replace(settings, accept_unpinned=True))
    assert report.unpinned
    assert any("UNPINNED" in line for line in report.warnings)


def test_h57_two_sets_of_weights_under_one_identity_are_a_conflict(publish: Publish, settings: Settings) -> None:
    publish(seed=1).line()
    _, _, weights_id = publish(seed=2).line()
    with pytest.raises(WeightsConflict, match=weights_id[:12]):
        weightwire.receive(poisoned(), identity(), settings=settings)
    module = poisoned()
    weightwire.receive(module, identity(), settings=settings, weights_id=weights_id)
    assert_same(module, Encoder(8, seed=2))


def test_h19_another_shape_is_refused_before_the_first_byte(publish: Publish, settings: Settings) -> None:
    publish().line()
    module = poisoned(width=9)
    with pytest.raises(ManifestMismatch, match=r"conv\.weight has shape"):
        weightwire.receive(module, identity(), settings=settings)
    assert all(torch.isnan(parameter).all() for parameter in module.parameters())


def test_h33_an_unreachable_server_is_one_bounded_error(settings: Settings) -> None:
    with pytest.raises(MetadataUnreachable, match=r"127\.0\.0\.1:9"):
        weightwire.receive(poisoned(), identity(), settings=replace(settings, url="127.0.0.1:9"))


def test_h49_without_the_secret_nothing_is_told(publish: Publish, settings: Settings) -> None:
    publish().line()
    assert settings.secret_file is not None
    other = settings.secret_file.with_name("other")
    other.write_text("f" * 32)
    other.chmod(0o600)
    with pytest.raises(AuthError) as caught:
        weightwire.receive(poisoned(), identity(), settings=replace(settings, secret_file=other))
    assert "tests/encoder" not in str(caught.value)


def test_what_was_received_is_published_without_digesting_it_again(publish: Publish, settings: Settings) -> None:
    _, content_id, weights_id = publish().line()
    module = poisoned()
    report = weightwire.receive(module, identity(), settings=settings)
    with weightwire.publish(module, identity(), settings=settings, received=report) as published:
        assert (published.report.content_id, published.report.weights_id) == (content_id, weights_id)
    assert "manifest" not in report.to_json()


def test_a_rank_that_cannot_start_does_not_keep_the_others_waiting(settings: Settings) -> None:
    decisions = MemoryDecisions()
    alone = replace(settings, url=None, wait_for_loading=60.0)
    where = [weightwire.Coordinates(tp_rank=rank, tp_size=2) for rank in range(2)]
    wanted = identity(tp_size=2)
    with pytest.raises(ConfigError):
        weightwire.receive(
            poisoned(), wanted, settings=alone, coordinates=where[0], group=weightwire.ranks(decisions, 0, 2)
        )
    began = time.monotonic()
    with pytest.raises(ConfigError, match="no metadata server is named"):
        weightwire.receive(
            poisoned(), wanted, settings=settings, coordinates=where[1], group=weightwire.ranks(decisions, 1, 2)
        )
    assert time.monotonic() - began < 20
