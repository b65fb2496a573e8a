"""Small random Llama checkpoints, written by hand, for the runtime's tests and their rank processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 90,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}

# grouped heads with llama3 scaling; everything biased and tied; an inner width that leaves a rank of 4 with nothing
CASES: dict[str, dict[str, Any]] = {
    "gqa_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "biased_tied": {
        "num_key_value_heads": 4,
        "vocab_size": 98,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "empty_shard": {"num_key_value_heads": 8, "intermediate_size": 5, "head_dim": 16},
}

NEW_TOKENS = 4
PROMPTS = [[3, 14, 15, 92, 65], [35, 8], [9, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28], [1]]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint of ``config``."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    linears = {
        "self_attn.q_proj": (q, hidden, config["attention_bias"]),
        "self_attn.k_proj": (kv, hidden, config["attention_bias"]),
        "self_attn.v_proj": (kv, hidden, config["attention_bias"]),
        "self_attn.o_proj": (hidden, q, config["attention_bias"]),
        "mlp.gate_proj": (inner, hidden, config["mlp_bias"]),
        "mlp.up_proj": (inner, hidden, config["mlp_bias"]),
        "mlp.down_proj": (hidden, inner, config["mlp_bias"]),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = (hidden,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            found[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                found[f"{prefix}.{name}.bias"] = (rows,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    return found


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Numbers large enough that every tensor, biases and norms too, moves the result."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes(config).items()}


def write_checkpoint(directory: Path, changes: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """A checkpoint of ``BASE`` with ``changes``, in one float32 file."""
    config = {**BASE, **(changes or {})}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config, seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
