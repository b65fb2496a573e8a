"""One rank of a replica: joins the others, loads, publishes, then answers until it is told to stop.

    python -m weightwire.engines.native.rank OPTIONS-JSON

Which rank it is comes from the environment (torchrun, mpirun, or the launcher in ``replica``). Events go to standard
output, commands come from standard input (``events``).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from weightwire.config import ReplicaRole, Settings
from weightwire.engines.native.events import emit, error_fields, read
from weightwire.engines.native.hooks import PublishingHooks
from weightwire.engines.native.identity import native_identities
from weightwire.engines.native.options import ReplicaOptions
from weightwire.errors import WeightwireError
from weightwire.identity.identity import Identity
from weightwire.loaders.live import LiveCheckpointLoader
from weightwire.loaders.member import Member
from weightwire.manifest.records import Manifest
from weightwire.metadata.decision import Group, TorchDecisions
from weightwire.observability.logging import setup_logging
from weightwire.observability.metrics import MetricsServer, serve_metrics
from weightwire.observability.progress import Progress
from weightwire.runtime.checkpoint.safetensors_loader import SafetensorsLoader, has_weights
from weightwire.runtime.config import KernelLayout, ModelConfig
from weightwire.runtime.distributed import TpGroup, discover_rank
from weightwire.runtime.generate import generate
from weightwire.runtime.load_format import LoadFormat
from weightwire.runtime.model_loader import LoaderSettings, LoadResult, ModelLoader, parse_dtype
from weightwire.runtime.models.llama import LlamaForCausalLM
from weightwire.source.described import Claim
from weightwire.source.publication import Publication
from weightwire.target.offer import Want
from weightwire.target.receiver import Receiver
from weightwire.target.session import peer_name
from weightwire.types import Coordinates, Json, Stage

log = logging.getLogger(__name__)

PROGRESS_S = 0.1
"""Between two progress events of one phase."""


class Rank:
    """One rank's life. ``load`` once, then ``serve``.

    Args:
        options: of the replica.
        settings: of this process; without a metadata server's address it stays alone.
        tp: the ranks.
        decisions: makes the ranks' group; replaceable in tests that delay a rank.
    """

    def __init__(
        self,
        options: ReplicaOptions,
        settings: Settings,
        tp: TpGroup,
        decisions: Callable[[TpGroup], Group] | None = None,
    ) -> None:
        self.options = options
        self.settings = settings
        self.tp = tp
        self.group = (decisions or _group)(tp)
        self.format = LoadFormat.parse(options.load_format)
        self.role = _role(self.format, settings)
        self.member = Member(settings) if self.role is not ReplicaRole.OFF else None
        self.metrics = self._serve_metrics()
        self.identities: Mapping[Stage, Identity] = {}
        self.publication: Publication | None = None
        self.live = LiveCheckpointLoader(
            disk=SafetensorsLoader(),
            receive=self._receiver,
            on_miss=settings.on_miss,
            names=lambda: self.hooks.names,
        )
        self.hooks = PublishingHooks(
            self._announce,
            self.group.at("publish"),
            early=Stage(options.publish_stage) is Stage.LOADED and self._publishes,
            received=self._received,
            progress=progress_events(),
        )
        self.result: LoadResult | None = None
        self._disk_events = progress_events()
        self._read = 0

    @property
    def model(self) -> LlamaForCausalLM:
        """The loaded model."""
        assert self.result is not None
        return self.result.model

    def load(self) -> None:
        """Find, fill, publish; all ranks together.

        Raises:
            WeightwireError: this replica cannot load; one line says why.
        """
        settings = LoaderSettings(
            load_format=self.format,
            dtype=parse_dtype(self.options.dtype),
            kernel_layout=KernelLayout.parse(self.options.kernel_layout),
        )
        loader = ModelLoader(self.tp, settings, self.live, self.hooks)
        self.result = loader.load(Path(self.options.model), self._disk_progress)
        if self._publishes:
            self.hooks.finish(self.model)
        self.group.gather("loaded", "yes")  # a rank that died ends the replica here, with one line
        emit("loaded", **self._told())

    def serve(self, commands: Any) -> None:
        """Answer commands until ``stop`` or the end of the stream; with ``until_signal``, wait for SIGTERM instead."""
        while self.options.until_signal:
            signal.pause()  # the handler of SIGTERM raises SystemExit
        for command in read(commands):
            match command:
                case {"do": "generate", "prompts": list(prompts), "tokens": int(count), **more}:
                    self._generate(prompts, count, more.get("ends") or [])
                case {"do": "manifest"}:
                    emit("manifest", content_id=self._content_id())
                case {"do": "readers"}:
                    emit("readers", count=len(self.hooks.publication.leases) if self.hooks.publication else 0)
                case {"do": "stop"}:
                    return
                case _:
                    emit("refused", problem=f"unknown command {str(command)[:80]}", remedy="see rank.py")

    def close(self) -> None:
        """Withdraw and let go; bounded, idempotent."""
        self.hooks.withdraw()
        if self.metrics is not None:
            self.metrics.close()
        if self.member is not None:
            self.member.close()
        self.tp.close()

    def _serve_metrics(self) -> MetricsServer | None:
        port = self.options.metrics_port
        if port is None:
            return None
        return serve_metrics(self.settings.bind or "127.0.0.1", port + self.tp.rank if port else 0)

    @property
    def _publishes(self) -> bool:
        return self.role in (ReplicaRole.AUTO, ReplicaRole.SOURCE)

    @property
    def _coordinates(self) -> Coordinates:
        return Coordinates(tp_rank=self.tp.rank, tp_size=self.tp.size)

    def _identify(self, config: ModelConfig) -> None:
        self.identities = native_identities(
            Path(self.options.model),
            config,
            model_id=self.options.model_id,
            revision=self.options.revision,
            dtype=self.options.dtype,
            kernel_layout=KernelLayout.parse(self.options.kernel_layout),
            group=self.tp,
        )

    def _receiver(self, config: ModelConfig) -> Receiver | None:
        """Called before construction: announce first, so that replicas that start together see each other."""
        self._identify(config)
        if self._publishes:
            self._claim(Stage(self.options.publish_stage), {})
        if self.role not in (ReplicaRole.AUTO, ReplicaRole.TARGET) or self.format is not LoadFormat.PRESHARDED:
            return None
        assert self.member is not None
        want = Want(
            stages={stage: self.identities[stage] for stage in self.settings.stages},
            coordinates=self._coordinates,
            pinned=self.options.weights_id,
            latest=self.options.latest,
            accept_unpinned=self.settings.accept_unpinned,
            replica_incarnation=self._life,
            has_disk=has_weights(Path(self.options.model)),
        )
        return Receiver(
            reader=self.member.reader, want=want, group=self.group.at("receive"), progress=progress_events()
        )

    @property
    def _life(self) -> str:
        return str(self.group.once("replica", uuid.uuid4().hex))

    def _claim(self, stage: Stage, facts: Mapping[str, Json]) -> Publication:
        assert self.member is not None
        claim = Claim(
            identity=self.identities[stage],
            coordinates=self._coordinates,
            world_size=self.tp.size,
            replica_incarnation=self._life,
            ordinal=self.options.ordinal,
            build_facts=facts,
        )
        self.publication = self.member.node.announce(claim)
        return self.publication

    def _announce(self, stage: Stage, model: LlamaForCausalLM) -> Publication:
        """The publication of ``stage``: the one that was announced, or a new one where another stage was."""
        announced = self.publication
        if announced is not None and announced.claim.identity.stage is stage and not announced.over:
            announced.learn(dict(model.build_facts))
            return announced
        if announced is not None:
            announced.withdraw(0.0)
        return self._claim(stage, dict(model.build_facts))

    def _received(self, stage: Stage) -> Manifest | None:
        return self.live.manifest if self.live.report.stage == stage.value else None

    def _disk_progress(self, done: int, total: int) -> None:
        if self.publication is not None:
            self.publication.progress(done, total)
        self._read = total
        self._disk_events("read checkpoint", done, total, "bytes")

    def _told(self) -> dict[str, Json]:
        assert self.result is not None
        seconds = {name: round(value, 4) for name, value in self.result.seconds.items()}
        published: Json = None
        if self.hooks.report is not None:
            published = dict(vars(self.hooks.report))
        report = self.live.report
        told: dict[str, Json] = {"report": report.to_json(), "seconds": dict(seconds), "published": published}
        told["nbytes"] = report.nbytes if report.source == "peer" else self._read
        if self.metrics is not None:
            told["metrics"] = "{}:{}".format(*self.metrics.address)
        if self.member is not None:
            node = self.member.node
            unavailable: dict[str, Json] = dict(self.member.reader.unavailable)
            told |= {"peer": peer_name(node.endpoints, node.incarnation), "unavailable": unavailable}
        return told

    def _content_id(self) -> str:
        return self.hooks.report.content_id if self.hooks.report else self.live.report.content_id

    def _generate(self, prompts: list[Any], count: int, ends: Any) -> None:
        began = time.monotonic()
        try:
            found = generate(self.model, prompts, max_new_tokens=count, eos_token_ids=ends)
            tokens: list[Json] = [list(row) for row in found]
        except WeightwireError as error:
            emit("refused", **error_fields(error))
            return
        emit("tokens", tokens=tokens, seconds=round(time.monotonic() - began, 4))


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


def _group(tp: TpGroup) -> Group:
    return Group(TorchDecisions(tp.store), tp.rank, tp.size, "replica") if tp.size > 1 else Group.solo()


def _role(load_format: LoadFormat, settings: Settings) -> ReplicaRole:
    if settings.url is None:
        return ReplicaRole.OFF
    if load_format is LoadFormat.PRESHARDED or settings.role is ReplicaRole.OFF:
        return settings.role
    return ReplicaRole.SOURCE


def run_rank(options: ReplicaOptions, decisions: Callable[[TpGroup], Group] | None = None) -> int:
    """The process's whole life; its exit code."""
    settings = Settings.from_env()
    environment = discover_rank()
    setup_logging(settings.log_level, rank=f"rank {environment.rank}/{environment.world_size}")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // environment.world_size))
    with ExitStack() as stack:
        try:
            tp = stack.enter_context(TpGroup.connect(environment))
            rank = Rank(options, settings, tp, decisions)
            stack.callback(rank.close)
            rank.load()
            rank.serve(sys.stdin)
        except WeightwireError as error:
            log.debug("the rank ends", exc_info=True)
            emit("failed", rank=environment.rank, **error_fields(error))
            return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    signal.signal(signal.SIGTERM, _stop)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if len(given) != 1:
            emit("failed", rank=-1, kind="ConfigError", problem="one argument is expected", remedy="the options")
            return 2
        return run_rank(ReplicaOptions.from_json(given[0]))
    except WeightwireError as error:
        emit("failed", rank=-1, **error_fields(error))
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def _stop(*_: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
