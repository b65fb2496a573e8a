"""Small random checkpoints of model families, written by transformers' own classes, which are the oracle too."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# name: (configuration class, what it says beyond COMMON); odd widths, so that shares are ragged
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "moe_intermediate_size": 22,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 8,
            "moe_intermediate_size": 22,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 10,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    # as DeepSeek-V2 Lite: queries in one step; biased, and no group of experts
    "latent_lite": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 8,
            "moe_intermediate_size": 22,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "kv_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 10,
            "first_k_dense_replace": 2,
            "attention_bias": True,
            "rope_interleave": False,
        },
    ),
    # a window shorter than the prompts, caps low enough to bend logits
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 0.5,
        },
    ),
}

NEW_TOKENS = 16
FEW_TOKENS = 5
PROMPTS = [[3, 14, 15, 92, 65], [35, 8], [9, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28], [1]]


def reference(name: str, seed: int, dtype: torch.dtype = torch.float32, changes: dict[str, Any] | None = None) -> Any:
    """transformers' model of a family, every number of it random and large enough to move the result."""
    transformers = importlib.import_module("transformers")
    kind, usual = FAMILIES[name]
    config = getattr(transformers, kind)(**{**COMMON, **usual, **(changes or {})})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        numbers = torch.randn(tensor.shape, generator=generator) * 0.3
        if "gemma" in name:  # its tied embedding would otherwise repeat the prompt for ever
            numbers *= 0.1 if "embed_tokens" in key or "lm_head" in key else 1
        tensor.copy_(numbers + 1 if "norm" in key and "gemma" not in name else numbers)
    return model.to(dtype)


def write_family(
    directory: Path,
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of ``reference``, in transformers' own names."""
    reference(name, seed, dtype, changes).save_pretrained(directory)
    return directory


def expected(name: str, seed: int = 0) -> tuple[torch.Tensor, list[list[int]]]:
    """``continued`` of ``reference``."""
    return continued(reference(name, seed))


@torch.no_grad()
def continued(model: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """What transformers computes in float32: logits of the token after each prompt, and the greedy continuation.

    Without a cache, so that what a cache does wrong shows.
    """
    first, rows = [], []
    for prompt in PROMPTS:
        sequence = list(prompt)
        for step in range(NEW_TOKENS):
            logits = model(torch.tensor([sequence]), use_cache=False).logits[0, -1]
            first += [logits] if step == 0 else []
            sequence.append(int(logits.argmax()))
        rows.append(sequence[len(prompt) :])
    return torch.stack(first), rows
