import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Profile(_message.Message):
    __slots__ = ("user_id", "premium_expire_time", "identity_verified", "location_consent")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PREMIUM_EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_VERIFIED_FIELD_NUMBER: _ClassVar[int]
    LOCATION_CONSENT_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    premium_expire_time: _timestamp_pb2.Timestamp
    identity_verified: bool
    location_consent: bool
    def __init__(self, user_id: _Optional[str] = ..., premium_expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., identity_verified: _Optional[bool] = ..., location_consent: _Optional[bool] = ...) -> None: ...
