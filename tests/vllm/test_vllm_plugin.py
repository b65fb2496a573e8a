"""What vLLM finds of us by itself."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
from vllm.config.load import LoadConfig
from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader import get_model_loader
from vllm.v1.metrics.loggers import StatLoggerBase

from weightwire.engines.vllm import register
from weightwire.engines.vllm.loader import PreshardedLoader
from weightwire.engines.vllm.readiness import LAUNCH_VARIABLE, LOGGER_VARIABLE
from weightwire.errors import ConfigError


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registering, and importing the logger, marks the launch for its processes; the tests' own is none."""
    for name in (LAUNCH_VARIABLE, LOGGER_VARIABLE):
        monkeypatch.setenv(name, "")


def test_entry_points_lead_to_the_plugin() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="weightwire")
    (logger,) = entry_points(group="vllm.stat_logger_plugins", name="weightwire")
    assert plugin.load() is register
    assert issubclass(logger.load(), StatLoggerBase)


def test_registering_twice_is_registering_once() -> None:
    register()
    backends, engines = dict(SleepModeBackendFactory._registry), dict(WeightTransferEngineFactory._registry)
    loader = type(get_model_loader(LoadConfig(load_format="presharded", model_loader_extra_config={"url": "h:1"})))
    register()
    assert loader is PreshardedLoader
    assert "weightwire" in backends
    assert "weightwire" in engines
    assert dict(SleepModeBackendFactory._registry) == backends
    assert dict(WeightTransferEngineFactory._registry) == engines


def test_a_secret_in_the_extra_config_ends_the_start() -> None:
    """vLLM prints the extra config."""
    register()
    with pytest.raises(ConfigError, match="vLLM prints the extra config") as caught:
        get_model_loader(LoadConfig(load_format="presharded", model_loader_extra_config={"secret": "hunter2"}))
    assert "hunter2" not in str(caught.value)
