"""Small models of the native runtime on a device: quantized layers, experts and latent heads, at both stages.

A source loads a checkpoint from the disk onto its device and publishes what was loaded (its transforms then copy what
they change, so that readers keep the raw bytes) or what its transforms made; a target has the configuration alone, and
memory that is full of 0x7F.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from runtime_families import PROMPTS, write_family  # noqa: E402
from runtime_models import write_checkpoint  # noqa: E402
from runtime_quantized import BLOCK_DIMS, DIMS, FAMILY_FORMS, FORMS, quantized, quantized_family  # noqa: E402

import weightwire  # noqa: E402
from weightwire.config import OnMiss, Settings  # noqa: E402
from weightwire.engines.native.identity import native_identities  # noqa: E402
from weightwire.identity.identity import Identity  # noqa: E402
from weightwire.loaders.live import LiveCheckpointLoader  # noqa: E402
from weightwire.loaders.member import Member  # noqa: E402
from weightwire.loaders.module import Published  # noqa: E402
from weightwire.manifest.catalogue import ConstructionNames, capture  # noqa: E402
from weightwire.runtime import DecoderForCausalLM, KernelLayout, TpGroup, generate, prompt_logits, read_config  # noqa: E402
from weightwire.runtime import Mapping as RankMapping  # noqa: E402
from weightwire.runtime.checkpoint.safetensors_loader import SafetensorsLoader  # noqa: E402
from weightwire.runtime.load_format import LoadFormat  # noqa: E402
from weightwire.runtime.model_loader import LoaderSettings, ModelLoader, NoHooks  # noqa: E402
from weightwire.target.offer import Want  # noqa: E402
from weightwire.target.receiver import Receiver  # noqa: E402
from weightwire.types import Coordinates, Stage  # noqa: E402

CASES = (
    *(f"llama {form}" for forms in FORMS.values() for form in forms),
    *(f"{family} {form}" for family, forms in FAMILY_FORMS.items() for form in forms),
    *("qwen3", "qwen3_moe", "deepseek_v3", "gemma2"),
)
LAYOUT = KernelLayout.PACKED
GARBAGE_BYTES = 1 << 28


def written(folder: Path, case: str) -> Path:
    """The checkpoint of ``case``, and beside it, as ``-bare``, its configuration alone."""
    family, _, form = case.partition(" ")
    where = folder / case.replace(" ", "-")
    if family == "llama":
        dims = BLOCK_DIMS if form == "fp8_block" else DIMS
        quantized(write_checkpoint(folder / f"{form}-float", dims), where, form)
    elif form:
        where = quantized_family(folder, family, form)
    else:
        write_family(where, family)
    bare = where.with_name(f"{where.name}-bare")
    bare.mkdir()
    shutil.copy(where / "config.json", bare)
    return where


def identities(directory: Path, case: str) -> dict[Stage, Identity]:
    return native_identities(
        directory,
        read_config(directory),
        model_id=f"bench/{case}",
        revision="1",
        dtype="float32",
        kernel_layout=LAYOUT,
        mapping=RankMapping.for_tp(0, 1),
    )


@dataclass
class Hooks(NoHooks):
    """Publishes ``stage`` as an engine does; nothing where there is no ``publish``."""

    stage: Stage
    publish: Callable[[nn.Module, ConstructionNames], Published] | None = None
    names: ConstructionNames | None = None
    published: Published | None = None

    def constructed(self, model: nn.Module) -> None:
        self.names = capture(model)

    def loaded(self, model: nn.Module) -> None:
        if self.stage is Stage.LOADED:
            self._publish(model)

    def guard_transform(self, module: nn.Module) -> AbstractContextManager[None]:
        return self.published.transforms().guard(module) if self.published else nullcontext()

    def post_loaded(self, model: nn.Module) -> None:
        if self.stage is Stage.PROCESSED:
            self._publish(model)

    def _publish(self, model: nn.Module) -> None:
        if self.publish is not None:
            assert self.names is not None
            self.published = self.publish(model, self.names)


def said(model: DecoderForCausalLM) -> dict[str, Any]:
    """What it answers, and a digest of its logits' bytes: equal weights in equal kernels give equal ones."""
    logits = prompt_logits(model, PROMPTS).float().cpu()
    found = hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
    tokens = generate(model, PROMPTS, max_new_tokens=8)
    return {"tokens": tokens, "logits": found, "finite": bool(logits.isfinite().all())}


def serve(
    directory: Path, case: str, stage: Stage, device: str, settings: Settings
) -> tuple[Published, dict[str, Any]]:
    """Load from the disk and publish; what the model then says."""
    who = identities(directory, case)[stage]
    hooks = Hooks(stage, lambda model, names: weightwire.publish(model, who, names=names, settings=settings))
    model = _load(directory, LoadFormat.AUTO, device, SafetensorsLoader(), hooks)
    assert hooks.published is not None
    report = hooks.published.report
    return hooks.published, said(model) | {"content_id": report.content_id, "held": report.nbytes}


def take(directory: Path, case: str, stage: Stage, device: str, settings: Settings) -> dict[str, Any]:
    """Load from the source; what the model then says."""
    torch.full((GARBAGE_BYTES,), 0x7F, dtype=torch.uint8, device=device)  # given back, and given out again
    want = Want(stages={stage: identities(directory, case)[stage]}, coordinates=Coordinates())
    hooks = Hooks(stage)
    with Member(settings, serves=False) as member:

        def receiver(_: object) -> Receiver:
            group = weightwire.ranks(torch.distributed.HashStore(), 0, 1)
            return Receiver(reader=member.reader, want=want, group=group.at("receive"))

        def names() -> ConstructionNames:
            assert hooks.names is not None
            return hooks.names

        live = LiveCheckpointLoader(disk=SafetensorsLoader(), receive=receiver, on_miss=OnMiss.FAIL, names=names)
        model = _load(directory, LoadFormat.PRESHARDED, device, live, hooks)
    report = live.report
    return said(model) | {"content_id": report.content_id, "paths": report.paths, "seconds": report.seconds}


def _load(directory: Path, form: LoadFormat, device: str, loader: Any, hooks: Hooks) -> DecoderForCausalLM:
    settings = LoaderSettings(load_format=form, dtype=torch.float32, kernel_layout=LAYOUT, device=torch.device(device))
    return ModelLoader(TpGroup.single(), settings, loader, hooks).load(directory).model
