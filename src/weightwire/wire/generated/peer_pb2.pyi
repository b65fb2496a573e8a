from weightwire.wire.generated import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShardRequest(_message.Message):
    __slots__ = ("shard_key", "incarnation")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    incarnation: str
    def __init__(self, shard_key: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class PeerStatus(_message.Message):
    __slots__ = ("shard_key", "incarnation", "generation", "state", "content_id", "derived_id", "weights_id")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_ID_FIELD_NUMBER: _ClassVar[int]
    DERIVED_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    incarnation: str
    generation: int
    state: _common_pb2.PublicationState
    content_id: str
    derived_id: str
    weights_id: str
    def __init__(self, shard_key: _Optional[str] = ..., incarnation: _Optional[str] = ..., generation: _Optional[int] = ..., state: _Optional[_Union[_common_pb2.PublicationState, str]] = ..., content_id: _Optional[str] = ..., derived_id: _Optional[str] = ..., weights_id: _Optional[str] = ...) -> None: ...

class ManifestPart(_message.Message):
    __slots__ = ("header", "states", "absent", "digests", "weights", "derived", "shardings")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DERIVED_FIELD_NUMBER: _ClassVar[int]
    SHARDINGS_FIELD_NUMBER: _ClassVar[int]
    header: ManifestHeader
    states: States
    absent: Names
    digests: bytes
    weights: bytes
    derived: bytes
    shardings: bytes
    def __init__(self, header: _Optional[_Union[ManifestHeader, _Mapping]] = ..., states: _Optional[_Union[States, _Mapping]] = ..., absent: _Optional[_Union[Names, _Mapping]] = ..., digests: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., derived: _Optional[bytes] = ..., shardings: _Optional[bytes] = ...) -> None: ...

class ManifestHeader(_message.Message):
    __slots__ = ("shard_key", "incarnation", "generation", "content_id", "derived_id", "weights_id", "stage", "role", "coordinates", "revision", "ordinal", "build_facts", "states", "absent", "digest_bytes", "weight_leaves", "weights_bytes", "derived_bytes", "shardings_bytes")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_ID_FIELD_NUMBER: _ClassVar[int]
    DERIVED_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ORDINAL_FIELD_NUMBER: _ClassVar[int]
    BUILD_FACTS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_LEAVES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    DERIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARDINGS_BYTES_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    incarnation: str
    generation: int
    content_id: str
    derived_id: str
    weights_id: str
    stage: _common_pb2.Stage
    role: _common_pb2.Role
    coordinates: _common_pb2.Coordinates
    revision: str
    ordinal: int
    build_facts: bytes
    states: int
    absent: int
    digest_bytes: int
    weight_leaves: int
    weights_bytes: int
    derived_bytes: int
    shardings_bytes: int
    def __init__(self, shard_key: _Optional[str] = ..., incarnation: _Optional[str] = ..., generation: _Optional[int] = ..., content_id: _Optional[str] = ..., derived_id: _Optional[str] = ..., weights_id: _Optional[str] = ..., stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., coordinates: _Optional[_Union[_common_pb2.Coordinates, _Mapping]] = ..., revision: _Optional[str] = ..., ordinal: _Optional[int] = ..., build_facts: _Optional[bytes] = ..., states: _Optional[int] = ..., absent: _Optional[int] = ..., digest_bytes: _Optional[int] = ..., weight_leaves: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., derived_bytes: _Optional[int] = ..., shardings_bytes: _Optional[int] = ...) -> None: ...

class States(_message.Message):
    __slots__ = ("states",)
    STATES_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedCompositeFieldContainer[ModuleState]
    def __init__(self, states: _Optional[_Iterable[_Union[ModuleState, _Mapping]]] = ...) -> None: ...

class ModuleState(_message.Message):
    __slots__ = ("module", "state")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    module: str
    state: bytes
    def __init__(self, module: _Optional[str] = ..., state: _Optional[bytes] = ...) -> None: ...

class Names(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class OpenReadRequest(_message.Message):
    __slots__ = ("shard_key", "incarnation", "content_id", "reader", "reader_host", "transports", "layout_digest")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_ID_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    READER_HOST_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    incarnation: str
    content_id: str
    reader: str
    reader_host: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    layout_digest: str
    def __init__(self, shard_key: _Optional[str] = ..., incarnation: _Optional[str] = ..., content_id: _Optional[str] = ..., reader: _Optional[str] = ..., reader_host: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ..., layout_digest: _Optional[str] = ...) -> None: ...

class GrantPart(_message.Message):
    __slots__ = ("grant", "endpoint")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    grant: Grant
    endpoint: bytes
    def __init__(self, grant: _Optional[_Union[Grant, _Mapping]] = ..., endpoint: _Optional[bytes] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("lease", "generation", "ttl_s", "endpoints", "rate")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    generation: int
    ttl_s: float
    endpoints: _containers.RepeatedCompositeFieldContainer[EndpointHead]
    rate: float
    def __init__(self, lease: _Optional[bytes] = ..., generation: _Optional[int] = ..., ttl_s: _Optional[float] = ..., endpoints: _Optional[_Iterable[_Union[EndpointHead, _Mapping]]] = ..., rate: _Optional[float] = ...) -> None: ...

class EndpointHead(_message.Message):
    __slots__ = ("transport", "nbytes")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    transport: str
    nbytes: int
    def __init__(self, transport: _Optional[str] = ..., nbytes: _Optional[int] = ...) -> None: ...

class ProgressRequest(_message.Message):
    __slots__ = ("incarnation", "lease", "since")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    lease: bytes
    since: int
    def __init__(self, incarnation: _Optional[str] = ..., lease: _Optional[bytes] = ..., since: _Optional[int] = ...) -> None: ...

class LeafRange(_message.Message):
    __slots__ = ("first", "count")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class ProgressUpdate(_message.Message):
    __slots__ = ("version", "generation", "ranges", "complete", "rate", "digests")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    generation: int
    ranges: _containers.RepeatedCompositeFieldContainer[LeafRange]
    complete: bool
    rate: float
    digests: bytes
    def __init__(self, version: _Optional[int] = ..., generation: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[LeafRange, _Mapping]]] = ..., complete: bool = ..., rate: _Optional[float] = ..., digests: _Optional[bytes] = ...) -> None: ...

class CloseReadRequest(_message.Message):
    __slots__ = ("incarnation", "lease")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    lease: bytes
    def __init__(self, incarnation: _Optional[str] = ..., lease: _Optional[bytes] = ...) -> None: ...

class SelfCheckRequest(_message.Message):
    __slots__ = ("shard_key", "incarnation", "leaf")
    SHARD_KEY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    shard_key: str
    incarnation: str
    leaf: int
    def __init__(self, shard_key: _Optional[str] = ..., incarnation: _Optional[str] = ..., leaf: _Optional[int] = ...) -> None: ...

class SelfCheckResponse(_message.Message):
    __slots__ = ("ok",)
    OK_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    def __init__(self, ok: bool = ...) -> None: ...
