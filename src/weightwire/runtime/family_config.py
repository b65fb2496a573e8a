"""What a model family adds to the common configuration: small frozen records, and how each is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weightwire.errors import ConfigError
from weightwire.runtime.config_fields import Fields


@dataclass(frozen=True)
class MoeConfig:
    """Routed experts. Sizes are those of the whole model.

    Attributes:
        num_experts: routed ones.
        experts_per_token: that each token goes to.
        intermediate_size: inner width of one expert.
        scoring: how router logits become scores; ``sigmoid`` comes with a correction bias for the choice.
        normalize: whether a token's weights are made to sum to one.
        scaling: of the weights, after that.
        groups: experts are chosen within ``groups_per_token`` of so many groups.
        groups_per_token: as above.
        shared_experts: every token goes through these, as one MLP of their summed width.
        dense_layers: layers that have an ordinary MLP instead.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid"]
    normalize: bool
    scaling: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    shared_experts: int = 0
    dense_layers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention. ``q_lora_rank`` is ``None`` where queries are projected in one step."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleaved: bool = True

    @property
    def qk_head_dim(self) -> int:
        """Width of one head of queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class GemmaConfig:
    """Gemma 2: attention's own scale, caps on logits, and a window on every other layer (the even ones)."""

    query_pre_attn_scalar: float
    attn_softcap: float | None
    final_softcap: float | None
    sliding_window: int


def no_family(_fields: Fields) -> dict[str, Any]:
    """Nothing beyond what all share."""
    return {}


def _qwen3(fields: Fields) -> dict[str, Any]:
    if fields.flag("use_sliding_window"):
        raise ConfigError(f"{fields.path}: sliding windows are not supported here", "this runtime looks at everything")
    return {"qk_norm": True, "head_dim": fields.whole("head_dim", 128)}


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    step, dense = fields.whole("decoder_sparse_step", 1), set(fields.layers("mlp_only_layers"))
    layers = range(fields.whole("num_hidden_layers"))
    moe = MoeConfig(
        # files of transformers 5 have the second name
        num_experts=fields.whole("num_local_experts" if fields.get("num_experts") is None else "num_experts"),
        experts_per_token=fields.whole("num_experts_per_tok"),
        intermediate_size=fields.whole("moe_intermediate_size"),
        scoring="softmax",
        normalize=fields.flag("norm_topk_prob"),
        dense_layers=frozenset(layer for layer in layers if layer in dense or (layer + 1) % step),
    )
    return {**_qwen3(fields), "moe": _checked(moe, fields)}


def _deepseek_v3(fields: Fields) -> dict[str, Any]:
    if fields.get("scoring_func") not in (None, "sigmoid") or fields.whole("moe_layer_freq", 1) != 1:
        raise ConfigError(f"{fields.path}: another routing than DeepSeek-V3's", "this runtime computes that one only")
    moe = MoeConfig(
        num_experts=fields.whole("n_routed_experts"),
        experts_per_token=fields.whole("num_experts_per_tok"),
        intermediate_size=fields.whole("moe_intermediate_size"),
        scoring="sigmoid",
        normalize=fields.flag("norm_topk_prob", default=True),
        scaling=fields.number("routed_scaling_factor", 1.0),
        groups=fields.whole("n_group", 1),
        groups_per_token=fields.whole("topk_group", 1),
        shared_experts=fields.whole("n_shared_experts", 0, least=0),
        dense_layers=frozenset(range(fields.whole("first_k_dense_replace", 0, least=0))),
    )
    mla = MlaConfig(
        q_lora_rank=None if fields.get("q_lora_rank") is None else fields.whole("q_lora_rank"),
        kv_lora_rank=fields.whole("kv_lora_rank"),
        qk_nope_head_dim=fields.whole("qk_nope_head_dim"),
        qk_rope_head_dim=fields.whole("qk_rope_head_dim"),
        v_head_dim=fields.whole("v_head_dim"),
        rope_interleaved=fields.flag("rope_interleave", default=True),
    )
    return {
        "moe": _checked(moe, fields),
        "mla": mla,
        "head_dim": mla.qk_rope_head_dim,
        "mtp_layers": fields.whole("num_nextn_predict_layers", 0, least=0),
    }


def _gemma2(fields: Fields) -> dict[str, Any]:
    def cap(field: str) -> float | None:
        return None if fields.get(field) is None else fields.number(field)

    kinds = fields.get("layer_types")
    usual = ["full_attention" if at % 2 else "sliding_attention" for at in range(fields.whole("num_hidden_layers"))]
    if kinds is not None and kinds != usual:
        raise ConfigError(f"{fields.path}: other layer_types than Gemma 2's", "this runtime slides on even layers only")
    gemma = GemmaConfig(
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", 256),
        attn_softcap=cap("attn_logit_softcapping"),
        final_softcap=cap("final_logit_softcapping"),
        sliding_window=fields.whole("sliding_window", 4096),
    )
    return {
        "gemma": gemma,
        "head_dim": fields.whole("head_dim", 256),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", default=True),
    }


def _checked(moe: MoeConfig, fields: Fields) -> MoeConfig:
    per_group, rest = divmod(moe.num_experts, moe.groups)
    if rest or moe.groups_per_token > moe.groups or moe.experts_per_token > moe.groups_per_token * per_group:
        raise fields.fail("num_experts_per_tok", "does not fit the number of experts and their groups")
    if moe.scoring == "sigmoid" and per_group < 2:
        raise fields.fail("n_group", "leaves fewer than two experts to a group")
    return moe


FAMILIES: Mapping[str, Callable[[Fields], dict[str, Any]]] = {
    "LlamaForCausalLM": no_family,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "Gemma2ForCausalLM": _gemma2,
}
"""Architecture to what it adds to, or says otherwise than, the fields of ``ModelConfig`` that all families share."""
