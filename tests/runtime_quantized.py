"""Small quantized checkpoints for tests, and what they stand for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from runtime_families import write_family
from safetensors.torch import load_file, save_file

from weightwire.runtime import DecoderForCausalLM
from weightwire.runtime.layers.latent import KeyValueLinear
from weightwire.runtime.layers.moe import FusedMoE
from weightwire.runtime.quantization import fp8, integers, nvfp4
from weightwire.runtime.quantization.export import FORMATS, quantize
from weightwire.runtime.quantization.linear_fp8 import Fp8BlockMethod, Fp8QdqMethod, Fp8RowwiseMethod
from weightwire.runtime.quantization.linear_nvfp4 import Nvfp4Method

Tensors = dict[str, torch.Tensor]

# widths that leave NVFP4 weights unaligned (40 bytes, 80 rows), also in halves
DIMS: dict[str, Any] = {"hidden_size": 80, "head_dim": 16, "intermediate_size": 160}
# halves of whole blocks of 128
BLOCK_DIMS: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
}

FORMS: dict[str, tuple[str, ...]] = {
    "fp8_qdq": ("fp8_static", "fp8_dynamic"),
    **{form: (form,) for form in FORMATS if not form.startswith(("fp8_static", "fp8_dynamic"))},
}
"""Quantization of the support table -> the checkpoint formats that have it."""

# as DIMS and BLOCK_DIMS, also where four ranks share tensors, and two of them each expert
FAMILY_DIMS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 80, "intermediate_size": 192, "moe_intermediate_size": 96, "num_hidden_layers": 2},
    "deepseek_v3": {
        "hidden_size": 80,
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "n_shared_experts": 2,
        "num_hidden_layers": 2,
        "q_lora_rank": 48,
        "v_head_dim": 16,
    },
}
FAMILY_BLOCK_DIMS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 128,
        "head_dim": 128,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
    },
    "deepseek_v3": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "n_shared_experts": 2,
        "num_hidden_layers": 2,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
}
# the shape of Kimi-K2: one group of experts, a shared one, one dense layer; eight ranks
KIMI: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_hidden_layers": 3,
    "q_lora_rank": 48,
    "v_head_dim": 16,
}
FAMILY_FORMS: dict[str, tuple[str, ...]] = {
    "qwen3_moe": ("fp8_static", "fp8_dynamic", "fp8_block", "nvfp4"),
    "deepseek_v3": ("fp8_block", "nvfp4"),
}
"""Checkpoint formats that are proven for families with experts."""

PARTLY = "-partly"
"""Behind a checkpoint format, of which ``LEAVES_OUT`` is left out."""
LEAVES_OUT: dict[str, tuple[str, ...]] = {
    "llama": ("*.o_proj",),
    "qwen3_moe": ("*self_attn*",),
    "deepseek_v3": ("*self_attn*",),
    # as NVIDIA's: attention layer by layer, the dense layer, the head and routers
    "kimi": ("model.layers.0.*", "model.layers.1.self_attn*", "model.layers.2.self_attn*", "*.mlp.gate"),
}
"""Of families: what their checkpoints in the field leave out."""
PARTLY_FORMS = {"qwen3_moe": "nvfp4-partly", "deepseek_v3": "nvfp4-partly"}

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))


def quantized(source: Path, target: Path, form: str, leave_out: Iterable[str] = ()) -> Path:
    """The checkpoint of ``source`` in ``form``."""
    tensors, section = quantize(load_file(source / "model.safetensors"), form, leave_out)
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": section}))
    return target


def quantized_family(root: Path, name: str, form: str, changes: dict[str, Any] | None = None) -> Path:
    """A checkpoint of a family with experts, its float original beside it in ``…-float``."""
    base, leave_out = form.removesuffix(PARTLY), LEAVES_OUT["kimi" if changes is KIMI else name]
    dims = (FAMILY_BLOCK_DIMS if base == "fp8_block" else FAMILY_DIMS)[name] if changes is None else changes
    source = write_family(root / f"{name}-{form}-float", name, changes=dims)
    return quantized(source, root / f"{name}-{form}", base, leave_out if form.endswith(PARTLY) else ())


def dequantised(tensors: Tensors, form: str) -> Tensors:
    """What each checkpoint weight stands for, by the formats' own definitions; independent of how layers store it."""
    found = {}
    for name in [name for name in tensors if name.endswith((".weight_scale", ".weight_scale_inv"))]:
        prefix, scale = name.rpartition(".")[0] + ".", tensors[name]
        weight = tensors[prefix + "weight"]
        if form == "fp8_block":
            scale = fp8.expand(scale, *weight.shape)
        if form.startswith("nvfp4"):
            found[prefix] = nvfp4.dequantise(weight, scale, tensors[prefix + "weight_scale_2"])
        elif form == "w4a16_awq":
            found[prefix] = integers.dequantise_int4(weight, scale)
        else:
            found[prefix] = weight.float() * scale
    return found


