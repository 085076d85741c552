"""Each RPC: parse, call the service, render. Errors are the interceptor's."""

from afterhours.v1 import (
    profile_service_pb2,
    profile_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)

from afterhours_grpc.rpc import auth, rendering, wire
from afterhours_grpc.sessions import service


class SessionServicer(session_service_pb2_grpc.SessionServiceServicer):
    """afterhours.v1.SessionService; see its proto."""

    def __init__(self, sessions: service.Sessions, durations: wire.Durations) -> None:
        self._sessions = sessions
        self._durations = durations

    async def StartSession(  # noqa: N802 - the proto's name, as below
        self, request: session_service_pb2.StartSessionRequest, _: auth.Context
    ) -> session_service_pb2.StartSessionResponse:
        caller = auth.caller.get()
        call = wire.start(request, caller, auth.deadline.get(), self._durations)
        caller.check(auth.Scope.ANY, user_id=call.user_id)
        started = await self._sessions.start(call)
        return session_service_pb2.StartSessionResponse(session=rendering.session_message(started))

    async def EndSession(  # noqa: N802
        self, request: session_service_pb2.EndSessionRequest, _: auth.Context
    ) -> session_service_pb2.EndSessionResponse:
        caller = auth.caller.get()
        call = wire.end(request, caller, auth.deadline.get())
        caller.check(auth.Scope.ANY, user_id=call.user_id)
        ended = await self._sessions.end(call)
        return session_service_pb2.EndSessionResponse(session=rendering.session_message(ended))

    async def ExtendSession(  # noqa: N802
        self, request: session_service_pb2.ExtendSessionRequest, _: auth.Context
    ) -> session_service_pb2.ExtendSessionResponse:
        caller = auth.caller.get()
        call = wire.extend(request, caller, auth.deadline.get(), self._durations)
        caller.check(auth.Scope.ANY, user_id=call.user_id)
        extended = await self._sessions.extend(call)
        return session_service_pb2.ExtendSessionResponse(session=rendering.session_message(extended))

    async def GetSession(  # noqa: N802
        self, request: session_service_pb2.GetSessionRequest, _: auth.Context
    ) -> session_service_pb2.GetSessionResponse:
        caller = auth.caller.get()
        user_id = wire.user_id(request, caller)
        caller.check(auth.Scope.ANY, user_id=user_id)
        found = await self._sessions.get(user_id, auth.deadline.get())
        if found is None:
            return session_service_pb2.GetSessionResponse(active=False)
        return session_service_pb2.GetSessionResponse(active=True, session=rendering.session_message(found))

    async def GetExactLocation(  # noqa: N802
        self, request: session_service_pb2.GetExactLocationRequest, _: auth.Context
    ) -> session_service_pb2.GetExactLocationResponse:
        caller = auth.caller.get()
        call = wire.exact_location(request, caller, auth.deadline.get())
        caller.check(auth.Scope.EXACT)
        exact = await self._sessions.exact_location(call)
        return session_service_pb2.GetExactLocationResponse(location=rendering.location_message(exact))


class ProfileServicer(profile_service_pb2_grpc.ProfileServiceServicer):
    """afterhours.v1.ProfileService; see its proto."""

    def __init__(self, profiles: service.Profiles) -> None:
        self._profiles = profiles

    async def PutProfile(  # noqa: N802
        self, request: profile_service_pb2.PutProfileRequest, _: auth.Context
    ) -> profile_service_pb2.PutProfileResponse:
        profile = wire.put_profile(request)
        auth.caller.get().check(auth.Scope.PROFILES)
        stored = await self._profiles.put(profile, auth.deadline.get())
        return profile_service_pb2.PutProfileResponse(profile=rendering.profile_message(stored))

    async def GetProfile(  # noqa: N802
        self, request: profile_service_pb2.GetProfileRequest, _: auth.Context
    ) -> profile_service_pb2.GetProfileResponse:
        caller = auth.caller.get()
        user_id = wire.user_id(request, caller)
        caller.check(auth.Scope.ANY, auth.Scope.PROFILES, user_id=user_id)
        found = await self._profiles.get(user_id, auth.deadline.get())
        return profile_service_pb2.GetProfileResponse(profile=rendering.profile_message(found))

    async def DeleteProfile(  # noqa: N802
        self, request: profile_service_pb2.DeleteProfileRequest, _: auth.Context
    ) -> profile_service_pb2.DeleteProfileResponse:
        user_id = wire.delete_profile(request)
        auth.caller.get().check(auth.Scope.PROFILES)
        await self._profiles.delete(user_id, auth.deadline.get())
        return profile_service_pb2.DeleteProfileResponse()
