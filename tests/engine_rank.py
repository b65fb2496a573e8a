"""A rank of the native engine that misbehaves as the variable ``RANK_FAULTS`` says, and answers a few more commands.

    python engine_rank.py OPTIONS-JSON

Everything that is not named in ``Faults`` is the real rank: processes, sockets, transports and memory.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightwire.auth import Secret
from weightwire.engines.native import identity
from weightwire.engines.native import load as loading
from weightwire.engines.native import rank as native
from weightwire.engines.native.events import emit, read
from weightwire.engines.native.hooks import PublishingHooks
from weightwire.engines.native.options import ReplicaOptions
from weightwire.errors import ConfigError, PeerLost, TransferError
from weightwire.loaders import member
from weightwire.loaders.live import LiveCheckpointLoader
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.catalogue import POISON, Catalogue, catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.records import Manifest
from weightwire.metadata.decision import Group, Verdict, Vote
from weightwire.runtime import Final, Injected, LoadRequest, Weights, model_loader, mtp_logits
from weightwire.runtime.checkpoint import safetensors_loader
from weightwire.runtime.checkpoint.safetensors_loader import SafetensorsLoader
from weightwire.runtime.distributed import TpGroup
from weightwire.runtime.mapping import Mapping as RankMapping
from weightwire.runtime.materialize import materialize
from weightwire.source import node, publish, scrub
from weightwire.source.publication import Publication
from weightwire.target import discover, verification
from weightwire.target.offer import Choice
from weightwire.target.receiver import Receiver
from weightwire.transport.faults import Corrupt, FaultPlan, FaultyTransport
from weightwire.transport.opening import Opened, open_transports
from weightwire.transport.tcp import TcpTransport
from weightwire.types import Coordinates, Json, Span, Stage
from weightwire.wire.peer_service import PeerServer

FLIP_EVERY = 256 * 1024
"""Bytes between two flipped bits: at least one in every leaf."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong.

    Attributes:
        vote_s: how long ranks wait for each other's votes.
        margin_s: how much longer than the leader the others wait for its choice.
        rank: the rank that ``step`` goes wrong on, and that the fields below ``weights_id`` hold for; -1 for all.
        step: name of a decision step; ``ask`` is the leader's question before its choice.
        kind: ``raise``, ``crash``, ``freeze`` or ``late``.
        late_s: how late.
        throttle_s: before each chunk that is served.
        fill_s: before the fill begins.
        transform_s: before each transform; the first one waits for a reader first.
        unguarded: transforms run on the published bytes themselves.
        weights_id: what this replica says that it holds.
        model: another checkpoint directory.
        unclassified: the model holds a tensor that nobody declared.
        unregistered: no memory can be registered.
        corrupt: what is read arrives changed: bad memory on our side.
        credulous: what arrives counts as verified, whatever it is; the end of the load does not come.
        spans: every span that is served is told of, as an event.
        poison: parameters are filled with a pattern before the fill, and looked at when it begins.
        nan: what is to be received is filled with 0x7F first: no numbers in e4m3 and bfloat16, or huge ones.
        peer_port: of the peer endpoint.
        blind: there is no scrub, which could find in time what readers are to find.
        read_s: for each tensor that is read from the disk.
        rewrite: how the first parameters are changed in the middle of the load, after they were declared final: by
            ``torch``, or ``raw`` through their addresses.
        replace: parameters are replaced by others of the same values while they are loaded.
        flat: keys are made of the tensor-parallel rank alone, as others make them.
        faithless: the draft is taken from a peer, wherever its target came from.
    """

    vote_s: float = 10.0
    margin_s: float = 5.0
    rank: int = -1
    step: str = ""
    kind: str = ""
    late_s: float = 0.0
    throttle_s: float = 0.0
    fill_s: float = 0.0
    transform_s: float = 0.0
    unguarded: bool = False
    weights_id: str = ""
    model: str = ""
    unclassified: bool = False
    unregistered: bool = False
    corrupt: bool = False
    credulous: bool = False
    spans: bool = False
    poison: bool = False
    nan: bool = False
    peer_port: int = 0
    blind: bool = False
    read_s: float = 0.0
    rewrite: str = ""
    replace: bool = False
    flat: bool = False
    faithless: bool = False

    @classmethod
    def told(cls) -> Faults:
        faults = cls(**json.loads(os.environ.get("RANK_FAULTS", "{}")))
        if faults.rank in (-1, int(os.environ.get("RANK", "0"))):
            return faults
        mine = {"vote_s", "margin_s", "throttle_s", "weights_id", "poison", "read_s"}
        return cls(**{field.name: getattr(faults, field.name) for field in fields(cls) if field.name in mine})


FAULTS = Faults()
"""This rank's; read from the environment by ``main``."""


