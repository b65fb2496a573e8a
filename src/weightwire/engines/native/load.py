"""One model of a replica at one rank, target or draft: announced, found, filled, published."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from weightwire.config import ReplicaRole, Settings
from weightwire.engines.native.events import emit
from weightwire.engines.native.hooks import PublishingHooks
from weightwire.engines.native.identity import coordinates, native_identities
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.support import Row, parallel, quantized_as, refusal, row_of
from weightwire.engines.native.tensors import peer_tensors
from weightwire.errors import NoSourceError
from weightwire.identity.identity import Identity
from weightwire.loaders.announced import Announced
from weightwire.loaders.live import LiveCheckpointLoader
from weightwire.loaders.member import Member
from weightwire.loaders.peer_tensors import PeerTensors
from weightwire.loaders.relay import PublicationRelay
from weightwire.manifest.records import Manifest
from weightwire.metadata.decision import Group
from weightwire.observability.progress import Progress
from weightwire.runtime.checkpoint.safetensors_loader import SafetensorsLoader, has_weights
from weightwire.runtime.config import KernelLayout, ModelConfig, read_config
from weightwire.runtime.distributed import TpGroup
from weightwire.runtime.load_format import LoadFormat
from weightwire.runtime.mapping import Mapping as RankMapping
from weightwire.runtime.model_loader import LoaderSettings, LoadResult, ModelLoader, parse_dtype
from weightwire.runtime.models.decoder import DecoderForCausalLM
from weightwire.source.described import Claim
from weightwire.source.publication import RELAY_DRAIN_S, Publication
from weightwire.target.offer import Offer, Want
from weightwire.target.receiver import Receiver
from weightwire.types import Coordinates, Json, Role, Stage

log = logging.getLogger(__name__)

PROGRESS_S = 0.1
"""Between two progress events of one phase."""


class Load:
    """Use once: ``announce`` where ``run`` comes later, ``run``, ``close``.

    Args:
        options: of this model: a draft has ``ReplicaOptions.of_draft``.
        settings: of this process.
        world: all ranks of the replica.
        group: these, for decisions; its epoch is this model's alone.
        member: this process in the fleet; ``None`` where it stays alone.
        role: target or draft.

    Attributes:
        follows: why peers are not asked: the target's weights did not come from one (hazard H37). Empty if they may be.
    """

    def __init__(
        self,
        options: ReplicaOptions,
        settings: Settings,
        world: TpGroup,
        group: Group,
        member: Member | None,
        *,
        role: Role = Role.TARGET,
    ) -> None:
        self.options, self.settings, self.world, self.group = options, settings, world, group
        self.member, self.role, self.follows = member, role, ""
        self.format = LoadFormat.parse(options.load_format)
        self.replica_role = replica_role(self.format, settings)
        self.loader_settings = LoaderSettings(
            load_format=self.format,
            dtype=parse_dtype(options.dtype),
            kernel_layout=KernelLayout.parse(options.kernel_layout),
            ep_size=options.ep,
            pp_size=options.pp,
            attention_dp=options.attention_dp,
            mtp=options.mtp,
        )
        self.mapping = RankMapping.of_rank(
            world.rank, world.size, pp_size=options.pp, ep_size=options.ep, attention_dp=options.attention_dp
        )
        self.identities: Mapping[Stage, Identity] = {}
        self._refused: Mapping[Stage, str] = {}
        self.announced = Announced(self._claim)
        self.live = LiveCheckpointLoader(
            disk=SafetensorsLoader(),
            receive=self._receiver,
            on_miss=settings.on_miss,
            names=lambda: self.hooks.names,
            tensors=self._tensors(),
        )
        self.hooks = PublishingHooks(
            self._announce,
            group.at("publish"),
            early=Stage(options.publish_stage) is Stage.LOADED and self._is_source,
            received=self._received,
            declined=self._decline_raw,
            progress=progress_events(),
        )
        self.result: LoadResult | None = None
        self._disk_events = progress_events()
        self._read = 0

    @property
    def model(self) -> DecoderForCausalLM:
        """The loaded model."""
        assert self.result is not None
        return self.result.model

    @property
    def fell_back(self) -> bool:
        """Whether the weights did not come from a peer although one was to be asked."""
        return self._asks and self.live.report.source != "peer"

    def announce(self) -> None:
        """Tell others that this model will be loaded here, so that they may wait for it.

        Raises:
            CheckpointError, ConfigError: there is no such model.
        """
        config = read_config(Path(self.options.model))
        self._introduce(config.with_mtp() if self.options.mtp else config)

    def run(self) -> None:
        """Find, fill, publish; all ranks together.

        Raises:
            WeightwireError: this replica cannot load; one line says why.
        """
        loader = ModelLoader(self.world, self.loader_settings, self.live, self.hooks)
        self.result = loader.load(Path(self.options.model), self._disk_progress)
        if self._publishes:
            self.hooks.finish(self.model)

    def close(self) -> None:
        """Withdraw; bounded, idempotent."""
        self.hooks.withdraw()

    def told(self) -> dict[str, Json]:
        """What is to be known of it."""
        assert self.result is not None
        seconds = {name: round(value, 4) for name, value in self.result.seconds.items()}
        published: Json = None
        if self.hooks.report is not None:
            published = dict(vars(self.hooks.report))
        report = self.live.report
        told: dict[str, Json] = {"report": report.to_json(), "seconds": dict(seconds), "published": published}
        told["nbytes"] = report.nbytes if report.source in ("peer", "tensors") else self._read
        return told

    @property
    def content_id(self) -> str:
        """Of what was published, or received; empty where nothing was."""
        return self.hooks.report.content_id if self.hooks.report else self.live.report.content_id

    @property
    def _publishes(self) -> bool:
        return self._is_source and not self.hooks.forbidden

    @property
    def _is_source(self) -> bool:
        return self.replica_role in (ReplicaRole.AUTO, ReplicaRole.SOURCE)

    @property
    def _asks(self) -> bool:
        return self.replica_role in (ReplicaRole.AUTO, ReplicaRole.TARGET) and self.format is LoadFormat.PRESHARDED

    @property
    def _coordinates(self) -> Coordinates:
        return coordinates(self.mapping)

    def _introduce(self, config: ModelConfig) -> None:
        stage = Stage(self.options.publish_stage)
        found = native_identities(
            Path(self.options.model),
            config,
            model_id=self.options.model_id,
            revision=self.options.revision,
            dtype=self.options.dtype,
            kernel_layout=KernelLayout.parse(self.options.kernel_layout),
            mapping=self.mapping,
        )
        self.identities = {stage: replace(identity, role=self.role) for stage, identity in found.items()}
        self._refused = {stage: refusal(self._row(config, stage)) for stage in Stage}
        if self._publishes and self._refused[stage]:
            self.hooks.forbid(self._refused[stage])
        if self._publishes:
            self.announced.anew(stage)

    def _receiver(self, config: ModelConfig) -> Receiver | None:
        """Called before construction: announce first, so that replicas that start together see each other."""
        if not self.identities:
            self._introduce(config)
        if not self._asks:
            return None
        if self.follows:
            raise NoSourceError(self.follows, "see why the target's weights did not come from a peer")
        assert self.member is not None
        stages = {stage: self.identities[stage] for stage in self.settings.stages if not self._refused[stage]}
        if not stages:
            reason = "; ".join(self._refused[stage] for stage in self.settings.stages)
            raise NoSourceError(reason, "load it from the disk; weightwire doctor --matrix prints the table")
        want = Want(
            stages=stages,
            coordinates=self._coordinates,
            pinned=self.options.weights_id,
            latest=self.options.latest,
            accept_unpinned=self.settings.accept_unpinned,
            replica_incarnation=self._life,
            has_disk=has_weights(Path(self.options.model)),
            reshard=self.options.max_amplification > 0,
            max_amplification=self.options.max_amplification,
        )
        return Receiver(
            reader=self.member.reader,
            want=want,
            group=self.group.at("receive"),
            progress=progress_events(),
            relay=PublicationRelay(self._relaying, self._announce_again),
        )

    def _tensors(self) -> PeerTensors | None:
        if self.member is None or not self.options.tensors_of:
            return None
        progress = self._moving(progress_events())
        return peer_tensors(self.options, self.settings, self.member, self.group.at("tensors"), self.mapping, progress)

    def _moving(self, progress: Progress) -> Progress:
        """``progress``, and others may wait for this replica while bytes move that it does not relay."""

        def tell(phase: str, done: int, total: int, unit: str) -> None:
            progress(phase, done, total, unit)
            if unit == "bytes" and self.announced.publication is not None:
                self.announced.publication.progress(done, total)

        return tell

    def _row(self, config: ModelConfig, stage: Stage) -> Row:
        options, quantization = self.options, config.quantization
        return row_of(
            architecture=config.architecture,
            quantization=quantized_as(quantization.name if quantization else None, partly=config.partly_quantized),
            kernel_layout=KernelLayout.parse(options.kernel_layout).value,
            parallel=parallel(tp=options.tp, pp=options.pp, ep=options.ep, attention_dp=options.attention_dp),
            stage=stage,
        )

    def _relaying(self, offer: Offer) -> Publication | None:
        """What passes on ``offer`` while it is received: only what this rank will publish later, at the same stage."""
        stage = offer.choice.stage
        if not (self._publishes and self.options.relay) or stage.value not in (self.options.publish_stage, "PROCESSED"):
            return None
        return self.announced.of(stage)

    def _announce_again(self) -> None:
        """The load failed, and goes on with the disk: others may wait for this replica."""
        self.announced.anew(Stage(self.options.publish_stage))

    @property
    def _life(self) -> str:
        return str(self.group.once("replica", uuid.uuid4().hex))

    def _claim(self, stage: Stage) -> Publication:
        assert self.member is not None
        claim = Claim(
            identity=self.identities[stage],
            coordinates=self._coordinates,
            world_size=self.world.size,
            replica_incarnation=self._life,
            ordinal=self.options.ordinal,
        )
        return self.member.node.announce(claim)

    def _announce(self, stage: Stage, model: DecoderForCausalLM) -> Publication:
        """The publication of ``stage``: the one that was announced, or a new one where another stage was."""
        publication = self.announced.of(stage)
        publication.learn(dict(model.build_facts))
        return publication

    def _decline_raw(self) -> None:
        """Raw bytes are not published: let whoever reads what was passed on of them finish, before they change."""
        announced = self.announced.publication
        if announced is not None and announced.claim.identity.stage is Stage.LOADED:
            announced.withdraw(RELAY_DRAIN_S)
            self.announced.anew(Stage.PROCESSED)

    def _received(self, stage: Stage) -> Manifest | None:
        return self.live.manifest if self.live.report.stage == stage.value else None

    def _disk_progress(self, done: int, total: int) -> None:
        if self.announced.publication is not None:
            self.announced.publication.progress(done, total)
        self._read = total
        self._disk_events("read checkpoint", done, total, "bytes")


def replica_role(load_format: LoadFormat, settings: Settings) -> ReplicaRole:
    """What a replica does among others: without a metadata server nothing; only ``presharded`` asks peers."""
    if settings.url is None:
        return ReplicaRole.OFF
    if load_format is LoadFormat.PRESHARDED or settings.role is ReplicaRole.OFF:
        return settings.role
    return ReplicaRole.SOURCE


def progress_events() -> Progress:
    """A progress callback that emits events, not too many of them."""
    last: dict[str, float] = {}

    def tell(phase: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if done < total and now - last.get(phase, 0.0) < PROGRESS_S:
            return
        last[phase] = now
        emit("progress", phase=phase, done=done, total=total, unit=unit)

    return tell
