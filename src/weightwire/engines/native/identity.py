"""What makes two replicas of the native runtime interchangeable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import weightwire
from weightwire.identity.config import config_digest
from weightwire.identity.identity import Identity
from weightwire.identity.layout import layout_id
from weightwire.runtime.config import KernelLayout, ModelConfig, read_json_object
from weightwire.runtime.distributed import TpGroup
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.moe import expert_map
from weightwire.runtime.mapping import WHOLE, Mapping, TpCoordinates
from weightwire.runtime.model_loader import parse_dtype
from weightwire.runtime.models.decoder import DecoderForCausalLM
from weightwire.runtime.models.registry import construct
from weightwire.types import Coordinates, Stage

ENGINE = "weightwire-native"


def native_identities(
    checkpoint_dir: Path,
    config: ModelConfig,
    *,
    model_id: str,
    revision: str | None,
    dtype: str,
    kernel_layout: KernelLayout,
    mapping: Mapping,
) -> dict[Stage, Identity]:
    """The identity at each stage, of a target model.

    Args:
        checkpoint_dir: has ``config.json``.
        config: as parsed from it, with layers for multi-token prediction where they are part of the model.
        model_id: the operator's.
        revision: the operator's label, or ``None``.
        dtype: name of the parameters' dtype.
        kernel_layout: decides the processed bytes.
        mapping: the rank's place.
    """
    raw = raw_config(checkpoint_dir)
    model = declared_model(config, dtype, kernel_layout, mapping)
    place = coordinates(mapping)

    def at(stage: Stage) -> Identity:
        protocol = model.processed_layout() if stage is Stage.PROCESSED else ""
        layout = layout_id(
            stage,
            kernel_backend=f"torch-{kernel_layout.value}",
            device_architecture="cpu",
            transform_protocol=protocol,
            raw_layouts=[model.raw_layout()],
        )
        return Identity(
            model_id=model_id,
            architecture=config.architecture,
            config_digest=config_digest(raw),
            dtype=dtype,
            engine=ENGINE,
            engine_version=weightwire.__version__,
            layout_id=layout,
            stage=stage,
            expert_map_digest=_expert_map_digest(config, mapping.ep_size),
            tp_size=place.tp_size,
            pp_size=place.pp_size,
            ep_size=place.ep_size,
            dp_size=place.dp_size,
            dp_decides_bytes=mapping.attention_dp,
            extra={"mtp_layers": str(config.mtp_layers)} if config.runs_mtp else {},
            revision=revision,
        )

    return {stage: at(stage) for stage in Stage}


def coordinates(mapping: Mapping) -> Coordinates:
    """Of a rank, as keys have them.

    Under attention data-parallel the ranks that share experts are data-parallel ranks, too, and these decide bytes:
    no replica that cuts tensors has such coordinates.
    """
    dp = mapping.tp if mapping.attention_dp else WHOLE
    return Coordinates(
        tp_rank=mapping.tp_rank,
        tp_size=mapping.tp_size,
        pp_rank=mapping.pp_rank,
        pp_size=mapping.pp_size,
        ep_rank=mapping.ep_rank,
        ep_size=mapping.ep_size,
        dp_rank=dp.rank,
        dp_size=dp.size,
    )


def raw_config(checkpoint_dir: Path) -> dict[str, Any]:
    """What ``config.json`` holds, which is what identities digest."""
    return read_json_object(checkpoint_dir / "config.json", "give a Hugging Face checkpoint directory")


def declared_model(
    config: ModelConfig, dtype: str, kernel_layout: KernelLayout, mapping: Mapping
) -> DecoderForCausalLM:
    """The rank's model on meta, for what its modules declare; it never runs."""
    ranks = TpGroup.offline(TpCoordinates(size=mapping.world_size, rank=mapping.rank))
    return construct(config, {}, LayerContext.of(ranks, mapping, parse_dtype(dtype), kernel_layout))


def _expert_map_digest(config: ModelConfig, ep_size: int) -> str:
    """Of which experts each expert-parallel rank holds; empty where there are none."""
    if config.moe is None:
        return ""
    return config_digest({str(rank): list(mine) for rank, mine in expert_map(config.moe.num_experts, ep_size).items()})
