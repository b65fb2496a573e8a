"""Hooks and checkpoint loaders that the runtime's tests watch and fill models with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from weightwire.runtime import (
    BuildFacts,
    DecoderForCausalLM,
    Final,
    Injected,
    KernelLayout,
    LoaderSettings,
    LoadFormat,
    LoadRequest,
    ModelConfig,
    ModelLoader,
    SafetensorsLoader,
    Stage,
    TpCoordinates,
    TpGroup,
    Weights,
    prepare_processed,
    read_config,
)
from weightwire.runtime.layers.attention import Attention

CPU = torch.device("cpu")
SINGLE = TpGroup.single()
Names = dict[str, tuple[nn.Module, str]]


def parameter_places(model: nn.Module) -> Names:
    """Construction-time name to the place that holds the tensor, whatever is there later."""
    return {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


class Recorder:
    """Hooks that note what happened, and the construction-time places."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.places: Names = {}
        self.raw: dict[str, torch.Tensor] = {}
        self.final: dict[str, torch.Tensor] = {}

    def constructed(self, model: nn.Module) -> None:
        assert all(tensor.is_meta for tensor in model.parameters())
        self.places = parameter_places(model)
        self.events.append("constructed")

    def filling(self, model: nn.Module) -> Final | None:
        assert self.places.keys() == parameter_places(model).keys()

        def final(names: Collection[str]) -> None:
            for name in names:
                assert name not in self.final
                module, leaf = self.places[name]
                self.final[name] = getattr(module, leaf).detach().clone()

        return final

    def loaded(self, model: nn.Module) -> None:
        if "post_loaded" not in self.events:  # aliases are wired by the steps that follow, not before
            assert self.places.keys() == parameter_places(model).keys()
        self.raw = self.snapshot()
        self.events.append("loaded")

    @contextmanager
    def guard_transform(self, module: nn.Module) -> Iterator[None]:
        self.events.append(f"before {type(module).__name__}")
        yield
        self.events.append("after")

    def post_loaded(self, model: nn.Module) -> None:
        assert isinstance(model, DecoderForCausalLM)
        self.events.append("post_loaded")

    def reloading(self, model: nn.Module) -> None:
        assert isinstance(model, DecoderForCausalLM)
        self.events.append("reloading")

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: getattr(module, leaf).detach().clone() for name, (module, leaf) in self.places.items()}


class Poisoning(SafetensorsLoader):
    """Fills all parameters with NaN first, so that whatever nobody writes is seen."""

    def load_weights(self, request: LoadRequest) -> Weights:
        poison(request.model)
        return super().load_weights(request)


def attention_of(model: DecoderForCausalLM, layer: int) -> Attention:
    attention = model.model.decoder_layers[layer].self_attn
    assert isinstance(attention, Attention)
    return attention


def poison(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


class Injecting:
    """Puts another model's tensors in place: what a peer does, without a network."""

    def __init__(self, tensors: dict[str, torch.Tensor], stage: Stage, facts: BuildFacts | None = None) -> None:
        self.tensors, self.stage, self.facts, self.cleaned = tensors, stage, facts or {}, 0

    def load_config(self, checkpoint_dir: Path) -> ModelConfig:
        return read_config(checkpoint_dir)

    def build_facts(self, checkpoint_dir: Path, config: ModelConfig) -> BuildFacts:  # noqa: ARG002
        return self.facts

    def load_weights(self, request: LoadRequest) -> Injected | Weights:
        places = parameter_places(request.model)
        poison(request.model)
        if self.stage == "PROCESSED":
            prepare_processed(request.model)
        assert set(places) == set(self.tensors)
        with torch.no_grad():
            for name, (module, leaf) in places.items():
                assert getattr(module, leaf).shape == self.tensors[name].shape, name
                getattr(module, leaf).copy_(self.tensors[name])
        return Injected(self.stage, "report")

    def cleanup(self) -> None:
        self.cleaned += 1


def settings(layout: KernelLayout = KernelLayout.PLAIN, load_format: LoadFormat = LoadFormat.AUTO) -> LoaderSettings:
    return LoaderSettings(load_format, torch.float32, layout)


def part_of(directory: Path, size: int, rank: int, layout: KernelLayout = KernelLayout.PLAIN) -> DecoderForCausalLM:
    group = TpGroup.offline(TpCoordinates(size=size, rank=rank))
    return ModelLoader(group, settings(layout), Poisoning()).load(directory).model
