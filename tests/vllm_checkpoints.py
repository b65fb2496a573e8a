"""Small random Hugging Face checkpoints that vLLM serves on a CPU, each named for what is particular about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightwire.engines.native.smollm2 import build_checkpoint, strip_weights

HEAD = 32
VOCAB = 49152
"""Of SmolLM2's tokenizer, which all of them share."""

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3: dict[str, Any] = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
QWEN3_MOE: dict[str, Any] = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
W8A8: dict[str, Any] = LLAMA | {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    }
}
# Layers that share one static scale for their inputs: processing replaces and drops more of it than of W8A8.
W8A8_STATIC: dict[str, Any] = json.loads(json.dumps(W8A8 | {"num_hidden_layers": 1}))  # slow on some CPUs
W8A8_STATIC["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= {
    "strategy": "tensor",
    "dynamic": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "untied": LLAMA,
    "says_tied": LLAMA | {"tie_word_embeddings": True},
    "says_tied_is": LLAMA | {"tie_word_embeddings": True},
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "w8a8": W8A8,
    "w8a8_static": W8A8_STATIC,
}
"""``says_tied`` carries an ``lm_head`` of its own all the same, ``says_tied_is`` one that equals the embedding."""

QUIRKS = {"says_tied", "says_tied_is"}


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a checkpoint of ``config``, before quantization, without ``lm_head``."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
        if config["model_type"].startswith("qwen3"):
            yield f"{at}.self_attn.q_norm.weight", (head,)
            yield f"{at}.self_attn.k_norm.weight", (head,)
        yield from _mlp(config, at)


def _mlp(config: dict[str, Any], at: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config["hidden_size"]
    if "num_experts" not in config:
        yield from _gated(f"{at}.mlp", hidden, config["intermediate_size"])
        return
    yield f"{at}.mlp.gate.weight", (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from _gated(f"{at}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])


def _gated(at: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)


def tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random values; strong enough that greedy answers depend on every layer and differ between prompts."""
    chance = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, shape in shapes(config):
        values = torch.randn(shape, generator=chance)
        made[name] = (1 + 0.1 * values if "norm" in name else 0.1 * values).to(torch.bfloat16)
    if not config["tie_word_embeddings"]:
        head = torch.randn(config["vocab_size"], config["hidden_size"], generator=chance)
        made["lm_head.weight"] = (0.1 * head).to(torch.bfloat16)
    return made


def quantised(config: dict[str, Any], plain: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Linear weights as INT8 with one scale a row, as llm-compressor writes them."""
    if "quantization_config" not in config:
        return plain
    group = config["quantization_config"]["config_groups"]["group_0"]
    made: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        if not name.endswith("_proj.weight"):
            made[name] = tensor
            continue
        scale = tensor.float().abs().amax(1, keepdim=True) / 127
        made[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
        made[f"{name}_scale"] = scale.to(torch.bfloat16)
        if not group["input_activations"]["dynamic"]:
            made[f"{name.removesuffix('weight')}input_scale"] = torch.tensor([0.05], dtype=torch.bfloat16)
    return made


def write(directory: Path, kind: str, tokenizer: Path, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of ``CONFIGS[kind]`` with ``changes`` and the tokenizer of the checkpoint ``tokenizer``."""
    config = CONFIGS[kind] | changes
    made = quantised(config, tensors(config, seed))
    if kind in QUIRKS:
        own = torch.randn(made["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(seed + 1))
        made["lm_head.weight"] = (0.1 * own).to(torch.bfloat16)
        if kind == "says_tied_is":
            made["lm_head.weight"] = made["model.embed_tokens.weight"].clone()
    directory.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(tokenizer / name, directory / name)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(made, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


class Checkpoints:
    """Made on first use under ``root``, each once."""

    def __init__(self, root: Path, smollm2: Callable[[], Path] = build_checkpoint) -> None:
        self._root = root
        self._smollm2 = smollm2

    def full(self, kind: str, seed: int = 0, **changes: Any) -> Path:
        """With weights; ``smollm2`` is the real model, everything else is random."""
        if kind == "smollm2":
            return self._smollm2()
        suffix = "".join(f"-{name}={value}" for name, value in sorted(changes.items()))
        directory = self._root / f"{kind}-{seed}{suffix}"
        if not directory.exists():
            write(directory, kind, self._smollm2(), seed, **changes)
        return directory

    def bare(self, kind: str, seed: int = 0, **changes: Any) -> Path:
        """Configuration and tokenizer only: all that a target gets."""
        full = self.full(kind, seed, **changes)
        directory = self._root / f"{full.name}-bare"
        return directory if directory.exists() else strip_weights(full, directory)
