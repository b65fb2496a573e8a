"""A module with the shape and the names of one tensor-parallel rank of a Llama, filled with random weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import gpu_quantized
import torch
from gpu_quantized import Quantized
from torch import nn
from torch.nn import functional

HEAD = 128


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    layers: int


SHAPES = {
    "tiny": Shape(hidden=256, heads=2, kv_heads=1, intermediate=512, vocab=512, layers=3),
    "3GB": Shape(hidden=4096, heads=16, kv_heads=4, intermediate=7168, vocab=64128, layers=8),
    "8GB": Shape(hidden=4096, heads=16, kv_heads=4, intermediate=7168, vocab=64128, layers=32),
    "30GB": Shape(hidden=8192, heads=64, kv_heads=8, intermediate=14336, vocab=64128, layers=28),
}
"""8GB: a rank of Llama-3-8B at TP=2. 30GB: about a rank of Llama-3-70B at TP=4, in fewer layers with larger tensors."""


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, inner, kv = shape.hidden, shape.heads * HEAD, shape.kv_heads * HEAD
        self.input_layernorm = nn.RMSNorm(hidden)
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(inner, hidden, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(hidden)
        self.gate_proj = nn.Linear(hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        normed = self.input_layernorm(x)
        q, k, v = (
            linear(normed).view(len(x), -1, HEAD).transpose(0, 1) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _turned(q, turn), _turned(k, turn)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(0, 1).reshape(len(x), -1))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(normed)) * self.up_proj(normed))


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, dim=-1)
    cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


class Llama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.register_buffer("inv_freq", torch.zeros(HEAD // 2, dtype=torch.float32), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        turn = torch.arange(len(tokens), device=tokens.device)[:, None] * self.inv_freq
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, turn)
        return self.lm_head(self.norm(x))


Model = Llama | Quantized


def build(shape: str, device: str) -> Model:
    """Materialised and uninitialised, as an engine has it before it loads; ``quantized`` is a shape of its own."""
    if shape == "quantized":
        return Quantized().to_empty(device=device).eval()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Llama(SHAPES[shape])
    finally:
        torch.set_default_dtype(before)
    return model.to_empty(device=device).eval()


@torch.no_grad()
def fill(model: Model, seed: int) -> None:
    """Random weights, and the buffer that construction would compute."""
    if isinstance(model, Quantized):
        gpu_quantized.fill(model, seed)
        return
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    steps = torch.arange(HEAD // 2, device=model.inv_freq.device) / (HEAD // 2)
    model.inv_freq.copy_(500_000.0**-steps)


@torch.no_grad()
def poison(model: Model) -> None:
    """Nothing that is there may pass for something that arrived."""
    for tensor in (*model.parameters(), *model.buffers()):
        gpu_quantized.raw(tensor).fill_(0xA5)


@torch.no_grad()
def tokens(model: Model, count: int = 4) -> dict[str, object]:
    """Greedy tokens after a fixed prompt, and a digest of the last logits."""
    if isinstance(model, Quantized):
        return gpu_quantized.tokens(model)
    vocab, device = model.embed_tokens.num_embeddings, model.inv_freq.device
    found = [(at * 7919 + 13) % vocab for at in range(16)]
    for _ in range(count):
        logits = model(torch.tensor(found, device=device))[-1].float()
        found.append(int(logits.argmax()))
    digest = hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest()[:16]
    return {"tokens": found[-count:], "logits": digest, "finite": bool(logits.isfinite().all())}
