"""Raw and transformed bytes taken for one another, transforms under a reader, references that were not taken anew.

Each test carries the naive way out on a real model, shows what it computes then, and that ours is right or refuses.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from naive_models import CPU, FAMILIES, Side, as_bytes, by_name, empty, identities, loaded, parameters, receive, spoil
from safetensors.torch import load_file
from torch import nn

from weightwire.errors import CheckpointError, ManifestMismatch
from weightwire.manifest.catalogue import Catalogue, capture
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.plan import plan
from weightwire.runtime import (
    KernelLayout,
    LayerContext,
    TpCoordinates,
    TpGroup,
    Weights,
    adopt_processed,
    construct,
    materialize,
    post_load_weights,
    prepare_processed,
    prepare_raw,
    read_config,
)
from weightwire.runtime.layers.moe import FusedMoE, UnquantizedMoeMethod
from weightwire.runtime.layers.shards import Part, new_parameter
from weightwire.source.snapshot import Snapshot, storages
from weightwire.types import Stage

PACKED = KernelLayout.PACKED
TRANSFORMING = (*FAMILIES, "fp8_block", "nvfp4")
IN_PLACE = FAMILIES
"""Those whose packed layout changes some weights where they are."""


def guarded(side: Side) -> tuple[Catalogue, bytes, Snapshot]:
    """What is published of raw bytes, their digests, and the guard of the transforms that follow."""
    described = side.catalogue()
    owners = described.memory.owners
    assert isinstance(owners, list)
    return described, digests(described), Snapshot(model=side.model, published=storages(owners))


def digests(described: Catalogue) -> bytes:
    return digest_leaves(described.memory, described.layout.leaves)


def read(described: Catalogue, target: Side) -> Side:
    """A reader of raw bytes that looks at the published addresses only now, and at no digest."""
    for name, tensor in target.catalogue().tensors.items():
        as_bytes(tensor).copy_(as_bytes(described.tensors[name]))
    return target.finish()


@pytest.mark.parametrize("case", IN_PLACE)
def test_h09_a_transform_on_the_published_bytes_themselves_gives_readers_a_mix(
    case: str, models: dict[str, Path]
) -> None:
    wanted = loaded(models[case]).finish().tokens()
    naive, ours = loaded(models[case], PACKED), loaded(models[case], PACKED)
    published, before, _ = guarded(naive)
    naive.finish()
    assert naive.tokens() == wanted  # the source itself is right, and healthy
    assert digests(published) != before  # which is what ours looks at, and refuses
    assert read(published, empty(models[case])).tokens() != wanted
    assert read(published, empty(models[case], PACKED)).tokens() != wanted  # transformed twice
    published, before, snapshot = guarded(ours)
    post_load_weights(ours.model, snapshot.guard)
    assert digests(published) == before
    assert read(published, empty(models[case])).tokens() == ours.tokens() == wanted
    assert read(published, empty(models[case], PACKED)).tokens() == wanted


@pytest.mark.parametrize("case", TRANSFORMING)
def test_h10_what_lives_on_beside_what_replaced_it_is_counted_to_the_byte_and_let_go(
    case: str, models: dict[str, Path]
) -> None:
    side = loaded(models[case], PACKED)
    published, _, snapshot = guarded(side)
    post_load_weights(side.model, snapshot.guard)
    used = storages(parameters(side).values())
    originals = {tensor.untyped_storage().data_ptr(): tensor for tensor in published.tensors.values()}
    kept = [tensor for pointer, tensor in originals.items() if pointer not in used]
    only_published = [t for t in kept if not _belongs(t, side)]
    assert snapshot.held.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in only_published) > 0
    watched = [weakref.ref(tensor) for tensor in only_published]
    del published, originals, kept, only_published
    assert not any(watch() for watch in watched)


def _belongs(tensor: torch.Tensor, side: Side) -> bool:
    """Whether the model itself still holds the storage (derived tensors are no parameters)."""
    held = [*side.model.buffers(), side.model.model.rotary_emb.cos_sin_cache]
    return tensor.untyped_storage().data_ptr() in storages(held)


@pytest.mark.parametrize("case", TRANSFORMING)
def test_h11_bytes_of_the_other_stage_are_garbage_under_the_same_names_and_never_meet(
    case: str, models: dict[str, Path]
) -> None:
    raw, done = loaded(models[case], PACKED), loaded(models[case], PACKED).finish()
    wanted = done.logits()
    twice, skipped = empty(models[case], PACKED), empty(models[case], PACKED)
    names = {name: dict(done.model.named_parameters(remove_duplicate=False))[name] for name in parameters(raw)}
    by_name(names, twice.model)  # kernel-ready bytes, and then the transforms
    prepare_processed(skipped.model)  # raw bytes, and a flag that says that the transforms are done
    by_name(_by_construction(raw, skipped), skipped.model)
    adopt_processed(skipped.model)
    for naive in (twice.finish(), skipped):
        assert not torch.allclose(naive.logits(), wanted, rtol=0.01, atol=0.01)
    keys = {stage: each.replica_key for stage, each in identities(models[case], PACKED).items()}
    assert keys[Stage.LOADED] != keys[Stage.PROCESSED]
    assert identities(models[case])[Stage.PROCESSED].replica_key != keys[Stage.PROCESSED]
    with pytest.raises(ManifestMismatch):
        plan(empty(models[case], PACKED).catalogue().layout, done.manifest())
    assert torch.equal(receive(done, empty(models[case], PACKED), stage="PROCESSED").logits(), wanted)
    assert torch.equal(receive(raw, empty(models[case], PACKED)).logits(), wanted)


def _by_construction(source: Side, target: Side) -> dict[str, torch.Tensor]:
    """The source's tensors by every name, those that aliases give too, so that names alone hold nothing back."""
    source.model.setup_aliases()
    theirs: dict[str, torch.Tensor] = dict(source.model.named_parameters(remove_duplicate=False))
    assert set(dict(target.model.named_parameters())) <= set(theirs)
    return theirs


