"""What this worker process holds beyond one loader: vLLM makes a new loader for every load, and forgets it."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.util import Finalize

from weightwire.config import Settings
from weightwire.engines.vllm.logs import forward
from weightwire.engines.vllm.options import Options
from weightwire.engines.vllm.ranks import Place
from weightwire.engines.vllm.readiness import Expectation, Readiness
from weightwire.identity.identity import Identity
from weightwire.loaders.member import Member
from weightwire.manifest.catalogue import ConstructionNames
from weightwire.manifest.records import Layout
from weightwire.metadata.decision import ServerDecisions
from weightwire.source.publication import Publication
from weightwire.types import Role, Stage, State
from weightwire.wire.messages import PublicationState

log = logging.getLogger("vllm.weightwire.serving")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is known of a model that was loaded here, for what happens to it later.

    Attributes:
        options: it was loaded with.
        place: of this worker.
        identities: by stage.
        names: taken at construction.
        raw: what it consisted of before it was processed.
        state: plain values that its loading decided.
        weights_id: of the replica, or empty where nothing was published or received.
        ordinal: of these weights, so far as known.
    """

    options: Options
    place: Place
    identities: Mapping[Stage, Identity]
    names: ConstructionNames
    raw: Layout
    state: State
    weights_id: str = ""
    ordinal: int = 0


class Serving:
    """One a process (``process_serving``). Thread-safe: loads, readiness and exit happen on different threads.

    Attributes:
        loaded: by role.
        fell_back: roles whose weights did not come from a peer although one was asked for; a draft follows its target.
    """

    def __init__(self) -> None:
        self.loaded: dict[Role, Loaded] = {}
        self.fell_back: set[Role] = set()
        self._members: dict[Settings, Member] = {}
        self._publications: dict[Role, Publication] = {}
        self._paused: list[Publication] = []
        self._readiness: Readiness | None = None
        self._expected: Expectation | None = None
        self._lock = threading.RLock()

    def member(self, settings: Settings) -> Member:
        """This process's membership under ``settings``; made on first use, closed at exit.

        Raises:
            ConfigError, PublishError, AuthError: as ``Member``.
        """
        with self._lock:
            if settings not in self._members:
                forward(settings.log_level)
                self._members[settings] = Member(settings)
            return self._members[settings]

    def hold(self, role: Role, publication: Publication) -> None:
        """``publication`` is held: ``offer_when_ready`` or ``withdraw`` come later. Replaces an earlier one."""
        self.withdraw(role)
        with self._lock:
            self._publications[role] = publication

    def publication(self, role: Role) -> Publication | None:
        """What is published of ``role``, if it is not over."""
        with self._lock:
            found = self._publications.get(role)
            return None if found is None or found.over else found

    def offer_when_ready(self, settings: Settings, expected: Expectation) -> None:
        """Offer everything that is held once the engine is ready.

        Args:
            settings: of the replica.
            expected: whose word is waited for; a draft waits for its target's, which was loaded first.
        """
        with self._lock:
            if self._readiness is not None:
                self._readiness.cancel()
            self._expected = self._expected or expected
            decisions = ServerDecisions(self.member(settings).metadata)
            self._readiness = Readiness(decisions, self._expected, self._offer)

    def pause(self) -> None:
        """Return once nobody reads and nobody can; the bytes may go away until ``resume``. Idempotent."""
        for publication in self._live():
            publication.pause()
            if publication not in self._paused:
                self._paused.append(publication)

    def resume(self) -> None:
        """After ``pause``: offer again what came back, and digest it; at the first difference it is withdrawn.

        Readers that come before that digest for themselves.
        """
        paused, self._paused = self._paused, []
        for publication in paused:
            if publication.over:
                continue
            publication.resume()
            layout = publication.offered
            leaves = range(len(layout.leaves)) if layout else range(0)
            all(publication.recheck(leaf) for leaf in leaves)

    def changing(self) -> None:
        """The target's weights are about to be replaced by others, unknown here: nobody reads them any more.

        What is known of them is forgotten, so that a later refresh does not take them for weights that it has.
        """
        self.withdraw()
        if Role.TARGET in self.loaded:
            self.loaded[Role.TARGET] = dataclasses.replace(self.loaded[Role.TARGET], weights_id="")

    def withdraw(self, role: Role | None = None, drain_s: float | None = None) -> None:
        """Stop serving one role, or everything; returns when the bytes may change. Idempotent."""
        with self._lock:
            ended = [each for each in ([role] if role else list(self._publications)) if each in self._publications]
            publications = [self._publications.pop(each) for each in ended]
        for publication in publications:
            _withdraw(publication, drain_s)

    def close(self) -> None:
        """Withdraw, and let go of everything: at exit, where the process gets to it."""
        with self._lock:
            if self._readiness is not None:
                self._readiness.cancel()
        self.withdraw(drain_s=EXIT_DRAIN_S)
        with self._lock:
            members, self._members = list(self._members.values()), {}
        for member in members:
            member.close()

    def _live(self) -> list[Publication]:
        with self._lock:
            return [each for each in self._publications.values() if not each.over]

    def _offer(self) -> None:
        for publication in self._live():
            publication.offer()
            if publication.state is PublicationState.PAUSED and publication not in self._paused:
                publication.resume()  # a relay that was kept out while the engine captured graphs
            role = publication.claim.identity.role
            log.info("weightwire: the engine is ready; the %s model is offered to others", role.value)


EXIT_PRIORITY = 100
"""Among multiprocessing's finalizers: before its own."""
EXIT_DRAIN_S = 3.0
"""What readers get at exit; vLLM kills a worker that takes longer than about five seconds."""

_process: list[Serving] = []


def process_serving(make: Callable[[], Serving] = Serving) -> Serving:
    """This process's one ``Serving``; made on first use, that is in a worker and not in a process that forks it."""
    if not _process:
        _process.append(make())
        # not atexit: a worker that multiprocessing has forked leaves without running what is registered there
        Finalize(None, _process[0].close, exitpriority=EXIT_PRIORITY)
    return _process[0]


def _withdraw(publication: Publication, drain_s: float | None) -> None:
    kept = publication.held.nbytes
    if drain_s is None:
        publication.withdraw()
    else:
        publication.withdraw(drain_s)
    if kept:
        log.info("weightwire: %d bytes that were kept for readers are released", kept)
