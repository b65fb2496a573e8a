"""Small real models in one process: a source as loaded, receivers as naive ones are, and ours without the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from manifest_support import fill, manifest_of
from runtime_families import PROMPTS, write_family
from runtime_models import write_checkpoint
from runtime_quantized import BLOCK_DIMS, DIMS, LEAVES_OUT, PARTLY, quantized
from safetensors.torch import load_file
from torch import nn

from weightwire.engines.native.identity import native_identities
from weightwire.identity.identity import Identity
from weightwire.manifest import state as declared
from weightwire.manifest.catalogue import Catalogue, ConstructionNames, capture, catalogue
from weightwire.manifest.plan import plan
from weightwire.manifest.records import Manifest
from weightwire.manifest.tree import module_paths
from weightwire.runtime import (
    DecoderForCausalLM,
    KernelLayout,
    LayerContext,
    TpCoordinates,
    TpGroup,
    Weights,
    adopt_processed,
    construct,
    generate,
    materialize,
    post_load_weights,
    prepare_processed,
    prompt_logits,
    read_config,
)
from weightwire.runtime import (
    Mapping as RankMapping,
)
from weightwire.types import Stage

CPU = torch.device("cpu")
GARBAGE = 0x7F
"""Of every byte of memory that nobody has filled: no number in e4m3, huge ones in bfloat16 and float32."""
FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3", "gemma2")
FORMS = ("int8_weight_only", "fp8_static", "fp8_dynamic", "fp8_rowwise", "fp8_block", "nvfp4", "nvfp4_awq", "w4a16_awq")
"""Of a quantized Llama."""
BLOCKS_PARTLY = f"fp8_block{PARTLY}"


def write_all(root: Path) -> dict[str, Path]:
    """A checkpoint of each of ``FAMILIES`` and ``FORMS``, and of ``BLOCKS_PARTLY``."""
    torch.set_num_threads(1)
    plain, blocks = write_checkpoint(root / "plain", DIMS), write_checkpoint(root / "blocks", BLOCK_DIMS)
    forms = {form: quantized(blocks if form == "fp8_block" else plain, root / form, form) for form in FORMS}
    forms[BLOCKS_PARTLY] = quantized(blocks, root / BLOCKS_PARTLY, "fp8_block", LEAVES_OUT["llama"])
    return {name: write_family(root / name, name) for name in FAMILIES} | forms


@dataclass(frozen=True, kw_only=True)
class Side:
    """One rank's model and its construction-time names."""

    model: DecoderForCausalLM
    names: ConstructionNames

    def catalogue(self) -> Catalogue:
        return catalogue(self.model, self.names)

    def manifest(self) -> Manifest:
        return manifest_of(self.catalogue())

    def finish(self) -> Side:
        """From raw bytes to a model that runs."""
        post_load_weights(self.model)
        return self

    def logits(self) -> torch.Tensor:
        return prompt_logits(self.model, PROMPTS)

    def tokens(self, count: int = 8) -> list[list[int]]:
        return generate(self.model, PROMPTS, max_new_tokens=count)


def empty(
    directory: Path, layout: KernelLayout = KernelLayout.PLAIN, *, tp: int = 1, rank: int = 0, ep: int = 1
) -> Side:
    """A model of which nothing is filled yet."""
    group = TpGroup.offline(TpCoordinates(size=tp, rank=rank)) if tp > 1 else TpGroup.single()
    context = LayerContext(group, torch.float32, layout, RankMapping.for_tp(rank, tp, ep))
    model = construct(read_config(directory), {}, context)
    names = capture(model)
    materialize(model, CPU)
    spoil(model)
    return Side(model=model, names=names)


def loaded(
    directory: Path, layout: KernelLayout = KernelLayout.PLAIN, *, tp: int = 1, rank: int = 0, ep: int = 1
) -> Side:
    """A model as its checkpoint has it, before the first transform."""
    side = empty(directory, layout, tp=tp, rank=rank, ep=ep)
    side.model.load_weights(Weights.of(load_file(directory / "model.safetensors")))
    return side


def spoil(model: nn.Module) -> None:
    """Fill all parameters with garbage."""
    for tensor in model.parameters():
        as_bytes(tensor).fill_(GARBAGE)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor, in one dimension, sharing its memory."""
    flat = tensor.detach()
    return flat.reshape(-1).view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


@torch.no_grad()
def receive(source: Side, target: Side, *, stage: str = "LOADED") -> Side:
    """What ``LiveCheckpointLoader`` and ``Receiver`` do, with a copy in place of the wire; then the model runs."""
    offered = source.catalogue()
    manifest = manifest_of(offered)
    if stage == "PROCESSED":
        prepare_processed(target.model)
    declared.apply(module_paths(target.model, target.names.modules), manifest.layout.state)
    described = target.catalogue()
    planned = plan(described.layout, manifest)
    fill(described.bind(planned.layout), offered.memory)
    described.apply_copies(planned.copies)
    described.restore_references()
    if stage == "PROCESSED":
        adopt_processed(target.model)
        return target
    return target.finish()


@torch.no_grad()
def by_name(source: Mapping[str, torch.Tensor], target: nn.Module) -> list[str]:
    """The naive receiver: bytes of equal names and sizes, and a warning for the rest: the target's names of those."""
    ours, left = dict(target.named_parameters()), []
    for name, tensor in ours.items():
        theirs = source.get(name)
        if theirs is None or theirs.nbytes != tensor.nbytes:
            left.append(name)
        else:
            as_bytes(tensor).copy_(as_bytes(theirs))
    return left


def identities(directory: Path, layout: KernelLayout = KernelLayout.PLAIN) -> dict[Stage, Identity]:
    """Those of a replica with one rank that serves the model of ``directory``."""
    return native_identities(
        directory,
        read_config(directory),
        model_id="org/model",
        revision="r1",
        dtype="float32",
        kernel_layout=layout,
        mapping=RankMapping.for_tp(0, 1),
    )


def parameters(side: Side) -> dict[str, torch.Tensor]:
    """What a naive source publishes: parameters as ``named_parameters`` lists them now."""
    return dict(side.model.named_parameters())
