"""DeepSeek-V3, and Kimi-K2 which has its shape: latent attention, shared and routed experts, multi-token prediction."""

from __future__ import annotations

import torch

from weightwire.errors import CheckpointError
from weightwire.runtime.checkpoint.protocol import Final, Progress, Weights
from weightwire.runtime.layers.embedding import VocabParallel
from weightwire.runtime.mapping import effective_tp
from weightwire.runtime.models.decoder import DecoderForCausalLM, DecoderLayer, layer_context
from weightwire.runtime.models.deepseek_layer import DeepseekV3DecoderLayer
from weightwire.runtime.models.mtp import MtpLayer


class DeepseekV3ForCausalLM(DecoderForCausalLM):
    """A DeepSeek-V3 language model; its layers for multi-token prediction, on the last stage, where they are asked for.

    These are ``model.layers.N`` and on, with ``N`` the number of the others.
    """

    family = "deepseek-v3"
    layer_class = DeepseekV3DecoderLayer

    def extend(self) -> None:
        """The layers for multi-token prediction."""
        config = self.config
        if config.runs_mtp and self.context.mapping.last_stage:
            for layer in range(config.num_layers, config.num_layers + config.mtp_layers):
                self.model.layers[str(layer)] = MtpLayer(layer_context(self.context, layer), config, layer)

    @property
    def mtp_layers(self) -> list[MtpLayer]:
        """Those of this stage, by depth."""
        return [layer for layer in self.model.layers.values() if isinstance(layer, MtpLayer)]

    def cached_layers(self) -> list[DecoderLayer]:
        """Those for multi-token prediction look back, too."""
        return [*super().cached_layers(), *self.mtp_layers]

    def setup_aliases(self) -> None:
        """Layers for multi-token prediction have the model's embedding and head."""
        super().setup_aliases()
        for layer in self.mtp_layers:
            layer.share(self.model.embed_tokens, self.lm_head)

    def load_weights(self, weights: Weights, progress: Progress | None = None, final: Final | None = None) -> None:
        """As in ``DecoderForCausalLM``; copies that the checkpoint has of what is shared must be equal to it."""
        super().load_weights(weights, progress, final)
        if not self.mtp_layers:
            return
        shared: dict[str, VocabParallel] = {"embed_tokens": self.model.embed_tokens, "shared_head.head": self.lm_head}
        tp = effective_tp(self.context.tp, presharded=weights.presharded)
        for name in self.shared_names():
            copy, own = weights.tensors.get(f"{name}.weight"), shared[name.split(".", 3)[3]]
            if copy is not None and not own.holds(copy, tp):
                raise CheckpointError(
                    f"{copy.origin}: tensor {copy.name} is not the model's own, which would be used in its place",
                    "load the model without its layers for multi-token prediction",
                )

    def draft(self, depth: int, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states (batch, length, hidden) of the last stage to those of prediction ``depth``, from 0 on.

        ``tokens`` (batch, length): what follows all that ``hidden`` has seen at each of ``positions``, which are all
        from 0 on. Elsewhere than on the last stage ``hidden`` is returned.
        """
        if not self.context.mapping.last_stage:
            return hidden
        mine = self.share.mine(positions)
        step = self.model.step(mine, positions.shape[1], hidden.dtype)
        drafted = self.mtp_layers[depth].draft(self.share.mine(tokens), self.share.mine(hidden), step)
        return self.share.whole(drafted, tokens.shape[0])

    def draft_logits(self, depth: int, hidden: torch.Tensor) -> torch.Tensor:
        """What ``draft`` gave, (batch, hidden), to logits (batch, vocab), on every rank of every stage."""
        if self.context.mapping.last_stage:
            return self.from_last(self.mtp_layers[depth].logits(hidden))
        return self.from_last(hidden.new_empty(hidden.shape[0], self.config.vocab_size))
