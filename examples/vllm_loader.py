"""vLLM takes its weights from a running vLLM: load format ``presharded``, on weightwire's public interface alone.

Importing this module registers the format, in every process that imports it:

    import vllm, vllm_loader
    llm = vllm.LLM(
        model_dir,  # configuration and tokenizer are enough where a replica is running
        load_format="presharded",
        model_loader_extra_config={"model_id": "org/model", "revision": "r1", "url": "host:port"},
    )

``model_id`` and ``revision`` say which weights; every other key is a field of ``weightwire.Settings``. For
``vllm serve``, name this module in an entry point of group ``vllm.general_plugins``. Try it with ``vllm_demo.py``.

Only ``load_weights`` is overridden: the raw bytes move, and each replica runs vLLM's own post-load steps on them. What
those steps *replace* stays alive for readers (on the CPU that is nearly the whole model a second time, since linear
weights are packed into oneDNN handles). Not covered: steps that change a published tensor *in place*, expert
parallelism, sleep mode and ``reload_weights``. Drafts are read from the disk.
"""

from __future__ import annotations

import atexit
import dataclasses
import itertools
from typing import Any

import vllm
from torch import nn
from torch.distributed import TCPStore
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import BaseModelLoader, DefaultModelLoader, register_model_loader
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.utils.network_utils import get_ip

import weightwire
from weightwire.errors import FenceTimeout

logger = init_logger(f"vllm.{__name__}")

CLASSES = {
    "*.kv_cache": "runtime",  # empty now, bound to the cache later
    "*.cos_sin_cache": "derived",  # rotary tables, made by construction
    "*._[kv]_scale_cpu": "derived",  # host copies of scales, still at their defaults before the post-load steps
}
"""Of what vLLM's modules hold and do not declare themselves. An attribute missing here is refused, by name."""

_serving: list[weightwire.Published] = []
_store: list[TCPStore] = []
_attempts = itertools.count()


@register_model_loader("presharded")
class PreshardedLoader(BaseModelLoader):
    """From a running replica if there is one, else as vLLM would; then a source for others itself."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        extra = dict(load_config.model_loader_extra_config)
        self.model_id: str | None = extra.pop("model_id", None)
        self.revision: str | None = extra.pop("revision", None)
        self.settings = weightwire.Settings.from_env(**extra)
        self.disk = DefaultModelLoader(
            dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
        )

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: where a peer serves the weights, no file is wanted."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill ``model`` and publish it, raw, before vLLM processes it."""
        tp, pp, world = get_tp_group(), get_pp_group(), get_world_group()
        if model_config.runner_type == "draft" or world.world_size != tp.world_size * pp.world_size:
            logger.warning("presharded does not serve drafts or expert parallelism: reading the disk")
            self.disk.load_weights(model, model_config)
            return
        withdraw()  # what an earlier load in this process published is about to change
        how: dict[str, Any] = {
            "coordinates": weightwire.Coordinates(
                tp_rank=tp.rank_in_group, tp_size=tp.world_size, pp_rank=pp.rank_in_group, pp_size=pp.world_size
            ),
            "group": ranks(),
            "names": weightwire.capture(model),
            "classes": CLASSES,
            "settings": self.settings,
        }
        identity = self.identity(model, model_config, tp.world_size, pp.world_size)
        if not (self.settings.role in ("auto", "target") and self.receive(model, identity, how)):
            self.disk.load_weights(model, model_config)
        if self.settings.role in ("auto", "source"):
            self.publish(model, identity, how)

    def identity(self, model: nn.Module, model_config: ModelConfig, tp_size: int, pp_size: int) -> weightwire.Identity:
        """What another replica must agree on. Raw layouts of vLLM's methods are undeclared, so the device is in it."""
        revision = model_config.revision
        return weightwire.module_identity(
            self.model_id or model_config.model,
            architecture=type(model).__name__,
            dtype=str(model_config.dtype).removeprefix("torch."),
            config=get_hf_file_to_dict("config.json", model_config.model, revision or "main"),
            revision=self.revision or revision,
            engine="vllm",
            engine_version=vllm.__version__,
            quantization=model_config.quantization,
            layout_id=f"device={current_platform.device_type} {current_platform.get_device_capability() or ''}".strip(),
            tp_size=tp_size,
            pp_size=pp_size,
        )

    def receive(self, model: nn.Module, identity: weightwire.Identity, how: dict[str, Any]) -> bool:
        """Whether every rank now holds a peer's weights; where one does not, no rank does."""
        try:
            report = weightwire.receive(model, identity, **how)
        except FenceTimeout:
            raise  # a peer may still write into this memory: nothing may be loaded there
        except weightwire.WeightwireError as error:
            if self.settings.on_miss == "fail":
                raise
            logger.warning("weightwire: no peer, reading the disk: %s", error)
            return False
        seconds = ", ".join(f"{name} {value:.3f}" for name, value in report.seconds.items())
        via = "+".join(report.paths)
        logger.info("weightwire: received %d bytes over %s (seconds: %s)", report.nbytes, via, seconds)
        logger.info("weightwire: content id %s of weights id %s", report.content_id, report.weights_id)
        for warning in report.warnings:
            logger.warning("weightwire: %s", warning)
        return True

    def publish(self, model: nn.Module, identity: weightwire.Identity, how: dict[str, Any]) -> None:
        """Offer the raw bytes. A failure is reported and not made up for later: the bytes would be others."""
        try:
            published = weightwire.publish(model, identity, **how)
        except weightwire.WeightwireError as error:
            logger.error("weightwire: not published: %s", error)  # noqa: TRY400  (one line is the contract)
            return
        _serving.append(published)
        report = published.report
        seconds = ", ".join(f"{name} {value:.3f}" for name, value in report.seconds.items())
        logger.info("weightwire: published %d bytes over %s (seconds: %s)", report.nbytes, report.transports, seconds)
        logger.info("weightwire: content id %s of weights id %s", report.content_id, report.weights_id)


def ranks() -> Any:
    """This worker among its replica's, on a store of their own; ``None`` where it is alone."""
    world, attempt = get_world_group(), next(_attempts)
    if world.world_size == 1:
        return None
    if not _store:
        if world.rank_in_group == 0:
            _store.append(TCPStore(get_ip(), 0, is_master=True, wait_for_workers=False))
        address = world.broadcast_object((get_ip(), _store[0].port) if _store else None)
        if not _store:
            _store.append(TCPStore(*address))
    return weightwire.ranks(_store[0], world.rank_in_group, world.world_size, epoch=str(attempt))


@atexit.register
def withdraw() -> None:
    """Stop serving. A process that is killed instead loses its leases with its connection."""
    while _serving:
        _serving.pop().withdraw()
