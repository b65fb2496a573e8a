"""What latent attention's parameters are to one another."""

from __future__ import annotations

from pathlib import Path

import torch
from runtime_families import write_family
from runtime_hooks import SINGLE, Recorder, poison, settings

from weightwire.manifest.catalogue import capture, catalogue
from weightwire.runtime import LayerContext, ModelLoader, SafetensorsLoader, construct, materialize, read_config

VIEW, OWNER = "model.layers.0.self_attn.v_b_proj", "model.layers.0.self_attn.kv_b_proj.weight"


def test_h03_the_values_are_a_view_that_travels_once(tmp_path: Path) -> None:
    directory = write_family(tmp_path / "deepseek", "deepseek_v3")
    hooks = Recorder()
    ModelLoader(SINGLE, settings(), SafetensorsLoader(), hooks).load(directory)
    target = construct(read_config(directory), {}, LayerContext(SINGLE, torch.float32))
    names = capture(target)
    materialize(target, torch.device("cpu"))
    poison(target)
    ours = catalogue(target, names)
    assert VIEW not in ours.tensors
    assert OWNER in ours.tensors
    parameters = dict(target.named_parameters())
    # only what the catalogue names is filled; the view shows its bytes all the same
    for name, tensor in ours.tensors.items():
        module, leaf = hooks.places.get(name, (None, ""))
        if module is not None:
            tensor.copy_(getattr(module, leaf).detach())
    assert torch.equal(parameters[VIEW], hooks.snapshot()[VIEW])
    assert not any(parameter.isnan().any() for parameter in parameters.values())