class MisledGroup(Group):
    """Goes wrong at one step, once."""

    def at(self, epoch: str) -> Group:
        return MisledGroup(self.store, self.rank, self.size, f"{self.epoch}/{epoch}", self.vote_s)

    def follow(self, step: str, timeout: float, otherwise: Json) -> Json:
        _go_wrong(step)
        return super().follow(step, timeout, otherwise)

    def vote(self, step: str, mine: Vote, timeout: float | None = None) -> Verdict:
        _go_wrong(step)
        return super().vote(step, mine, timeout)


def _go_wrong(step: str) -> None:
    if FAULTS.step != step or not FAULTS.kind:
        return
    emit("fault", step=step, pid=os.getpid())
    match FAULTS.kind:
        case "raise":
            raise PeerLost("made to fail", "a test did it")
        case "crash":
            raise RuntimeError("made to crash")
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "late":
            time.sleep(FAULTS.late_s)


def decisions(tp: TpGroup) -> Group:
    group = native._group(tp)
    return MisledGroup(group.store, group.rank, group.size, group.epoch, FAULTS.vote_s)


class Hooks(PublishingHooks):
    """Slow, or careless."""

    def filling(self, model: nn.Module) -> Final | None:
        emit("reading", readable=[each.generation for each in _published() if each.offered is not None])
        final = super().filling(model)
        if final is None or not (FAULTS.rewrite or FAULTS.replace):
            return final
        told, limit = list[str](), len(list(model.named_parameters())) // 2

        def careless(names: Collection[str]) -> None:
            final(names)
            told.extend(names)
            if len(told) - len(names) < limit <= len(told):
                time.sleep(1.0)  # what is final was read by others, some of it
                _change(model, told)

        return careless

    def loaded(self, model: nn.Module) -> None:
        if FAULTS.unclassified:
            model.scratch = torch.zeros(4)
        super().loaded(model)

    def guard_transform(self, module: nn.Module) -> AbstractContextManager[None]:
        inner = super().guard_transform(module)
        return self._slow(inner, module) if FAULTS.transform_s else inner

    @contextmanager
    def _slow(self, inner: AbstractContextManager[None], module: nn.Module) -> Iterator[None]:
        assert self.publication is not None
        until = time.monotonic() + 30
        while not hasattr(self, "_began") and not len(self.publication.leases) and time.monotonic() < until:
            time.sleep(0.01)
        self._began = True
        time.sleep(FAULTS.transform_s)
        with contextmanager(_nothing)() if FAULTS.unguarded else inner:
            yield
        emit("transformed", module=type(module).__name__, readers=len(self.publication.leases))


_NODES: list[node.Node] = []
"""This process as a source, where it is one."""


def _published() -> list[Publication]:
    return [each for serving in _NODES for each in serving._by_key().values()]


