"""Each RPC: parse, call the service, render. Errors are the interceptor's."""

import typing

import grpc
from afterhours.v1 import (
    profile_service_pb2,
    profile_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)

from afterhours_grpc.rpc import auth, wire
from afterhours_grpc.sessions import service

_Context: typing.TypeAlias = "grpc.aio.ServicerContext[typing.Any, typing.Any]"


class SessionServicer(session_service_pb2_grpc.SessionServiceServicer):
    """afterhours.v1.SessionService; see its proto."""

    def __init__(self, sessions: service.Sessions, durations: wire.Durations) -> None:
        self._sessions = sessions
        self._durations = durations

    async def StartSession(  # noqa: N802 - the proto's name, as below
        self, request: session_service_pb2.StartSessionRequest, _: _Context
    ) -> session_service_pb2.StartSessionResponse:
        call = wire.start(request, auth.caller.get(), auth.deadline.get(), self._durations)
        started = await self._sessions.start(call)
        return session_service_pb2.StartSessionResponse(session=wire.session_message(started))

    async def EndSession(  # noqa: N802
        self, request: session_service_pb2.EndSessionRequest, _: _Context
    ) -> session_service_pb2.EndSessionResponse:
        ended = await self._sessions.end(wire.end(request, auth.caller.get(), auth.deadline.get()))
        return session_service_pb2.EndSessionResponse(session=wire.session_message(ended))

    async def ExtendSession(  # noqa: N802
        self, request: session_service_pb2.ExtendSessionRequest, _: _Context
    ) -> session_service_pb2.ExtendSessionResponse:
        call = wire.extend(request, auth.caller.get(), auth.deadline.get(), self._durations)
        extended = await self._sessions.extend(call)
        return session_service_pb2.ExtendSessionResponse(session=wire.session_message(extended))

    async def GetSession(  # noqa: N802
        self, request: session_service_pb2.GetSessionRequest, _: _Context
    ) -> session_service_pb2.GetSessionResponse:
        found = await self._sessions.get(wire.user_id(request), auth.deadline.get())
        if found is None:
            return session_service_pb2.GetSessionResponse(active=False)
        return session_service_pb2.GetSessionResponse(active=True, session=wire.session_message(found))


class ProfileServicer(profile_service_pb2_grpc.ProfileServiceServicer):
    """afterhours.v1.ProfileService; see its proto."""

    def __init__(self, profiles: service.Profiles) -> None:
        self._profiles = profiles

    async def PutProfile(  # noqa: N802
        self, request: profile_service_pb2.PutProfileRequest, _: _Context
    ) -> profile_service_pb2.PutProfileResponse:
        stored = await self._profiles.put(wire.put_profile(request), auth.deadline.get())
        return profile_service_pb2.PutProfileResponse(profile=wire.profile_message(stored))

    async def GetProfile(  # noqa: N802
        self, request: profile_service_pb2.GetProfileRequest, _: _Context
    ) -> profile_service_pb2.GetProfileResponse:
        found = await self._profiles.get(wire.user_id(request), auth.deadline.get())
        return profile_service_pb2.GetProfileResponse(profile=wire.profile_message(found))

    async def DeleteProfile(  # noqa: N802
        self, request: profile_service_pb2.DeleteProfileRequest, _: _Context
    ) -> profile_service_pb2.DeleteProfileResponse:
        await self._profiles.delete(wire.user_id(request), auth.deadline.get())
        return profile_service_pb2.DeleteProfileResponse()