class ScaledExperts(UnquantizedMoeMethod):
    """Experts with a scale each, which the kernel finds in ``quant_scales``."""

    def create_weights(self, layer: FusedMoE) -> None:
        super().create_weights(layer)
        layer.w2_scale = new_parameter(len(layer.local_experts), dtype=torch.float32)

    def load_weights(self, layer: FusedMoE, experts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        written = super().load_weights(layer, experts, tp)
        scale = layer.w2_scale
        assert isinstance(scale, nn.Parameter)
        scale.copy_(torch.linspace(0.5, 2.5, len(experts)))
        return written | {"w2_scale"}

    def quant_scales(self, layer: FusedMoE) -> tuple[torch.Tensor, ...]:
        scale = layer.w2_scale
        assert isinstance(scale, nn.Parameter)
        return (scale,)

    def apply(self, layer: FusedMoE, expert: int, x: torch.Tensor) -> torch.Tensor:
        return super().apply(layer, expert, x) * scale_of(layer)[expert]


def scale_of(layer: FusedMoE) -> torch.Tensor:
    """What the kernel reads."""
    scale = layer.quant_scales[0]
    assert isinstance(scale, torch.Tensor)
    return scale


def with_scales(directory: Path) -> Side:
    """Built on meta: so is what the experts' ``quant_scales`` refer to."""
    model = construct(read_config(directory), {}, LayerContext(TpGroup.single(), torch.float32))
    with torch.device("meta"):
        for layer in experts(model):
            layer.method = ScaledExperts()
            layer.method.create_weights(layer)
            layer.quant_scales = layer.method.quant_scales(layer)
    names = capture(model)
    materialize(model, CPU)
    spoil(model)
    return Side(model=model, names=names)


def experts(model: nn.Module) -> list[FusedMoE]:
    return [module for module in model.modules() if isinstance(module, FusedMoE)]


@torch.no_grad()
def test_h07_references_that_construction_took_are_taken_anew_as_the_output_shows(models: dict[str, Path]) -> None:
    source, ours = with_scales(models["qwen3_moe"]), with_scales(models["qwen3_moe"])
    source.model.load_weights(Weights.of(load_file(models["qwen3_moe"] / "model.safetensors")))
    assert all(scale_of(layer).is_meta for layer in experts(ours.model))
    receive(source, ours)
    wanted = source.finish().logits()
    assert torch.equal(ours.logits(), wanted)
    for layer in experts(ours.model):  # bound to other memory, as a pool of weights does it
        layer.w2_scale = nn.Parameter(torch.ones_like(ours.logits()[0, :8]), requires_grad=False)
    assert torch.equal(ours.logits(), wanted)  # the naive way: the kernel still reads what was there before
    post_load_weights(ours.model)
    assert not torch.allclose(ours.logits(), wanted, rtol=0.01, atol=0.01)
    for layer, theirs in zip(experts(ours.model), experts(source.model), strict=True):
        scale_of(layer).copy_(scale_of(theirs))
    assert torch.equal(ours.logits(), wanted)


@pytest.mark.parametrize("case", TRANSFORMING)
def test_h37_a_refill_without_the_raw_shapes_fails_and_with_them_is_the_checkpoints(
    case: str, models: dict[str, Path]
) -> None:
    """Kernel-ready bytes were to come and did not: the same process goes on with its disk, in the same model."""
    weights = Weights.of(load_file(models[case] / "model.safetensors"))
    naive, ours = empty(models[case], PACKED), empty(models[case], PACKED)
    for side in (naive, ours):
        prepare_processed(side.model)
        spoil(side.model)  # what a peer sent of it
    with pytest.raises((CheckpointError, RuntimeError, AssertionError)):
        naive.model.load_weights(weights)
    prepare_raw(ours.model)
    ours.model.load_weights(weights)
    assert ours.manifest().content_id == loaded(models[case], PACKED).manifest().content_id
    assert torch.equal(ours.finish().logits(), loaded(models[case], PACKED).finish().logits())
