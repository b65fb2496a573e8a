"""What makes two replicas of the native runtime interchangeable."""

from __future__ import annotations

from pathlib import Path

import weightwire
from weightwire.identity.config import config_digest
from weightwire.identity.identity import Identity
from weightwire.identity.layout import layout_id
from weightwire.runtime.config import KernelLayout, ModelConfig, read_json_object
from weightwire.runtime.distributed import TpGroup
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.model_loader import parse_dtype
from weightwire.runtime.models.registry import construct
from weightwire.types import Stage

ENGINE = "weightwire-native"


def native_identities(
    checkpoint_dir: Path,
    config: ModelConfig,
    *,
    model_id: str,
    revision: str | None,
    dtype: str,
    kernel_layout: KernelLayout,
    group: TpGroup,
) -> dict[Stage, Identity]:
    """The identity at each stage.

    Args:
        checkpoint_dir: has ``config.json``.
        config: as parsed from it.
        model_id: the operator's.
        revision: the operator's label, or ``None``.
        dtype: name of the parameters' dtype.
        kernel_layout: decides the processed bytes.
        group: the ranks.
    """
    raw = read_json_object(checkpoint_dir / "config.json", "give a Hugging Face checkpoint directory")
    model = construct(config, {}, LayerContext(group, parse_dtype(dtype), kernel_layout))

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
            tp_size=group.size,
            revision=revision,
        )

    return {stage: at(stage) for stage in Stage}
