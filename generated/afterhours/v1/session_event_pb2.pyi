import datetime

from afterhours.v1 import session_pb2 as _session_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionEventType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_EVENT_TYPE_UNSPECIFIED: _ClassVar[SessionEventType]
    SESSION_EVENT_TYPE_STARTED: _ClassVar[SessionEventType]
    SESSION_EVENT_TYPE_EXTENDED: _ClassVar[SessionEventType]
    SESSION_EVENT_TYPE_EXPIRING: _ClassVar[SessionEventType]
    SESSION_EVENT_TYPE_ENDED: _ClassVar[SessionEventType]
    SESSION_EVENT_TYPE_HEARTBEAT: _ClassVar[SessionEventType]
SESSION_EVENT_TYPE_UNSPECIFIED: SessionEventType
SESSION_EVENT_TYPE_STARTED: SessionEventType
SESSION_EVENT_TYPE_EXTENDED: SessionEventType
SESSION_EVENT_TYPE_EXPIRING: SessionEventType
SESSION_EVENT_TYPE_ENDED: SessionEventType
SESSION_EVENT_TYPE_HEARTBEAT: SessionEventType

class SessionEvent(_message.Message):
    __slots__ = ("cursor", "type", "event_time", "session")
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    cursor: str
    type: SessionEventType
    event_time: _timestamp_pb2.Timestamp
    session: _session_pb2.Session
    def __init__(self, cursor: _Optional[str] = ..., type: _Optional[_Union[SessionEventType, str]] = ..., event_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., session: _Optional[_Union[_session_pb2.Session, _Mapping]] = ...) -> None: ...
