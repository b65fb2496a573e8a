"""vLLM's load format ``presharded``: a model loader that takes weights from a running replica, else as vLLM would."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.utils import weights_already_processed

from weightwire.engines.vllm.options import Options
from weightwire.errors import CheckpointError, ConfigError, LoadError, RankLost, WeightwireError

if TYPE_CHECKING:
    from weightwire.engines.vllm.load import Load
    from weightwire.engines.vllm.serving import Serving

log = logging.getLogger("vllm.weightwire.loader")


class PreshardedLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """From a running replica if there is one, else with vLLM's own loader; then a source for others.

    Args:
        load_config: with ``model_loader_extra_config`` as ``Options`` describes it.

    Raises:
        ConfigError: the extra config is wrong; one line says how.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        try:
            self.options = Options.from_extra(load_config.model_loader_extra_config)
        except ConfigError as error:
            log.error("weightwire: %s", error)  # noqa: TRY400  (as in ``load_model``)
            raise
        self._load: Load | None = None
        self._loading = False

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: where a peer serves the weights, no file is wanted."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Find before construction, fill after it, publish around vLLM's post-load steps.

        Raises:
            WeightwireError: this replica cannot load; the log's last ``weightwire:`` line says why.
        """
        from weightwire.engines.vllm import fallback  # noqa: PLC0415  (see ``_serving``)

        registered = fallback.layers(vllm_config)
        self._loading = True
        try:
            self._load = self._begin(vllm_config, model_config)
            if self._load is not None:
                self._load.find()
            model = self._built(vllm_config, model_config, prefix)
            if model is None:  # processed bytes did not come: the shell is given up, and built again from the disk
                if self._load is not None:
                    self._load.forget()
                fallback.forget(vllm_config, registered)
                model = self._built(vllm_config, model_config, prefix)
                assert model is not None
        except WeightwireError as error:
            log.error("weightwire: %s", error)  # noqa: TRY400  (one line is the root cause; vLLM adds its tracebacks)
            raise
        finally:
            self._load, self._loading = None, False
        return model

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """As vLLM does, and note what it made."""
        model: nn.Module = super().create_model(vllm_config, model_config, prefix)
        if self._load is not None:
            self._load.constructed(model)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill ``model``. Outside of ``load_model`` (a reload in place) always from the disk, withdrawn before.

        Raises:
            LoadError: neither a peer nor the disk has the weights.
            FenceTimeout: a peer may still write into this memory: nothing may be loaded there.
        """
        if not self._loading:
            _serving().changing()
        if self._load is None:
            self._read(model, model_config, None)
        elif not self._load.processed and not self._load.fill(model):
            self._read(model, model_config, self._load)
        if self._load is not None:
            self._guard.enter_context(self._load.publish_raw(model))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """What ``reload_weights`` reads: it changes published bytes, so they are withdrawn first."""
        _serving().changing()
        log.warning("weightwire: weights are reloaded from the disk: this replica no longer serves them")
        reading: Any = getattr(self._fallback(), "get_all_weights", None)
        if reading is None:
            raise ConfigError(f"{self.options.fallback_load_format} cannot reload", "use fallback_load_format auto")
        yield from reading(model_config, model)

    def _built(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> nn.Module | None:
        """The model with its weights; ``None`` where processed bytes were found and then did not come."""
        load = self._load
        with contextlib.ExitStack() as self._guard:
            processed = load is not None and load.processed
            if processed:
                self._guard.enter_context(weights_already_processed())
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        if load is None:
            return model
        if processed and not load.fill(model):
            return None
        load.finish(model)
        return model

    def _begin(self, vllm_config: VllmConfig, model_config: ModelConfig) -> Load | None:
        """The load, unless weightwire has no part in it."""
        from weightwire.config import OnMiss, ReplicaRole  # noqa: PLC0415  (see ``_serving``)
        from weightwire.engines.vllm.load import Load  # noqa: PLC0415

        settings = self.options.settings
        if settings.role is ReplicaRole.OFF:
            return None
        self._fallback()  # a wrong name is better known now than when it is needed
        try:
            if settings.url is None:
                raise ConfigError("no metadata server is named", 'give "url" in the extra config or WEIGHTWIRE_URL')
            return Load.begin(self.options, vllm_config, model_config, _serving())
        except WeightwireError as error:
            if settings.on_miss is OnMiss.FAIL or isinstance(error, RankLost):
                raise
            log.warning("weightwire: no peer, reading the disk: %s", error)
            return None

    def _fallback(self) -> BaseModelLoader:
        from weightwire.engines.vllm import fallback  # noqa: PLC0415  (see ``_serving``)

        return fallback.make(self.load_config, self.options.fallback_load_format)

    def _read(self, model: nn.Module, model_config: ModelConfig, load: Load | None) -> None:
        from weightwire.engines.vllm import fallback  # noqa: PLC0415  (see ``_serving``)

        nbytes = fallback.download_size(model_config, self.load_config)
        if nbytes:
            log.warning("weightwire: up to %.1f MB of %s are downloaded", nbytes / 1e6, model_config.model)
        try:
            fallback.load(self._fallback(), model, model_config, load.offering.progress if load else None)
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            kind = LoadError if load is not None and load.pulls else CheckpointError
            raise kind(
                f"vLLM's loader cannot read the weights ({reason})", "give weight files, or start a source"
            ) from error


def _serving() -> Serving:
    """This process's; imported late, since gRPC must not be in a process that still forks its workers."""
    from weightwire.engines.vllm.serving import process_serving  # noqa: PLC0415

    return process_serving()
