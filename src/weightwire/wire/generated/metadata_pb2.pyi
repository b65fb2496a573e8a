from weightwire.wire.generated import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FailureKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_KIND_UNSPECIFIED: _ClassVar[FailureKind]
    FAILURE_KIND_LOST: _ClassVar[FailureKind]
    FAILURE_KIND_STALLED: _ClassVar[FailureKind]
    FAILURE_KIND_MISMATCH: _ClassVar[FailureKind]
    FAILURE_KIND_PROTOCOL: _ClassVar[FailureKind]
FAILURE_KIND_UNSPECIFIED: FailureKind
FAILURE_KIND_LOST: FailureKind
FAILURE_KIND_STALLED: FailureKind
FAILURE_KIND_MISMATCH: FailureKind
FAILURE_KIND_PROTOCOL: FailureKind

class PublicationRecord(_message.Message):
    __slots__ = ("shard_key", "replica_key", "family_key", "model_id", "identity", "revision", "coordinates", "role", "stage", "incarnation", "replica_incarnation", "world_size", "endpoints", "content_id", "weights_id", "ordinal", "nbytes", "state", "generation", "sequence", "host", "fraction", "bytes_done", "active_reads", "following")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    REPLICA_KEY_FIELD_NUMBER: _ClassVar[int]
    FAMILY_KEY_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REPLICA_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_READS_FIELD_NUMBER: _ClassVar[int]
    FOLLOWING_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    replica_key: str
    family_key: str
    model_id: str
    identity: str
    revision: str
    coordinates: _common_pb2.Coordinates
    role: _common_pb2.Role
    stage: _common_pb2.Stage
    incarnation: str
    replica_incarnation: str
    world_size: int
    endpoints: _containers.RepeatedScalarFieldContainer[str]
    content_id: str
    weights_id: str
    ordinal: int
    nbytes: int
    state: _common_pb2.PublicationState
    generation: int
    sequence: int
    host: str
    fraction: float
    bytes_done: int
    active_reads: int
    following: str
    def __init__(self, shard_key: _Optional[str] = ..., replica_key: _Optional[str] = ..., family_key: _Optional[str] = ..., model_id: _Optional[str] = ..., identity: _Optional[str] = ..., revision: _Optional[str] = ..., coordinates: _Optional[_Union[_common_pb2.Coordinates, _Mapping]] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., incarnation: _Optional[str] = ..., replica_incarnation: _Optional[str] = ..., world_size: _Optional[int] = ..., endpoints: _Optional[_Iterable[str]] = ..., content_id: _Optional[str] = ..., weights_id: _Optional[str] = ..., ordinal: _Optional[int] = ..., nbytes: _Optional[int] = ..., state: _Optional[_Union[_common_pb2.PublicationState, str]] = ..., generation: _Optional[int] = ..., sequence: _Optional[int] = ..., host: _Optional[str] = ..., fraction: _Optional[float] = ..., bytes_done: _Optional[int] = ..., active_reads: _Optional[int] = ..., following: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "ttl_s")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    ttl_s: float
    def __init__(self, lease_id: _Optional[str] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class KeepUpdate(_message.Message):
    __slots__ = ("lease_id", "generation", "sequence", "state", "fraction", "bytes_done", "active_reads")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_READS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    generation: int
    sequence: int
    state: _common_pb2.PublicationState
    fraction: float
    bytes_done: int
    active_reads: int
    def __init__(self, lease_id: _Optional[str] = ..., generation: _Optional[int] = ..., sequence: _Optional[int] = ..., state: _Optional[_Union[_common_pb2.PublicationState, str]] = ..., fraction: _Optional[float] = ..., bytes_done: _Optional[int] = ..., active_reads: _Optional[int] = ...) -> None: ...

class CheckResult(_message.Message):
    __slots__ = ("lease_id", "leaf", "ok")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    leaf: int
    ok: bool
    def __init__(self, lease_id: _Optional[str] = ..., leaf: _Optional[int] = ..., ok: bool = ...) -> None: ...

class KeepBeat(_message.Message):
    __slots__ = ("updates", "checks")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[KeepUpdate]
    checks: _containers.RepeatedCompositeFieldContainer[CheckResult]
    def __init__(self, updates: _Optional[_Iterable[_Union[KeepUpdate, _Mapping]]] = ..., checks: _Optional[_Iterable[_Union[CheckResult, _Mapping]]] = ...) -> None: ...

class Recheck(_message.Message):
    __slots__ = ("lease_id", "leaf")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    leaf: int
    def __init__(self, lease_id: _Optional[str] = ..., leaf: _Optional[int] = ...) -> None: ...

class KeepAnswer(_message.Message):
    __slots__ = ("unknown", "rechecks", "ttl_s")
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    RECHECKS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    unknown: _containers.RepeatedScalarFieldContainer[str]
    rechecks: _containers.RepeatedCompositeFieldContainer[Recheck]
    ttl_s: float
    def __init__(self, unknown: _Optional[_Iterable[str]] = ..., rechecks: _Optional[_Iterable[_Union[Recheck, _Mapping]]] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class Withdrawal(_message.Message):
    __slots__ = ("shard_key", "incarnation", "generation", "sequence")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    incarnation: str
    generation: int
    sequence: int
    def __init__(self, shard_key: _Optional[str] = ..., incarnation: _Optional[str] = ..., generation: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class FindReplicasRequest(_message.Message):
    __slots__ = ("replica_keys", "family_keys", "model_id", "replica_incarnation")
    REPLICA_KEYS_FIELD_NUMBER: _ClassVar[int]
    FAMILY_KEYS_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REPLICA_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    replica_keys: _containers.RepeatedScalarFieldContainer[str]
    family_keys: _containers.RepeatedScalarFieldContainer[str]
    model_id: str
    replica_incarnation: str
    def __init__(self, replica_keys: _Optional[_Iterable[str]] = ..., family_keys: _Optional[_Iterable[str]] = ..., model_id: _Optional[str] = ..., replica_incarnation: _Optional[str] = ...) -> None: ...

class ReplicaOffer(_message.Message):
    __slots__ = ("replica_key", "replica_incarnation", "stage", "revision", "ordinal", "world_size", "nbytes", "suspect", "reports", "active_reads")
    REPLICA_KEY_FIELD_NUMBER: _ClassVar[int]
    REPLICA_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_READS_FIELD_NUMBER: _ClassVar[int]
    replica_key: str
    replica_incarnation: str
    stage: _common_pb2.Stage
    revision: str
    ordinal: int
    world_size: int
    nbytes: int
    suspect: bool
    reports: int
    active_reads: int
    def __init__(self, replica_key: _Optional[str] = ..., replica_incarnation: _Optional[str] = ..., stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., revision: _Optional[str] = ..., ordinal: _Optional[int] = ..., world_size: _Optional[int] = ..., nbytes: _Optional[int] = ..., suspect: bool = ..., reports: _Optional[int] = ..., active_reads: _Optional[int] = ...) -> None: ...

class WeightsGroup(_message.Message):
    __slots__ = ("replica_key", "stage", "weights_id", "ordinal", "revisions", "replicas")
    REPLICA_KEY_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replica_key: str
    stage: _common_pb2.Stage
    weights_id: str
    ordinal: int
    revisions: _containers.RepeatedScalarFieldContainer[str]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaOffer]
    def __init__(self, replica_key: _Optional[str] = ..., stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., weights_id: _Optional[str] = ..., ordinal: _Optional[int] = ..., revisions: _Optional[_Iterable[str]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaOffer, _Mapping]]] = ...) -> None: ...

