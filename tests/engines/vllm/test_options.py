from __future__ import annotations

from typing import Any

import pytest

from weightwire.config import OnMiss
from weightwire.engines.vllm.options import Options
from weightwire.errors import ConfigError
from weightwire.types import Stage


def test_everything_at_its_default() -> None:
    options = Options.from_extra({})
    assert (options.fallback_load_format, options.quiet_s, options.poison) == ("auto", 30.0, False)


def test_settings_are_parsed_as_the_environment_is() -> None:
    extra = {"url": "10.0.0.5:8471", "stages": ["PROCESSED", "LOADED"], "on_miss": "fail", "require_rdma": True}
    settings = Options.from_extra(extra).settings
    assert settings.url == "10.0.0.5:8471"
    assert settings.stages == (Stage.PROCESSED, Stage.LOADED)
    assert settings.on_miss is OnMiss.FAIL
    assert settings.require_rdma


def test_caps_as_text_or_number() -> None:
    settings = Options.from_extra({"max_rate": "200MB/s", "max_readers": 8}).settings
    assert (settings.max_rate, settings.max_readers) == (2e8, 8)
    assert Options.from_extra({"max_rate": 200_000_000}).settings.max_rate == 2e8


def test_own_keys() -> None:
    extra = {"model_id": "org/m", "revision": "r1", "ordinal": 3, "quiet_s": 5, "poison": True, "latest": True}
    options = Options.from_extra(extra)
    assert (options.model_id, options.revision, options.ordinal) == ("org/m", "r1", 3)
    assert (options.quiet_s, options.poison, options.latest) == (5.0, True, True)


@pytest.mark.parametrize("key", ["secret", "auth_token", "PASSWORD", "api_key"])
def test_a_secret_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options.from_extra({key: "hunter2"})
    assert "WEIGHTWIRE_SECRET_FILE" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_secrets_file_may_be_named() -> None:
    assert str(Options.from_extra({"secret_file": "/run/secrets/ww"}).settings.secret_file) == "/run/secrets/ww"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"ulr": "h:1"}, "did you mean url?"),
        ({"url": "no port"}, "url cannot be"),
        ({"ordinal": "3"}, "ordinal cannot be '3'"),
        ({"ordinal": True}, "ordinal cannot be True"),
        ({"poison": 1}, "poison cannot be 1"),
        ({"quiet_s": -1}, "quiet_s cannot be -1"),
        ({"quiet_s": float("nan")}, "quiet_s cannot be nan"),
        ({"vote_s": 1e9}, "vote_s cannot be"),
        ({"on_miss": "maybe"}, "on_miss cannot be 'maybe'"),
        ({"fallback_load_format": "presharded"}, "cannot be presharded itself"),
        ({"model_id": 7}, "model_id cannot be 7"),
        ("url=h:1", "no JSON object"),
    ],
)
def test_what_is_wrong_is_named(extra: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Options.from_extra(extra)
    assert said in str(caught.value)
