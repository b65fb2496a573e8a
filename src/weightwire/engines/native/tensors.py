"""Another program's tensors for this runtime: what they are published as, and how much of them may come."""

from __future__ import annotations

from pathlib import Path

from weightwire.config import Settings
from weightwire.engines.native.identity import coordinates, declared_model, raw_config
from weightwire.engines.native.options import ReplicaOptions
from weightwire.identity.identity import Identity, module_identity
from weightwire.loaders.member import Member
from weightwire.loaders.peer_tensors import PeerTensors
from weightwire.metadata.decision import Group
from weightwire.observability.progress import Progress
from weightwire.runtime.checkpoint.safetensors_loader import SafetensorsLoader, has_weights
from weightwire.runtime.config import KernelLayout, ModelConfig
from weightwire.runtime.mapping import Mapping
from weightwire.runtime.model_loader import parse_dtype
from weightwire.target.offer import Want
from weightwire.target.receiver import Receiver

_SLACK = 1 << 20
"""Bytes of scales that a loaded model has fused into fewer."""


def peer_tensors(
    options: ReplicaOptions, settings: Settings, member: Member, group: Group, mapping: Mapping, progress: Progress
) -> PeerTensors:
    """The rung of the ladder that ``options.tensors_of`` names, for the rank at ``mapping``.

    Args:
        options: of the model.
        settings: of this process.
        member: this process in the fleet.
        group: the ranks, at an epoch for this alone.
        mapping: the rank's place.
        progress: see ``observability.progress``.
    """
    directory = Path(options.model)

    def receiver(config: ModelConfig) -> Receiver:
        identity = tensors_identity(options, config, mapping)
        want = Want(
            stages={identity.stage: identity},
            coordinates=coordinates(mapping),
            latest=options.latest,
            accept_unpinned=settings.accept_unpinned,
            has_disk=has_weights(directory),
        )
        return Receiver(reader=member.reader, want=want, group=group, progress=progress)

    return PeerTensors(
        who=f"tensors of {options.tensors_of}",
        dtype=parse_dtype(options.dtype),
        files=SafetensorsLoader(),
        receive=receiver,
        max_nbytes=lambda config: tensors_bound(config, options.dtype, mapping),
        group=group.at("place"),
        vote_s=settings.load_timeout + group.vote_s,
    )


def tensors_identity(options: ReplicaOptions, config: ModelConfig, mapping: Mapping) -> Identity:
    """As what a program of another kind publishes each rank's tensors, under Hugging Face's names (docs/tensors.md)."""
    place = coordinates(mapping)
    return module_identity(
        options.model_id,
        config.architecture,
        options.dtype,
        raw_config(Path(options.model)),
        revision=options.revision,
        engine=options.tensors_of,
        tp_size=place.tp_size,
        pp_size=place.pp_size,
        ep_size=place.ep_size,
        dp_size=place.dp_size,
        dp_decides_bytes=mapping.attention_dp,
    )


def tensors_bound(config: ModelConfig, dtype: str, mapping: Mapping) -> int:
    """Bytes that this rank's part of a checkpoint of that config cannot exceed.

    Twice its parameters: a checkpoint may have copies of an embedding, and layers that are not asked for.
    """
    model = declared_model(config, dtype, KernelLayout.PLAIN, mapping)
    return 2 * sum(tensor.nbytes for tensor in model.parameters()) + _SLACK
