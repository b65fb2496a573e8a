"""What all families are: a decoder with a residual stream, whose layers differ in attention, norms and MLP."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from weightwire.errors import CheckpointError
from weightwire.runtime import post_load
from weightwire.runtime.checkpoint.mapper import HfWeightMapper
from weightwire.runtime.checkpoint.protocol import Final, Progress, Weights
from weightwire.runtime.config import BuildFacts, ModelConfig
from weightwire.runtime.layers.attention import Attention, AttentionStep, SelfAttention
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.data_parallel import BatchShare
from weightwire.runtime.layers.embedding import Embedding, LMHead
from weightwire.runtime.layers.linear import LinearMethod
from weightwire.runtime.layers.method import WeightMethod
from weightwire.runtime.layers.mlp import GatedMLP
from weightwire.runtime.layers.norm import RMSNorm
from weightwire.runtime.layers.rotary import RotaryEmbedding
from weightwire.runtime.layers.shards import Loadable, final_names
from weightwire.runtime.mapping import effective_tp


class DecoderLayer(nn.Module):
    """One layer. It ends with the *next* layer's input norm, which ``setup_aliases`` of the model hands to it."""

    next_layer_layernorm: RMSNorm | None
    next_attn: nn.Module | None

    def __init__(self, context: LayerContext, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = self.norm(context, config)
        self.self_attn = self.attention(context.within("self_attn"), config, layer)
        self.post_attention_layernorm = self.norm(context, config)
        self.mlp = self.feed_forward(context.within("mlp"), config, layer)
        self.next_layer_layernorm = None
        self.next_attn = None

    def norm(self, context: LayerContext, config: ModelConfig) -> RMSNorm:
        """A norm of the hidden width."""
        return RMSNorm(context, config.hidden_size, config.rms_norm_eps)

    def attention(self, context: LayerContext, config: ModelConfig, layer: int) -> SelfAttention:
        """This layer's attention."""
        return Attention(context, config, layer)

    def feed_forward(self, context: LayerContext, config: ModelConfig, layer: int) -> nn.Module:  # noqa: ARG002 - others'
        """What comes after attention: (batch, length, hidden) to the same, summed over ranks."""
        sizes = (config.hidden_size, config.intermediate_size)
        return GatedMLP(context, *sizes, bias=config.mlp_bias, activation=config.activation)

    def advance(self, normed: torch.Tensor, residual: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """The normed input and the residual stream, to the residual stream after this layer."""
        residual = residual + self.self_attn(normed, step)
        summed: torch.Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return summed

    def forward(
        self, normed: torch.Tensor, residual: torch.Tensor, step: AttentionStep
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed input and the residual stream, to the same of the next layer."""
        if self.next_layer_layernorm is None:
            raise RuntimeError("the model's aliases are not wired; call post_load_weights() first")
        residual = self.advance(normed, residual, step)
        return self.next_layer_layernorm(residual), residual


def layer_context(context: LayerContext, layer: int) -> LayerContext:
    """That of the model, for one of its layers."""
    return context.within(f"model.layers.{layer}")


class DecoderModel(nn.Module):
    """Embedding, layers and the last norm; of a pipeline those modules that are this stage's, and no others.

    The embedding is the first stage's, and the last one's where the head is tied to it, or drafts are made there.
    """

    embed_tokens: Embedding
    norm: RMSNorm

    def __init__(self, context: LayerContext, config: ModelConfig, layer_class: type[DecoderLayer]) -> None:
        super().__init__()
        self.context = context
        self.place = context.mapping
        self.held = self.place.pp_layers(config.num_layers)
        if self.place.first_stage or (self.place.last_stage and (config.tie_word_embeddings or config.runs_mtp)):
            self.embed_tokens = Embedding(context, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(at): layer_class(layer_context(context, at), config, at) for at in self.held})
        if self.place.last_stage:
            self.norm = self.decoder_layers[0].norm(context, config)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim, config.max_position)
        self.hidden_size = config.hidden_size
        self.embedding_scale = config.hidden_size**0.5 if config.gemma else None

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers of this stage, typed."""
        found = (self.layers[str(layer)] for layer in self.held)
        return [layer for layer in found if isinstance(layer, DecoderLayer)]

    def names_elsewhere(self, config: ModelConfig) -> tuple[str, ...]:
        """Beginnings of names in a checkpoint that are other stages': these see to it that they are complete.

        And of layers for multi-token prediction that were not asked for.
        """
        layers = range(config.num_layers + config.mtp_layers)
        others = [f"model.layers.{layer}." for layer in layers if str(layer) not in self.layers]
        if not hasattr(self, "embed_tokens"):
            others.append("model.embed_tokens.")
        if not self.place.last_stage:
            others += ["model.norm.", "lm_head."]
        return tuple(others)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) tokens to the residual stream that the first layer begins with."""
        embedded: torch.Tensor = self.embed_tokens(tokens)
        # rounded as the checkpoint's trainers did: the scale has the dtype of the weight
        return embedded if self.embedding_scale is None else embedded * embedded.new_tensor(self.embedding_scale)

    def step(self, positions: torch.Tensor, seen: int, dtype: torch.dtype) -> AttentionStep:
        """What all layers need for tokens at ``positions`` of which each looks at every one up to its own."""
        cos, sin = self.rotary_emb(positions, dtype)
        cached = torch.arange(seen, device=positions.device)
        return AttentionStep(positions, cos, sin, (cached <= positions.unsqueeze(-1)).unsqueeze(1))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, seen: int) -> torch.Tensor:
        """(batch, length) tokens at their positions to (batch, length, hidden), normed.

        ``seen``: how much of the cache takes part; a token looks at every position up to its own. But for the last
        stage of a pipeline the result is zeros: what was computed goes to the next stage.
        """
        residual = self.embed(tokens) if self.place.first_stage else self._arriving(tokens)
        step = self.step(positions, seen, residual.dtype)
        *layers, last = self.decoder_layers
        normed: torch.Tensor = (layers or [last])[0].input_layernorm(residual)
        for layer in layers:
            normed, residual = layer(normed, residual, step)
        if self.place.last_stage:
            normed, _ = last(normed, residual, step)
            return normed
        assert self.context.pipeline is not None
        self.context.pipeline.send(last.advance(normed, residual, step), self.place.pp_rank + 1)
        return torch.zeros_like(residual)

    def _arriving(self, tokens: torch.Tensor) -> torch.Tensor:
        """The residual stream as the stage before leaves it."""
        assert self.context.pipeline is not None
        into = torch.empty(*tokens.shape, self.hidden_size, dtype=self.context.dtype, device=tokens.device)
        return self.context.pipeline.receive(into, self.place.pp_rank - 1)


class DecoderForCausalLM(nn.Module):
    """One rank's part of a language model; families are subclasses.

    Constructed with uninitialised parameters, normally on meta. Names of parameters are those of construction until
    ``setup_aliases`` gives some of them a second, earlier path.
    """

    family = ""
    layer_class: type[DecoderLayer] = DecoderLayer
    lm_head: LMHead

    def __init__(self, config: ModelConfig, context: LayerContext, build_facts: BuildFacts | None = None) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.build_facts: BuildFacts = build_facts or {}
        self.model = DecoderModel(context, config, self.layer_class)
        self.share = BatchShare(context.experts_group)
        if context.mapping.last_stage:
            cap = config.gemma.final_softcap if config.gemma else None
            self.lm_head = LMHead(context, config.vocab_size, config.hidden_size, cap=cap)
            if config.tie_word_embeddings:
                self.lm_head.tie(self.model.embed_tokens)
        self.extend()
        self._loadable = [(name, module) for name, module in self.named_modules() if isinstance(module, Loadable)]

    def extend(self) -> None:
        """Add what a family has besides."""

    def raw_layout(self) -> str:
        """Declares that bytes of the LOADED stage do not depend on the kernel layout or the device. Versioned."""
        names = dict.fromkeys(method.name for method in self._methods)
        versions = dict.fromkeys(method.raw_version for method in self._methods)
        return f"{self.family}/{'+'.join(names)}/{'+'.join(versions)}"

    def processed_layout(self) -> str:
        """Names the layout of the PROCESSED stage: kernel layout and version of its transforms."""
        protocols = dict.fromkeys(method.transform_protocol for method in self._methods)
        return f"{self.raw_layout()}+{self.context.layout.value}/{'+'.join(protocols)}"

    @property
    def _methods(self) -> list[WeightMethod[Any]]:
        """One of each that layers have: of the whole model, whatever a stage of it holds."""
        make, config = self.context.methods, self.config
        if make is None:
            return [LinearMethod()]
        return make.kinds(experts=bool(config.moe), latent=bool(config.mla), partly=config.partly_quantized)

    def loadable_layers(self) -> Iterator[tuple[str, Loadable]]:
        """Every layer that a checkpoint fills, under its construction-time name, whatever aliases there are."""
        tied = self.config.tie_word_embeddings
        yield from ((name, layer) for name, layer in self._loadable if not (tied and name == "lm_head"))

    def weight_mapper(self) -> HfWeightMapper:
        """Checkpoint names of this model."""
        head = ("lm_head.weight",) if self.config.tie_word_embeddings else ()
        shared = [f"{name}.weight" for name in self.shared_names()]
        return HfWeightMapper([*head, *shared], unused=self.model.names_elsewhere(self.config))

    def shared_names(self) -> list[str]:
        """Checkpoint modules that are copies of others, by the layers for multi-token prediction that have them."""
        first, count = self.config.num_layers, self.config.mtp_layers if self.config.runs_mtp else 0
        layers = [f"model.layers.{first + at}" for at in range(count)]
        return [f"{layer}.{leaf}" for layer in layers for leaf in ("embed_tokens", "shared_head.head")]

    @torch.no_grad()
    def load_weights(self, weights: Weights, progress: Progress | None = None, final: Final | None = None) -> None:
        """Fill every parameter with this rank's part of ``weights``, in the raw layout.

        Whether the tensors were cut before is ``weights.presharded`` and holds for this one call. Parameters must be
        in their raw shapes (``post_load.prepare_raw`` on a transformed model). ``final`` is told of each layer's
        parameters once all their parts (q, k and v; gate and up) are in place.

        Raises:
            CheckpointError: names missing or left over (before the first byte), or a wrong shape or dtype. After the
                first byte, the model is not fit for use.
        """
        mapper = self.weight_mapper()
        targets = mapper.targets(self.loadable_layers())
        mapper.check_names(targets, weights.tensors)
        total, done = sum(tensor.nbytes for tensor in self.parameters()), 0
        # Loading may create, remove and replace parameters: what counts is what is there, under whichever name (ties).
        written: dict[int, torch.Tensor] = {}  # holding on to them, so that no other tensor gets their number
        names: set[str] = set()
        for number, target in enumerate(targets, 1):
            # routed experts may be shared by other ranks than the rest is
            context = getattr(target.layer, "context", self.context)
            tp = effective_tp(context.tp, presharded=weights.presharded)
            leaves = target.layer.load_weights(mapper.parts(target, weights.tensors), tp)
            filled = [target.layer.get_parameter(leaf) for leaf in leaves]
            written.update((id(tensor), tensor) for tensor in filled)
            names.update(f"{target.name}.{leaf}" for leaf in leaves)
            done = total if number == len(targets) else min(done + sum(tensor.nbytes for tensor in filled), total)
            if final is not None:
                final([f"{target.name}.{leaf}" for leaf in final_names(target.layer, leaves)])
            if progress is not None:
                progress(done, total)
        for name, tensor in self.named_parameters():
            if id(tensor) not in written and name not in names:
                raise CheckpointError(
                    f"parameter {name} was not filled", "this is a fault of the model's weight mapping"
                )

    def setup_aliases(self) -> None:
        """Hand every layer its successor's input norm and attention. References only; idempotent; legal on meta."""
        layers = self.model.decoder_layers
        for layer, following in pairwise(layers):
            layer.next_layer_layernorm = following.input_layernorm
            layer.next_attn = following.self_attn
        if self.context.mapping.last_stage:
            layers[-1].next_layer_layernorm = self.model.norm

    def post_load_weights(self) -> None:
        """All stages in order, over all modules: aliases, transforms, derived state."""
        post_load.post_load_weights(self)

    def cached_layers(self) -> list[DecoderLayer]:
        """Those that look back at earlier tokens."""
        return self.model.decoder_layers

    def allocate_cache(self, batch: int, length: int) -> None:
        """Room for ``length`` tokens of ``batch`` sequences in every layer."""
        for layer in self.cached_layers():
            layer.self_attn.allocate_cache(self.share.rows(batch), length, self.device)

    def release_cache(self) -> None:
        """Drop every layer's cache."""
        for layer in self.cached_layers():
            layer.self_attn.release_cache()

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, seen: int) -> torch.Tensor:
        """(batch, length) tokens at their positions to hidden states (batch, length, hidden), same on every rank.

        But for the last stage of a pipeline they are zeros.
        """
        hidden: torch.Tensor = self.model(self.share.mine(tokens), self.share.mine(positions), seen)
        return self.share.whole(hidden, tokens.shape[0])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, hidden) of the last stage to logits (batch, vocab), on every rank of every stage."""
        if self.context.mapping.last_stage:
            return self.from_last(self.lm_head.gather(self.lm_head(hidden)))
        return self.from_last(hidden.new_empty(hidden.shape[0], self.config.vocab_size))

    def greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, hidden) of the last stage to the token with the highest logit, (batch), everywhere."""
        if self.context.mapping.last_stage:
            return self.from_last(self.lm_head.greedy(self.lm_head(hidden)))
        return self.from_last(torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device))

    def from_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """The last stage's ``tensor``, on every stage."""
        pipeline = self.context.pipeline
        return tensor if pipeline is None else pipeline.broadcast(tensor.contiguous(), pipeline.size - 1)
