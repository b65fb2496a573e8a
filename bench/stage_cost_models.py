"""The models that ``stage_cost.py`` measures with: one shape for each family of the table, in any quantization."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from processes import Line
from safetensors.torch import load_file, save_file

from weightwire.engines.native.support import PARTLY, UNQUANTIZED, Row, parallel
from weightwire.runtime.quantization.export import FORMATS, quantize

FORM = {"fp8_qdq": "fp8_static"}
"""Quantization of the support table -> the checkpoint format, where it has another name."""
COMMON: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}
MOE: dict[str, Any] = {"moe_intermediate_size": 512, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 128}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | {"num_experts": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        MOE
        | {
            "num_key_value_heads": 8,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 512,
            "kv_lora_rank": 256,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "first_k_dense_replace": 1,
        },
    ),
}
LEFT_OUT = {"deepseek_v3": "*self_attn*", "qwen3_moe": "*self_attn*", "llama": "*o_proj"}
"""What checkpoints of a family leave out where rows say that parts are."""
EACH = 2
"""Ranks along each axis that a row has."""


def sizes(row: Row) -> dict[str, Any]:
    """The fields of ``ReplicaOptions`` that make replicas of ``row``."""
    axes = row.parallel.split("+")
    shared = "attention_dp" in axes
    tp = EACH if shared or "tp" in axes else 1
    return {
        "tp": tp,
        "pp": EACH if "pp" in axes else 1,
        "ep": EACH if "ep" in axes else 1,
        "attention_dp": shared,
    }


def unknown(row: Row) -> str:
    """Why ``row`` cannot be measured with what is known here; empty where it can."""
    if row.family not in MODELS:
        return f"no model of {row.family}"
    if row.quantization != UNQUANTIZED and _form(row.quantization) not in FORMATS:
        return f"no checkpoint format for {row.quantization}"
    if parallel(**sizes(row)) != row.parallel:
        return f"no ranks for {row.parallel}"
    return ""


def _form(quantization: str) -> str:
    """The checkpoint format of a quantization of the support table."""
    whole = quantization.removesuffix(PARTLY)
    return FORM.get(whole, whole)


def write(
    line: Line, directory: str, family: str, quantization: str, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """A checkpoint of random numbers in bfloat16 or quantized, in a process of its own: who forks has no threads.

    ``more``: fields of the configuration that are not as above.
    """
    import transformers

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  (progress bars, until this process ends)
    torch.set_num_threads(1)
    kind, changes = MODELS[family]
    config = getattr(transformers, kind)(**{**COMMON, **changes, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    target = Path(directory)
    model.save_pretrained(target)
    if quantization != UNQUANTIZED:
        tensors = load_file(target / "model.safetensors")
        leave_out = [LEFT_OUT[family]] if quantization.endswith(PARTLY) else []
        found, section = quantize(tensors, _form(quantization), leave_out)
        save_file(found, target / "model.safetensors", metadata={"format": "pt"})
        raw = json.loads((target / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps(raw | {"quantization_config": section}))
    line.say("written")
    line.hear()
