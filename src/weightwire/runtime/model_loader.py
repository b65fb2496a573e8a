"""The order in which a model comes to life."""

from __future__ import annotations

import logging
import time
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from weightwire.errors import ConfigError
from weightwire.runtime import post_load
from weightwire.runtime.checkpoint.protocol import (
    CheckpointLoader,
    Final,
    Injected,
    LoadRequest,
    Progress,
    Weights,
)
from weightwire.runtime.config import BuildFacts, KernelLayout, ModelConfig
from weightwire.runtime.distributed import TpGroup
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.embedding import Embedding, LMHead
from weightwire.runtime.load_format import LoadFormat
from weightwire.runtime.mapping import Mapping
from weightwire.runtime.materialize import materialize
from weightwire.runtime.models.decoder import DecoderForCausalLM
from weightwire.runtime.models.registry import construct

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_dtype(value: object) -> torch.dtype:
    """``bfloat16``, ``float16`` or ``float32`` by name, or one of these torch dtypes; ``ConfigError`` otherwise."""
    if isinstance(value, torch.dtype) and value in _DTYPES.values():
        return value
    if isinstance(value, str) and value in _DTYPES:
        return _DTYPES[value]
    raise ConfigError(f"unknown dtype {value!r}", f"use one of: {', '.join(_DTYPES)}")


@dataclass(frozen=True)
class LoaderSettings:
    """How to load. ``dtype`` is that of parameters and computation; checkpoint tensors are converted to it.

    ``ep_size``: in so many groups the experts are shared by the ranks, which cut those of one group among them.
    ``pp_size``: so many stages share the layers; the ranks of each cut tensors among them. ``attention_dp``: these
    share the rows of a batch instead, and the routed experts. ``mtp``: with the layers for multi-token prediction.
    """

    load_format: LoadFormat = LoadFormat.AUTO
    dtype: torch.dtype = torch.bfloat16
    kernel_layout: KernelLayout = KernelLayout.PLAIN
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dummy_seed: int = 0
    ep_size: int = 1
    pp_size: int = 1
    attention_dp: bool = False
    mtp: bool = False


class LoadHooks(Protocol):
    """What a model loader tells whoever watches a model come to life; all called on the loading thread.

    An exception from any of them ends the load.
    """

    def constructed(self, model: nn.Module) -> None:
        """The model stands on meta, with its construction-time names. Tensors are replaced afterwards."""

    def filling(self, model: nn.Module) -> Final | None:
        """A checkpoint is about to be read into the model's memory, which is that of ``loaded``; not where injected.

        What is returned is told of parameters as they become final.
        """

    def loaded(self, model: nn.Module) -> None:
        """All raw bytes are in place and no transform has run. Not called where PROCESSED bytes were injected."""

    def guard_transform(self, module: nn.Module) -> AbstractContextManager[None]:
        """Entered before, and left after, one module's ``transform_weights``."""

    def post_loaded(self, model: nn.Module) -> None:
        """The model can run."""

    def reloading(self, model: nn.Module) -> None:
        """The bytes of a loaded model are about to change; return once nobody reads them."""


