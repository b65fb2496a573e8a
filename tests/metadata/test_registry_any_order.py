from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from metadata_fleet import TTL, Fleet
from wire_samples import rank

from weightwire.errors import MetadataError
from weightwire.wire.messages import (
    PublicationRecord,
    Withdrawal,
)
from weightwire.wire.messages import PublicationState as S

# Any order of messages -----------------------------------------------------------------------------------------------


class AnyMessages(RuleBasedStateMachine):
    """Sources that live, die and withdraw; a network that delays and repeats what they say."""

    sent = Bundle("sent")

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.truth: dict[str, tuple[int, int, S]] = {}
        """Life -> what its source says of itself at last: generation, sequence, state."""
        self.delivered: dict[str, tuple[int, int]] = {}
        self.heard: dict[str, float] = {}
        self.tombs: dict[str, tuple[float, tuple[int, int]]] = {}

    @rule(target=sent, life=st.sampled_from("abc"), state=st.sampled_from([S.LOADING, S.HELD, S.READY, S.PAUSED]))
    def say(self, life: str, state: S) -> PublicationRecord:
        generation, sequence, before = self.truth.get(life, (1, 0, S.LOADING))
        moved = before is S.WITHDRAWN
        self.truth[life] = (generation + moved, sequence + 1, state)
        return rank(0, life, world_size=2, generation=generation + moved, sequence=sequence + 1, state=state)

    @rule(target=sent, life=st.sampled_from("abc"))
    def leave(self, life: str) -> Withdrawal:
        generation, sequence, _ = self.truth.get(life, (1, 0, S.LOADING))
        self.truth[life] = (generation + 1, sequence + 1, S.WITHDRAWN)
        return Withdrawal(
            shard_key="shard-0", incarnation=f"{life}-0", generation=generation + 1, sequence=sequence + 1
        )

    @rule(message=sent)
    def arrives(self, message: PublicationRecord | Withdrawal) -> None:
        life = message.incarnation[0]
        version = (message.generation, message.sequence)
        try:
            if isinstance(message, Withdrawal):
                self.fleet.registry.withdraw(message)
            else:
                self.fleet.publish(message)
                self.heard[life] = self.fleet.clock.now
        except MetadataError:
            known = max(self.delivered.get(life, (0, 0)), self.tombs.get(life, (0.0, (0, 0)))[1])
            assert version < known or version[1] <= known[1]
            return
        if isinstance(message, Withdrawal) and version[1] >= self.delivered.get(life, (0, 0))[1]:
            self.tombs[life] = (self.fleet.clock.now, version)
        self.delivered[life] = max(version, self.delivered.get(life, (0, 0)))

    @rule(message=sent, stream=st.sampled_from(["s1", "s2"]))
    def beats(self, message: PublicationRecord | Withdrawal, stream: str) -> None:
        if isinstance(message, Withdrawal) or (message.shard_key, message.incarnation) not in self.fleet.leases:
            return
        unknown = self.fleet.beat(message, stream=stream)
        if not unknown:
            life = message.incarnation[0]
            self.heard[life] = self.fleet.clock.now
            self.delivered[life] = max((message.generation, message.sequence), self.delivered[life])

    @rule(stream=st.sampled_from(["s1", "s2"]))
    def breaks(self, stream: str) -> None:
        self.fleet.registry.keep_ended(stream)

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]), sweep=st.booleans())
    def waits(self, seconds: float, sweep: bool) -> None:
        self.fleet.clock.now += seconds
        if sweep:
            self.fleet.registry.sweep()

    @invariant()
    def nothing_late_is_shown(self) -> None:
        now = self.fleet.clock.now
        for view in self.fleet.registry.sources(""):
            record, life = view.record, view.record.incarnation[0]
            assert now < self.heard[life] + TTL  # gone after the TTL
            buried = self.tombs.get(life)
            if buried is not None and now < buried[0] + 2 * TTL:
                assert record.sequence > buried[1][1]  # a withdrawal is final for two TTLs
            assert record.state is not S.WITHDRAWN

    @invariant()
    def nothing_incomplete_is_offered(self) -> None:
        assert self.fleet.find().groups == ()  # only rank 0 of each replica ever speaks
        assert self.fleet.shard() == []


AnyMessages.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyMessages = AnyMessages.TestCase