class LoadingReplica(_message.Message):
    __slots__ = ("replica_key", "replica_incarnation", "stage", "revision", "state", "weights_id", "world_size", "ranks", "fraction", "bytes_done", "nbytes", "elapsed_s", "quiet_s", "live", "earlier", "followable", "following")
    REPLICA_KEY_FIELD_NUMBER: _ClassVar[int]
    REPLICA_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    QUIET_S_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    EARLIER_FIELD_NUMBER: _ClassVar[int]
    FOLLOWABLE_FIELD_NUMBER: _ClassVar[int]
    FOLLOWING_FIELD_NUMBER: _ClassVar[int]
    replica_key: str
    replica_incarnation: str
    stage: _common_pb2.Stage
    revision: str
    state: _common_pb2.PublicationState
    weights_id: str
    world_size: int
    ranks: int
    fraction: float
    bytes_done: int
    nbytes: int
    elapsed_s: float
    quiet_s: float
    live: bool
    earlier: bool
    followable: bool
    following: str
    def __init__(self, replica_key: _Optional[str] = ..., replica_incarnation: _Optional[str] = ..., stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., revision: _Optional[str] = ..., state: _Optional[_Union[_common_pb2.PublicationState, str]] = ..., weights_id: _Optional[str] = ..., world_size: _Optional[int] = ..., ranks: _Optional[int] = ..., fraction: _Optional[float] = ..., bytes_done: _Optional[int] = ..., nbytes: _Optional[int] = ..., elapsed_s: _Optional[float] = ..., quiet_s: _Optional[float] = ..., live: bool = ..., earlier: bool = ..., followable: bool = ..., following: _Optional[str] = ...) -> None: ...

