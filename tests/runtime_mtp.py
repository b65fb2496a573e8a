"""A DeepSeek-V3 checkpoint with a layer for multi-token prediction, and what that is to draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from runtime_families import COMMON, PROMPTS, reference
from safetensors.torch import load_file, save_file


def write_mtp(directory: Path, seed: int = 0) -> Path:
    """``deepseek_v3`` with one layer for multi-token prediction, named as DeepSeek names it, with its copies.

    Its block is that of transformers' model with one layer more.
    """
    _with_mtp(seed).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    generator, layer = torch.Generator().manual_seed(seed + 1), f"model.layers.{COMMON['num_hidden_layers']}"
    hidden = COMMON["hidden_size"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{layer}.{name}.weight"] = 1 + torch.randn(hidden, generator=generator) * 0.3
    tensors[f"{layer}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * 0.3
    tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": COMMON["num_hidden_layers"], "num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _with_mtp(seed: int) -> Any:
    return reference("deepseek_v3", seed, changes={"num_hidden_layers": COMMON["num_hidden_layers"] + 1})


@torch.no_grad()
def expected_mtp(directory: Path, seed: int = 0) -> torch.Tensor:
    """Logits of the token behind the next one, (prompts, vocab), from the tensors in ``directory``.

    transformers computes the layers, their arguments are put together here: the normed embedding of the token that
    follows beside the normed hidden state, through one matrix, the block, a norm and the checkpoint's copy of the head.
    """
    tensors, layers = load_file(directory / "model.safetensors"), COMMON["num_hidden_layers"]
    own = {name: tensors[f"model.layers.{layers}.{name}.weight"] for name in ("enorm", "hnorm", "eh_proj")}
    copies = {name: tensors[f"model.layers.{layers}.{name}.weight"] for name in ("embed_tokens", "shared_head.head")}
    model, found = _with_mtp(seed), []
    model.model.config.num_hidden_layers = layers  # the last one is not run
    for prompt in PROMPTS:
        hidden = model.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
        following = [*prompt[1:], int(model.lm_head(hidden[-1]).argmax())]
        embedded = copies["embed_tokens"][torch.tensor(following)]
        joined = torch.cat((_rms(embedded) * own["enorm"], _rms(hidden) * own["hnorm"]), dim=-1) @ own["eh_proj"].T
        drafted = _block(model, layers, joined)
        normed = _rms(drafted[-1]) * tensors[f"model.layers.{layers}.shared_head.norm.weight"]
        found.append(normed @ copies["shared_head.head"].T)
    return torch.stack(found)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _block(model: Any, layer: int, x: torch.Tensor) -> torch.Tensor:
    """(length, hidden) through one layer, causally."""
    length = x.shape[0]
    places = torch.arange(length).unsqueeze(0)
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    angles = model.model.rotary_emb(x.unsqueeze(0), places)
    out = model.model.layers[layer](
        x.unsqueeze(0), attention_mask=mask, position_ids=places, position_embeddings=angles
    )
    block: torch.Tensor = (out[0] if isinstance(out, tuple) else out)[0]
    return block
