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
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from weightwire.config import ReplicaRole, Settings
from weightwire.engines.native.events import emit, error_fields, read
from weightwire.engines.native.load import Load, replica_role
from weightwire.engines.native.options import ReplicaOptions
from weightwire.errors import ConfigError, WeightwireError
from weightwire.loaders.member import Member
from weightwire.metadata.decision import Group, TorchDecisions
from weightwire.observability.logging import setup_logging
from weightwire.observability.metrics import MetricsServer, serve_metrics
from weightwire.runtime.distributed import TpGroup, discover_rank
from weightwire.runtime.generate import generate
from weightwire.runtime.load_format import LoadFormat
from weightwire.target.session import peer_name
from weightwire.types import Json, Role

log = logging.getLogger(__name__)


class Rank:
    """One rank's life. ``load`` once, then ``serve``.

    Args:
        options: of the replica.
        settings: of this process; without a metadata server's address it stays alone.
        world: the ranks.
        decisions: makes the ranks' group; replaceable in tests that delay a rank.

    Raises:
        ConfigError: the launcher started another number of ranks than the options name.

    Attributes:
        target: the model that answers.
        draft: the one that drafts for it, where there is one.
    """

    def __init__(
        self,
        options: ReplicaOptions,
        settings: Settings,
        world: TpGroup,
        decisions: Callable[[TpGroup], Group] | None = None,
    ) -> None:
        self.options = options
        self.settings = settings
        self.world = world
        if world.size != options.world_size:
            raise ConfigError(
                f"{world.size} ranks were started for tp {options.tp} x pp {options.pp}",
                f"start {options.world_size}, or change the options",
            )
        draft = options.of_draft() if options.draft_model else None  # it may be refused, so before anything is open
        self.group = (decisions or _group)(world)
        role = replica_role(LoadFormat.parse(options.load_format), settings)
        self.member = Member(settings) if role is not ReplicaRole.OFF else None
        self.metrics = self._serve_metrics()
        self.target = Load(options, settings, world, self.group, self.member)
        self.draft = self._draft(draft) if draft else None

    def load(self) -> None:
        """The target model, then its draft; all ranks together.

        Raises:
            WeightwireError: this replica cannot load; one line says why.
        """
        if self.draft is not None:
            self.draft.announce()  # whoever has loaded its target sooner than we ours then knows of it
        self.target.run()
        if self.draft is not None:
            self.draft.follows = self._draft_follows()
            self.draft.run()
        self.group.gather("loaded", "yes")  # a rank that died ends the replica here, with one line
        emit("loaded", **self._told())

    def _draft(self, options: ReplicaOptions) -> Load:
        group = self.group.at(Role.DRAFT.value)
        return Load(options, self.settings, self.world, group, self.member, role=Role.DRAFT)

    def _draft_follows(self) -> str:
        """Why the draft is not to come from a peer; all ranks say the same, as all took the same way."""
        return "the target model was not taken from a peer, and its draft follows it" if self.target.fell_back else ""

    def serve(self, commands: Any) -> None:
        """Answer commands until ``stop`` or the end of the stream; with ``until_signal``, wait for SIGTERM instead."""
        while self.options.until_signal:
            signal.pause()  # the handler of SIGTERM raises SystemExit
        for command in read(commands):
            match command:
                case {"do": "generate", "prompts": list(prompts), "tokens": int(count), **more}:
                    self._generate(prompts, count, more)
                case {"do": "manifest"}:
                    emit("manifest", content_id=self.target.content_id)
                case {"do": "readers"}:
                    publication = self.target.hooks.publication
                    emit("readers", count=len(publication.leases) if publication else 0)
                case {"do": "stop"}:
                    return
                case _:
                    emit("refused", problem=f"unknown command {str(command)[:80]}", remedy="see rank.py")

    def close(self) -> None:
        """Withdraw and let go; bounded, idempotent."""
        for each in (self.draft, self.target):
            if each is not None:
                each.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.member is not None:
            self.member.close()
        self.world.close()

    def _serve_metrics(self) -> MetricsServer | None:
        port = self.options.metrics_port
        if port is None:
            return None
        return serve_metrics(self.settings.bind or "127.0.0.1", port + self.world.rank if port else 0)

    def _told(self) -> dict[str, Json]:
        told = self.target.told()
        if self.draft is not None:
            told["draft"] = self.draft.told()
        if self.metrics is not None:
            told["metrics"] = "{}:{}".format(*self.metrics.address)
        if self.member is not None:
            node = self.member.node
            unavailable: dict[str, Json] = dict(self.member.reader.unavailable)
            told |= {"peer": peer_name(node.endpoints, node.incarnation), "unavailable": unavailable}
        return told

    def _of(self, role: Json) -> Load:
        if role != Role.DRAFT.value:
            return self.target
        if self.draft is None:
            raise ConfigError("this replica has no draft model", "start it with one")
        return self.draft

    def _generate(self, prompts: list[Any], count: int, more: Mapping[str, Any]) -> None:
        began = time.monotonic()
        try:
            found = generate(
                self._of(more.get("role")).model,
                prompts,
                max_new_tokens=count,
                eos_token_ids=more.get("ends") or [],
            )
            tokens: list[Json] = [list(row) for row in found]
        except WeightwireError as error:
            emit("refused", **error_fields(error))
            return
        emit("tokens", tokens=tokens, seconds=round(time.monotonic() - began, 4))


def _group(world: TpGroup) -> Group:
    if world.size == 1:
        return Group.solo()
    return Group(TorchDecisions(world.store), world.rank, world.size, "replica")


def run_rank(options: ReplicaOptions, decisions: Callable[[TpGroup], Group] | None = None) -> int:
    """The process's whole life; its exit code."""
    settings = Settings.from_env(max_rate=options.max_rate, max_readers=options.max_readers)
    environment = discover_rank()
    setup_logging(settings.log_level, rank=f"rank {environment.rank}/{environment.world_size}")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // environment.world_size))
    with ExitStack() as stack:
        try:
            world = stack.enter_context(TpGroup.connect(environment))
            rank = Rank(options, settings, world, decisions)
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
