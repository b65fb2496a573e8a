from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_UNSPECIFIED: _ClassVar[Stage]
    STAGE_LOADED: _ClassVar[Stage]
    STAGE_PROCESSED: _ClassVar[Stage]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_TARGET: _ClassVar[Role]
    ROLE_DRAFT: _ClassVar[Role]

class PublicationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUBLICATION_STATE_UNSPECIFIED: _ClassVar[PublicationState]
    PUBLICATION_STATE_LOADING: _ClassVar[PublicationState]
    PUBLICATION_STATE_HELD: _ClassVar[PublicationState]
    PUBLICATION_STATE_RELAYING: _ClassVar[PublicationState]
    PUBLICATION_STATE_READY: _ClassVar[PublicationState]
    PUBLICATION_STATE_PAUSED: _ClassVar[PublicationState]
    PUBLICATION_STATE_WITHDRAWN: _ClassVar[PublicationState]
STAGE_UNSPECIFIED: Stage
STAGE_LOADED: Stage
STAGE_PROCESSED: Stage
ROLE_UNSPECIFIED: Role
ROLE_TARGET: Role
ROLE_DRAFT: Role
PUBLICATION_STATE_UNSPECIFIED: PublicationState
PUBLICATION_STATE_LOADING: PublicationState
PUBLICATION_STATE_HELD: PublicationState
PUBLICATION_STATE_RELAYING: PublicationState
PUBLICATION_STATE_READY: PublicationState
PUBLICATION_STATE_PAUSED: PublicationState
PUBLICATION_STATE_WITHDRAWN: PublicationState

class Coordinates(_message.Message):
    __slots__ = ("tp_rank", "tp_size", "pp_rank", "pp_size", "ep_rank", "ep_size", "dp_rank", "dp_size")
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PP_RANK_FIELD_NUMBER: _ClassVar[int]
    PP_SIZE_FIELD_NUMBER: _ClassVar[int]
    EP_RANK_FIELD_NUMBER: _ClassVar[int]
    EP_SIZE_FIELD_NUMBER: _ClassVar[int]
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    DP_SIZE_FIELD_NUMBER: _ClassVar[int]
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    ep_rank: int
    ep_size: int
    dp_rank: int
    dp_size: int
    def __init__(self, tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., pp_rank: _Optional[int] = ..., pp_size: _Optional[int] = ..., ep_rank: _Optional[int] = ..., ep_size: _Optional[int] = ..., dp_rank: _Optional[int] = ..., dp_size: _Optional[int] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