class NoHooks:
    """Nobody watches."""

    def constructed(self, model: nn.Module) -> None:
        """Do nothing."""

    def filling(self, model: nn.Module) -> Final | None:
        """Do nothing."""

    def loaded(self, model: nn.Module) -> None:
        """Do nothing."""

    def guard_transform(self, module: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002 - the protocol's
        """Do nothing."""
        return nullcontext()

    def post_loaded(self, model: nn.Module) -> None:
        """Do nothing."""

    def reloading(self, model: nn.Module) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class LoadResult:
    """A model that can run, and how it came about.

    ``injected`` is what the checkpoint loader reported where it put the bytes in place itself, else ``None``.
    ``seconds`` has ``construct``, ``materialize``, ``fill`` and ``post_load`` (hooks included).
    """

    model: DecoderForCausalLM
    config: ModelConfig
    build_facts: BuildFacts
    injected: Injected | None
    seconds: dict[str, float]


class ModelLoader:
    """Loads one rank's part of a model.

    Args:
        group: all ranks of the replica; with the settings it decides how the model is cut.
        settings: how to load.
        checkpoint_loader: where configuration and bytes come from.
        hooks: who is told.
    """

    def __init__(
        self,
        group: TpGroup,
        settings: LoaderSettings,
        checkpoint_loader: CheckpointLoader,
        hooks: LoadHooks | None = None,
    ) -> None:
        self.mapping = Mapping.of_rank(
            group.rank,
            group.size,
            pp_size=settings.pp_size,
            ep_size=settings.ep_size,
            attention_dp=settings.attention_dp,
        )
        self._settings = settings
        self._context = LayerContext.of(group, self.mapping, settings.dtype, settings.kernel_layout)
        self._source = checkpoint_loader
        self._hooks: LoadHooks = hooks or NoHooks()

    def load(self, checkpoint_dir: Path, progress: Progress | None = None) -> LoadResult:
        """Config, build facts, construct on meta, materialise, fill, publish hook, post-load steps; in this order.

        The model returned is complete; anything less raises.

        Raises:
            ConfigError: something asked for cannot be built.
            CheckpointError: the checkpoint is missing, corrupt or incomplete.
            WeightwireError: whatever the checkpoint loader or a hook raises.
        """
        try:
            return self._load(checkpoint_dir, progress)
        finally:
            self._source.cleanup()

    def _load(self, checkpoint_dir: Path, progress: Progress | None) -> LoadResult:
        clock = _Clock()
        config = self._source.load_config(checkpoint_dir)
        config = config.with_mtp() if self._settings.mtp else config
        facts = self._source.build_facts(checkpoint_dir, config)
        model = construct(config, facts, self._context)
        self._hooks.constructed(model)
        clock.lap("construct")
        materialize(model, self._settings.device)
        clock.lap("materialize")
        injected = self._fill(LoadRequest(checkpoint_dir, self.mapping, model, model.config, progress))
        clock.lap("fill")
        if injected is not None and injected.stage == "PROCESSED":
            post_load.adopt_processed(model)
            self._hooks.post_loaded(model)
        else:
            self._finish_raw(model)
        clock.lap("post_load")
        logger.info("rank %d of %d: %s loaded", self.mapping.rank, self.mapping.world_size, config.architecture)
        return LoadResult(model, model.config, facts, injected, clock.seconds)

    def _fill(self, request: LoadRequest) -> Injected | None:
        """Put every byte in place; what was injected, if the loader did it itself."""
        model = request.model
        assert isinstance(model, DecoderForCausalLM)
        if self._settings.load_format is LoadFormat.DUMMY:
            fill_dummy(model, self._settings.dummy_seed)
            return None
        result = self._source.load_weights(request)
        if isinstance(result, Weights):
            model.load_weights(result, request.progress, self._hooks.filling(model))
            return None
        if self._settings.load_format is not LoadFormat.PRESHARDED:
            raise ConfigError("the checkpoint loader injected weights under load format auto", "use presharded")
        return result

    def _finish_raw(self, model: DecoderForCausalLM) -> None:
        # before the first transform: what is published here are the bytes as loaded
        self._hooks.loaded(model)
        post_load.post_load_weights(model, self._hooks.guard_transform)
        self._hooks.post_loaded(model)

    def reload(self, model: DecoderForCausalLM, weights: Weights, progress: Progress | None = None) -> None:
        """Fill a loaded model anew and run the post-load steps again.

        ``weights`` are cut as they themselves say (``weights.presharded``), however the model was loaded at first.
        Parameters that a transform had replaced are replaced once more; the others keep their memory.

        Raises:
            CheckpointError: ``weights`` do not fit; the model is not fit for use afterwards.
        """
        self._hooks.reloading(model)
        post_load.prepare_raw(model)
        model.load_weights(weights, progress)
        self._finish_raw(model)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now


def _fill_random(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Small numbers; of dtypes that torch makes no random numbers in, bytes without the top bits of each half."""
    if parameter.dtype in _DTYPES.values():
        parameter.uniform_(-1e-3, 1e-3, generator=generator)
    else:
        numbers = torch.randint(0, 256, (parameter.nbytes,), generator=generator, dtype=torch.uint8) & 0x33
        parameter.copy_(numbers.view(parameter.dtype).view(parameter.shape))


@torch.no_grad()
def fill_dummy(model: nn.Module, seed: int) -> None:
    """Fill all parameters with small random numbers that depend on ``seed`` and the parameter's name alone.

    Vocabulary padding is zero, as after a real load. Derived tensors stay as they are.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(zlib.crc32(name.encode(), seed & 0xFFFFFFFF))
        _fill_random(parameter, generator)
    for module in model.modules():
        if isinstance(module, Embedding | LMHead):
            module.zero_padding()
