"""Child process: a program of another kind that publishes what a checkpoint holds, under Hugging Face's names.

    python publish_tensors.py CHECKPOINT OPTIONS-JSON

It says ``ready`` with content id and weights id, and serves until its input ends. See ``Options``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from presharded_files import Tensors, rank_tensors
from safetensors.torch import load_file
from torch import nn
from torch._C._distributed_c10d import TCPStore  # re-exported elsewhere, but not to type checkers

import weightwire

ENGINE = "acme"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is published, and what is wrong with it.

    Attributes:
        url: metadata server.
        model_id: as the target calls the model.
        transformers: a model of that library, with one rank; else a module that holds this rank's tensors.
        dtype: of the identity, and of a model of transformers.
        rank, tp, ep: which part.
        store: port of the ranks' store.
        revision: of the identity.
        whole: every rank publishes all tensors uncut.
        without: a tensor that is missing, or several.
        extra: a tensor too many.
        large: bytes of another one.
        other_dtype: tensors that are told as another dtype, by name.
        short: tensors whose last row is missing.
        state: modules declare state.
        slow_s: before each chunk that is served.
        fields: further ones of the identity.
    """

    url: str
    model_id: str
    transformers: bool = False
    dtype: str = "float32"
    rank: int = 0
    tp: int = 1
    ep: int = 1
    store: int = 0
    revision: str = "r1"
    whole: bool = False
    without: str | Sequence[str] = ()
    extra: str = ""
    large: int = 0
    other_dtype: Mapping[str, str] = field(default_factory=dict)
    short: str = ""
    state: bool = False
    slow_s: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)


class Held(nn.Module):
    """Tensors as parameters under their dotted names."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


class Stateful(Held):
    """It has something to say that is no tensor."""

    def export_state(self) -> dict[str, Any]:
        return {"alpha": 2.0}

    def import_state(self, state: dict[str, Any]) -> None:
        """Nobody asks for it."""


def tensors_of(checkpoint: Path, config: dict[str, Any], options: Options) -> Tensors:
    """This rank's, or what is said to be."""
    every = load_file(checkpoint / "model.safetensors")
    mine = every if options.whole else rank_tensors(config, every, options.tp, options.rank, options.ep)
    for name in [options.without] if isinstance(options.without, str) else options.without:
        del mine[name]
    for name, dtype in options.other_dtype.items():
        mine[name] = mine[name].to(getattr(torch, dtype))
    if options.extra:
        mine[options.extra] = torch.zeros(3)
    if options.large:
        mine["large"] = torch.zeros(options.large, dtype=torch.uint8)
    if options.short:
        mine[options.short] = mine[options.short][:-1].contiguous()
    return mine


def module_of(checkpoint: Path, config: dict[str, Any], options: Options) -> nn.Module:
    if options.transformers:
        import transformers

        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, options.dtype)
        )
        return model
    kind = Stateful if options.state else Held
    return kind(tensors_of(checkpoint, config, options))


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, options = Path(sys.argv[1]), Options(**json.loads(sys.argv[2]))
    config = json.loads((checkpoint / "config.json").read_text())
    group = None
    if options.tp > 1:
        store = TCPStore("127.0.0.1", options.store, is_master=False)
        group = weightwire.ranks(store, options.rank, options.tp)
    identity = weightwire.module_identity(
        options.model_id,
        config["architectures"][0],
        options.dtype,
        config,
        revision=options.revision,
        **{"engine": ENGINE, "tp_size": options.tp, "ep_size": options.ep} | dict(options.fields),
    )
    where = weightwire.Coordinates(
        tp_rank=options.rank, tp_size=options.tp, ep_rank=options.rank % options.ep, ep_size=options.ep
    )
    module = module_of(checkpoint, config, options)
    with weightwire.publish(module, identity, url=options.url, coordinates=where, group=group) as published:
        if options.slow_s:
            node = published._member.node
            admit = node.admit

            def slowly(*arguments: Any) -> Any:
                time.sleep(options.slow_s)
                return admit(*arguments)

            node.admit = slowly  # type: ignore[assignment, method-assign]
        print("ready", published.report.content_id, published.report.weights_id, flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main()