def fused(tensors: Tensors, form: str) -> Tensors:
    """The same checkpoint with parts that one layer fuses rounded to the largest one's scale, as loading does it."""
    found, leaf = dict(tensors), "weight_scale_2" if form.startswith("nvfp4") else "weight_scale"
    if not form.startswith(("nvfp4", "fp8_static", "fp8_dynamic")):
        return found
    for prefixes in _groups(tensors, leaf):
        common = torch.stack([tensors[prefix + leaf] for prefix in prefixes]).max()
        for prefix in prefixes:
            factor = tensors[prefix + leaf] / common
            rounded = "weight_scale" if form.startswith("nvfp4") else "weight"
            exact = tensors[prefix + rounded].float() * factor
            found |= {prefix + rounded: exact.to(torch.float8_e4m3fn), prefix + leaf: common}
    return found


def _groups(tensors: Tensors, leaf: str) -> Iterator[list[str]]:
    for parts in _FUSED:
        for name in [name for name in tensors if name.endswith(f".{parts[0]}.{leaf}")]:
            parent = name.removesuffix(f"{parts[0]}.{leaf}")
            yield [f"{parent}{part}." for part in parts]


def float_reference(directory: Path, form: str, target: Path, *, resmoothed: bool = False) -> Any:
    """transformers' model with the weights that the layers of ``directory``'s checkpoint stand for, in float32.

    ``resmoothed``: after block scales were made powers of two.
    """
    tensors = load_file(directory / "model.safetensors")
    stands_for = dequantised(fused(tensors, form), form)
    if resmoothed:
        for prefix in stands_for:
            weight, powers = fp8.resmooth(tensors[prefix + "weight"], tensors[prefix + "weight_scale_inv"])
            stands_for[prefix] = weight.float() * fp8.expand(powers, *weight.shape)
    kept = {name: tensor.float() for name, tensor in tensors.items() if f"{name.rpartition('.')[0]}." not in stands_for}
    for prefix, weight in stands_for.items():
        kept[prefix + "weight"] = weight * tensors.get(prefix + "pre_quant_scale", torch.ones(()))
    raw = json.loads((directory / "config.json").read_text())
    del raw["quantization_config"]
    target.mkdir()
    (target / "config.json").write_text(json.dumps(raw | {"dtype": "float32"}))
    save_file(
        {name: tensor.contiguous() for name, tensor in kept.items()}, target / "model.safetensors", {"format": "pt"}
    )
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def leave_activations(model: DecoderForCausalLM) -> None:
    """Kernels as they are, but for the rounding of what goes into them."""
    for module in model.modules():
        method: Any = getattr(module, "method", None)
        found: Any = None
        if isinstance(method, Nvfp4Method):
            found = _in_units
        elif isinstance(method, Fp8QdqMethod | Fp8RowwiseMethod | Fp8BlockMethod):
            found = _of_layer
        elif isinstance(module, FusedMoE) and hasattr(method, "activations"):
            found = _of_experts
        elif isinstance(module, KeyValueLinear) and hasattr(method, "activations"):
            found = torch.Tensor.float
        if found is not None:
            method.activations = found


def _in_units(layer: Any, x: torch.Tensor) -> torch.Tensor:
    units: torch.Tensor = x.float() / layer.inv_input_scale
    return units


def _of_layer(_layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x.float()


def _of_experts(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x.float() if scale is None else x.float() / scale
