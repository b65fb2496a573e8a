"""Llama: decoder-only transformers with rotary embedding, RMS norm, grouped-query attention and a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from weightwire.errors import CheckpointError
from weightwire.runtime import post_load
from weightwire.runtime.checkpoint.mapper import HfWeightMapper
from weightwire.runtime.checkpoint.protocol import Progress, Weights
from weightwire.runtime.config import BuildFacts, ModelConfig
from weightwire.runtime.layers.attention import Attention, AttentionStep
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.embedding import Embedding, LMHead
from weightwire.runtime.layers.linear import Linear, OutPart, TensorParallelMode
from weightwire.runtime.layers.norm import RMSNorm
from weightwire.runtime.layers.packing import GateUpLinear
from weightwire.runtime.layers.rotary import RotaryEmbedding
from weightwire.runtime.layers.shards import Loadable
from weightwire.runtime.mapping import effective_tp


class LlamaMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = GateUpLinear(context, hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(context, inner, [OutPart(hidden)], mode=TensorParallelMode.ROW, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) to the same, summed over ranks."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        summed: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return summed


class LlamaDecoderLayer(nn.Module):
    """One layer. It ends with the *next* layer's input norm, which ``setup_aliases`` of the model hands to it."""

    next_layer_layernorm: RMSNorm | None
    next_attn: Attention | None

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(context, config)
        self.post_attention_layernorm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(context, config)
        self.next_layer_layernorm = None
        self.next_attn = None

    def forward(
        self, normed: torch.Tensor, residual: torch.Tensor, step: AttentionStep
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed input and the residual stream, to the same of the next layer."""
        if self.next_layer_layernorm is None:
            raise RuntimeError("the model's aliases are not wired; call post_load_weights() first")
        residual = residual + self.self_attn(normed, step)
        residual = residual + self.mlp(self.post_attention_layernorm(residual))
        return self.next_layer_layernorm(residual), residual


class LlamaModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, context: LayerContext, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(context, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(context, config) for _ in range(config.num_layers))
        self.norm = RMSNorm(context, config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim, config.max_position)

    @property
    def decoder_layers(self) -> list[LlamaDecoderLayer]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, LlamaDecoderLayer)]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, seen: int) -> torch.Tensor:
        """(batch, length) tokens at their positions to (batch, length, hidden), normed.

        ``seen``: how much of the cache takes part; a token looks at every position up to its own.
        """
        residual = self.embed_tokens(tokens)
        cos, sin = self.rotary_emb(positions, residual.dtype)
        cached = torch.arange(seen, device=tokens.device)
        mask = (cached <= positions.unsqueeze(-1)).unsqueeze(1)
        step = AttentionStep(positions, cos, sin, mask)
        normed: torch.Tensor = self.layers[0].input_layernorm(residual)  # type: ignore[operator]
        for layer in self.layers:
            normed, residual = layer(normed, residual, step)
        return normed


class LlamaForCausalLM(nn.Module):
    """One rank's part of a Llama language model.

    Constructed with uninitialised parameters, normally on meta. Names of parameters are those of construction until
    ``setup_aliases`` gives some of them a second, earlier path.
    """

    def __init__(self, config: ModelConfig, context: LayerContext, build_facts: BuildFacts | None = None) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.build_facts: BuildFacts = build_facts or {}
        self.model = LlamaModel(context, config)
        self.lm_head = LMHead(context, config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens)

    def raw_layout(self) -> str:
        """Declares that bytes of the LOADED stage do not depend on the kernel layout or the device. Versioned."""
        return "llama/unquantized/v1"

    def processed_layout(self) -> str:
        """Names the layout of the PROCESSED stage: kernel layout and version of its transforms."""
        return f"{self.raw_layout()}+{self.context.layout.value}/v1"

    def loadable_layers(self) -> Iterator[tuple[str, Loadable]]:
        """Every layer that a checkpoint fills, under its construction-time name, whatever aliases there are."""
        yield "model.embed_tokens", self.model.embed_tokens
        for index, layer in enumerate(self.model.decoder_layers):
            prefix = f"model.layers.{index}"
            yield f"{prefix}.input_layernorm", layer.input_layernorm
            yield f"{prefix}.self_attn.qkv_proj", layer.self_attn.qkv_proj
            yield f"{prefix}.self_attn.o_proj", layer.self_attn.o_proj
            yield f"{prefix}.post_attention_layernorm", layer.post_attention_layernorm
            yield f"{prefix}.mlp.gate_up_proj", layer.mlp.gate_up_proj
            yield f"{prefix}.mlp.down_proj", layer.mlp.down_proj
        yield "model.norm", self.model.norm
        if not self.config.tie_word_embeddings:
            yield "lm_head", self.lm_head

    def weight_mapper(self) -> HfWeightMapper:
        """Checkpoint names of this model."""
        return HfWeightMapper(optional=("lm_head.weight",) if self.config.tie_word_embeddings else ())

    @torch.no_grad()
    def load_weights(self, weights: Weights, progress: Progress | None = None) -> None:
        """Fill every parameter with this rank's part of ``weights``, in the raw layout.

        Whether the tensors were cut before is ``weights.presharded`` and holds for this one call. Parameters must be
        in their raw shapes (``post_load.prepare_raw`` on a transformed model).

        Raises:
            CheckpointError: names missing or left over (before the first byte), or a wrong shape or dtype. After the
                first byte, the model is not fit for use.
        """
        mapper = self.weight_mapper()
        targets = mapper.targets(self.loadable_layers())
        mapper.check_names(targets, weights.tensors)
        tp = effective_tp(self.context.tp, presharded=weights.presharded)
        unwritten = {id(tensor): (name, tensor.nbytes) for name, tensor in self.named_parameters()}
        total, done = sum(nbytes for _, nbytes in unwritten.values()), 0
        for target in targets:
            written = target.layer.load_weights(mapper.parts(target, weights.tensors), tp)
            for leaf in written:
                done += unwritten.pop(id(getattr(target.layer, leaf)))[1]
            if progress is not None:
                progress(done, total)
        for name, _ in unwritten.values():
            raise CheckpointError(f"parameter {name} was not filled", "this is a fault of the model's weight mapping")

    def setup_aliases(self) -> None:
        """Hand every layer its successor's input norm and attention. References only; idempotent; legal on meta."""
        layers = self.model.decoder_layers
        for layer, following in pairwise(layers):
            layer.next_layer_layernorm = following.input_layernorm
            layer.next_attn = following.self_attn
        layers[-1].next_layer_layernorm = self.model.norm

    def post_load_weights(self) -> None:
        """All stages in order, over all modules: aliases, transforms, derived state."""
        post_load.post_load_weights(self)

    def allocate_cache(self, batch: int, length: int) -> None:
        """Room for ``length`` tokens of ``batch`` sequences in every layer."""
        device = self.model.embed_tokens.weight.device
        for layer in self.model.decoder_layers:
            layer.self_attn.allocate_cache(batch, length, device)

    def release_cache(self) -> None:
        """Drop every layer's cache."""
        for layer in self.model.decoder_layers:
            layer.self_attn.release_cache()

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, seen: int) -> torch.Tensor:
        """(batch, length) tokens at their positions to hidden states (batch, length, hidden), same on every rank."""
        hidden: torch.Tensor = self.model(tokens, positions, seen)
        return hidden