def _change(model: nn.Module, names: Sequence[str]) -> None:
    """Change, or replace, what was declared final."""
    for name in names[: len(names) // 2]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = getattr(module, leaf)
        if FAULTS.replace:
            setattr(module, leaf, nn.Parameter(tensor.detach().clone(), requires_grad=False))
        elif FAULTS.rewrite == "torch":
            tensor.mul_(1)  # the same bytes: who writes once more cannot know that
        else:
            ctypes.c_ubyte.from_address(tensor.data_ptr()).value ^= 0x40
    emit("changed", count=len(names) // 2)


def _nothing() -> Iterator[None]:
    yield


class Watched(native.Rank):
    """Answers ``digest``, ``flip``, ``withdraw``, ``reload``, ``memory``, ``throttle`` and ``republish`` as well."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.throttle_s = FAULTS.throttle_s
        self._anon = AnonMemory()

    def load(self) -> None:
        if self.member is not None:
            _throttle(self)
            _NODES.append(self.member.node)
        super().load()

    def serve(self, commands: Any) -> None:
        for command in read(commands):
            if command.get("do") == "stop":
                return
            handler = getattr(self, f"do_{command.get('do')}", None)
            if handler is None:
                super().serve(io.StringIO(json.dumps(command) + "\n"))
            else:
                handler(command)

    def do_digest(self, command: Mapping[str, Json]) -> None:
        """What the model's tensors hold now, computed anew."""
        load = self._of(command.get("role"))
        described = catalogue(load.model, load.hooks.names)
        digests = digest_leaves(described.memory, described.layout.leaves)
        manifest = Manifest(layout=described.layout, digests=digests)
        names: list[Json] = [entry.name for entry in described.layout.entries]
        emit("digest", content_id=manifest.content_id, derived_id=manifest.derived_id, names=names)

    def do_drafts(self, command: Mapping[str, Json]) -> None:
        """Logits of what layers for multi-token prediction draft first."""
        prompts: Any = command["prompts"]
        emit("drafts", logits=mtp_logits(self.target.model, prompts)[0].tolist())

    def do_flip(self, command: Mapping[str, Json]) -> None:
        """Flip bits of what is published, behind everybody's back."""
        memory = self._served()
        layout = self.target.hooks.publication._holding.manifest.layout  # type: ignore[union-attr]
        flipped = 0
        for index, leaf in enumerate(layout.leaves):
            if (index >= layout.weight_leaves) is (command["what"] == "derived"):
                flipped += _flip(memory, leaf.span)
        emit("flipped", count=flipped)

    def do_withdraw(self, _command: Mapping[str, Json]) -> None:
        gc.collect()
        before = self._anon.now()
        began = time.monotonic()
        self.target.hooks.withdraw()
        seconds = time.monotonic() - began
        gc.collect()
        emit("withdrawn", freed=before - self._anon.now(), seconds=seconds)

    def do_reload(self, command: Mapping[str, Json]) -> None:
        target = self.target
        settings = model_loader.LoaderSettings(load_format=target.format)
        loader = model_loader.ModelLoader(self.world, settings, target.live, target.hooks)
        disk, where = SafetensorsLoader(), Path(str(command["model"]))
        request = LoadRequest(where, loader.mapping, target.model, target.model.config, None)
        loader.reload(target.model, disk.load_weights(request))
        emit("reloaded")

    def do_republish(self, _command: Mapping[str, Json]) -> None:
        """Publish again, with a catalogue taken now."""
        target = self.target
        target.hooks.withdraw()
        target.announced.publication = None
        target.hooks._group = self.group.at("republish")
        target.hooks._publish(Stage(self.options.publish_stage), target.model)
        emit("republished", **vars(target.hooks.report))

    def do_memory(self, _command: Mapping[str, Json]) -> None:
        gc.collect()
        emit("memory", peak=self._anon.peak, now=self._anon.now())

    def do_throttle(self, command: Mapping[str, Json]) -> None:
        self.throttle_s = float(str(command["seconds"]))
        emit("throttled")

    def _served(self) -> AddressSpace:
        assert self.target.hooks.publication is not None
        return self.target.hooks.publication._held_now().memory


class AnonMemory:
    """Anonymous memory of this process beyond what it had when this began, sampled (mapped files do not count)."""

    def __init__(self) -> None:
        self._base = _anon()
        self.peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def now(self) -> int:
        return _anon() - self._base

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)


def _anon() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def _flip(memory: AddressSpace, span: Span) -> int:
    count = 0
    for offset in range(span.offset, span.end, FLIP_EVERY):
        segment = memory.slices(Span(offset, 1))[0]
        byte = ctypes.c_ubyte.from_address(segment.address)
        byte.value ^= 0x40
        count += 1
    return count


def _throttle(rank: Watched) -> None:
    """A slow link: wait before each chunk is served."""
    assert rank.member is not None
    serving = rank.member.node
    inner = serving.admit

    def admit(lease: bytes, span: Span, transport: str) -> Any:
        if FAULTS.spans:
            emit("span", offset=span.offset, nbytes=span.nbytes, transport=transport)
        if rank.throttle_s:
            emit("serving")
            time.sleep(rank.throttle_s)
        return inner(lease, span, transport)

    serving.admit = admit  # type: ignore[method-assign]


def _poisoned(model: nn.Module) -> bool:
    return all(bool((tensor.detach().reshape(-1).view(torch.uint8) == POISON).all()) for tensor in model.parameters())


def _materialize(model: nn.Module, device: torch.device) -> None:
    _real_materialize(model, device)
    for tensor in model.parameters():
        tensor.detach().reshape(-1).view(torch.uint8).fill_(POISON)


NAN = 0x7F
_real_poison = Catalogue.poison
_real_materialize = materialize
_real_load_weights = LiveCheckpointLoader.load_weights
_real_open = open_transports
_real_read = safetensors_loader._FileSource.read
_real_ask = discover.Discovery._wait_for_choice


def _load_weights(loader: LiveCheckpointLoader, request: LoadRequest) -> Injected | Weights:
    emit("filling", untouched=FAULTS.poison and _poisoned(request.model))
    time.sleep(FAULTS.fill_s)
    return _real_load_weights(loader, request)


def _read_slowly(source: Any, dim: int, start: int, stop: int) -> torch.Tensor:
    time.sleep(FAULTS.read_s)
    return _real_read(source, dim, start, stop)


def _open_transports(*arguments: Any) -> Opened:
    opened = _real_open(*arguments)
    if FAULTS.corrupt:
        plan = FaultPlan(rates=[(1.0, Corrupt())])
        opened.transports = {name: FaultyTransport(inner, plan) for name, inner in opened.transports.items()}
    return opened


def _flat(mapping: RankMapping) -> Coordinates:
    return Coordinates(tp_rank=mapping.tp_rank, tp_size=mapping.tp_size)


def _no_register(_transport: TcpTransport, _memory: AddressSpace) -> Any:
    raise TransferError("out of registrable memory", "raise the limit")


def _peer_server(service: Any, secret: Secret, host: str) -> PeerServer:
    until = time.monotonic() + 10
    while True:
        try:
            return PeerServer(service, secret, host, FAULTS.peer_port)
        except ConfigError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _ask(discovery: discover.Discovery) -> Choice:
    _go_wrong("ask")
    return _real_ask(discovery)


def misbehave() -> None:
    """Put the faults in place."""
    _put(native, "Rank", Watched)
    _put(loading, "PublishingHooks", Hooks)
    _put(LiveCheckpointLoader, "load_weights", _load_weights)
    _put(discover, "MARGIN_S", FAULTS.margin_s)
    _put(discover.Discovery, "_wait_for_choice", _ask)
    _put(member, "open_transports", _open_transports)
    if FAULTS.credulous:
        _put(verification.Verification, "compare", lambda *_: None)
    if FAULTS.nan:
        _put(loading, "Receiver", partial(Receiver, poison=True))
        _put(Catalogue, "poison", lambda held: _real_poison(held, NAN))
    if FAULTS.poison:
        _put(model_loader, "materialize", _materialize)
    if FAULTS.weights_id:
        _put(publish, "_together", lambda _verdict: FAULTS.weights_id)
    if FAULTS.unregistered:
        _put(TcpTransport, "register", _no_register)
    if FAULTS.read_s:
        _put(safetensors_loader._FileSource, "read", _read_slowly)
    _confuse()
    if FAULTS.blind:
        _put(scrub.Scrub, "step", lambda _self: 3600.0)
    if FAULTS.peer_port:
        _put(node, "PeerServer", _peer_server)


def _confuse() -> None:
    """What belongs together, and what does not."""
    if FAULTS.flat:
        _put(loading, "coordinates", _flat)
        _put(identity, "coordinates", _flat)
    if FAULTS.faithless:
        _put(native.Rank, "_draft_follows", lambda _rank: "")


def _put(owner: object, name: str, value: object) -> None:
    assert hasattr(owner, name), name
    setattr(owner, name, value)


def main(arguments: list[str]) -> int:
    """The whole life of one rank."""
    global FAULTS  # noqa: PLW0603  # a process has one rank
    FAULTS = Faults.told()
    emit("started", pid=os.getpid())
    signal.signal(signal.SIGTERM, native._stop)
    misbehave()
    options = ReplicaOptions.from_json(arguments[0])
    if FAULTS.model:
        options = replace(options, model=FAULTS.model)
    return native.run_rank(options, decisions)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