class OtherReplica(_message.Message):
    __slots__ = ("replica_key", "family_key", "replica_incarnation", "stage", "role", "state", "revision", "world_size", "ranks", "identity")
    REPLICA_KEY_FIELD_NUMBER: _ClassVar[int]
    FAMILY_KEY_FIELD_NUMBER: _ClassVar[int]
    REPLICA_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    replica_key: str
    family_key: str
    replica_incarnation: str
    stage: _common_pb2.Stage
    role: _common_pb2.Role
    state: _common_pb2.PublicationState
    revision: str
    world_size: int
    ranks: int
    identity: str
    def __init__(self, replica_key: _Optional[str] = ..., family_key: _Optional[str] = ..., replica_incarnation: _Optional[str] = ..., stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., state: _Optional[_Union[_common_pb2.PublicationState, str]] = ..., revision: _Optional[str] = ..., world_size: _Optional[int] = ..., ranks: _Optional[int] = ..., identity: _Optional[str] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("subject", "reason")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    subject: str
    reason: str
    def __init__(self, subject: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ReplicaListing(_message.Message):
    __slots__ = ("groups", "loading", "others", "rejected", "warming_s")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    WARMING_S_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[WeightsGroup]
    loading: _containers.RepeatedCompositeFieldContainer[LoadingReplica]
    others: _containers.RepeatedCompositeFieldContainer[OtherReplica]
    rejected: _containers.RepeatedCompositeFieldContainer[Rejection]
    warming_s: float
    def __init__(self, groups: _Optional[_Iterable[_Union[WeightsGroup, _Mapping]]] = ..., loading: _Optional[_Iterable[_Union[LoadingReplica, _Mapping]]] = ..., others: _Optional[_Iterable[_Union[OtherReplica, _Mapping]]] = ..., rejected: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ..., warming_s: _Optional[float] = ...) -> None: ...

class FindShardRequest(_message.Message):
    __slots__ = ("shard_key", "weights_id", "exclude", "asker", "following")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    ASKER_FIELD_NUMBER: _ClassVar[int]
    FOLLOWING_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    weights_id: str
    exclude: _containers.RepeatedScalarFieldContainer[str]
    asker: str
    following: str
    def __init__(self, shard_key: _Optional[str] = ..., weights_id: _Optional[str] = ..., exclude: _Optional[_Iterable[str]] = ..., asker: _Optional[str] = ..., following: _Optional[str] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("record", "reason", "suspect", "reports", "seated", "part", "parts")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    SEATED_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    record: PublicationRecord
    reason: str
    suspect: bool
    reports: int
    seated: bool
    part: int
    parts: int
    def __init__(self, record: _Optional[_Union[PublicationRecord, _Mapping]] = ..., reason: _Optional[str] = ..., suspect: bool = ..., reports: _Optional[int] = ..., seated: bool = ..., part: _Optional[int] = ..., parts: _Optional[int] = ...) -> None: ...

class ShardListing(_message.Message):
    __slots__ = ("candidates", "rejected")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    rejected: _containers.RepeatedCompositeFieldContainer[Rejection]
    def __init__(self, candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., rejected: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ...) -> None: ...

class PeerFailure(_message.Message):
    __slots__ = ("shard_key", "incarnation", "generation", "kind", "leaf", "reporter", "reporter_host", "detail")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    REPORTER_FIELD_NUMBER: _ClassVar[int]
    REPORTER_HOST_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    incarnation: str
    generation: int
    kind: FailureKind
    leaf: int
    reporter: str
    reporter_host: str
    detail: str
    def __init__(self, shard_key: _Optional[str] = ..., incarnation: _Optional[str] = ..., generation: _Optional[int] = ..., kind: _Optional[_Union[FailureKind, str]] = ..., leaf: _Optional[int] = ..., reporter: _Optional[str] = ..., reporter_host: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class ReportAnswer(_message.Message):
    __slots__ = ("counted", "quarantined", "reason")
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    counted: bool
    quarantined: bool
    reason: str
    def __init__(self, counted: bool = ..., quarantined: bool = ..., reason: _Optional[str] = ...) -> None: ...

class SourcesRequest(_message.Message):
    __slots__ = ("model_id",)
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    def __init__(self, model_id: _Optional[str] = ...) -> None: ...

class SourceView(_message.Message):
    __slots__ = ("record", "suspect", "quarantined", "reports", "age_s", "remaining_s", "note")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    record: PublicationRecord
    suspect: bool
    quarantined: bool
    reports: int
    age_s: float
    remaining_s: float
    note: str
    def __init__(self, record: _Optional[_Union[PublicationRecord, _Mapping]] = ..., suspect: bool = ..., quarantined: bool = ..., reports: _Optional[int] = ..., age_s: _Optional[float] = ..., remaining_s: _Optional[float] = ..., note: _Optional[str] = ...) -> None: ...

class DecideRequest(_message.Message):
    __slots__ = ("key", "value", "wait_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    wait_s: float
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ..., wait_s: _Optional[float] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
