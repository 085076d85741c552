"""Each RPC: parse, call the service, render. Errors are the interceptor's."""

import collections.abc
import contextlib

from afterhours.v1 import (
    profile_service_pb2,
    profile_service_pb2_grpc,
    session_pb2,
    session_service_pb2,
    session_service_pb2_grpc,
)
from google.protobuf import message

from afterhours_grpc.events import feed
from afterhours_grpc.rpc import auth, bounds, cursors, listing, rendering, tokens, wire
from afterhours_grpc.sessions import errors, service, session
from afterhours_grpc.sessions import listing as listed

# Watches of one caller who may watch nobody else. Each event costs as much as a call for every watch that gets it, and
# the caller causes events at will.
_MAX_OWN_WATCHES = 64


class SessionServicer(session_service_pb2_grpc.SessionServiceServicer):
    """afterhours.v1.SessionService; see its proto."""

    def __init__(
        self,
        sessions: service.Sessions,
        lists: listed.Listing,
        feed: feed.Feed[bytes],
        durations: wire.Durations,
        pages: cursors.Pages,
    ) -> None:
        self._sessions = sessions
        self._lists = lists
        self._feed = feed
        self._durations = durations
        self._pages = pages
        self._own_watches = bounds.Bound(_MAX_OWN_WATCHES)

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

    async def BatchGetSessions(  # noqa: N802
        self, request: session_service_pb2.BatchGetSessionsRequest, _: auth.Context
    ) -> session_service_pb2.BatchGetSessionsResponse:
        user_ids, min_remaining = listing.of_users(request)
        caller = auth.caller.get()
        caller.check(auth.Scope.ANY)
        found = await self._lists.of_users(caller.id, user_ids, min_remaining, auth.deadline.get())
        return session_service_pb2.BatchGetSessionsResponse(sessions=map(rendering.session_message, found))

    async def ListSessions(  # noqa: N802
        self, request: session_service_pb2.ListSessionsRequest, _: auth.Context
    ) -> session_service_pb2.ListSessionsResponse:
        caller = auth.caller.get()
        user_id, page = listing.history(request, self._pages, caller)
        caller.check(auth.Scope.ANY, user_id=user_id)
        found = await self._lists.history(user_id, page.started(listed.LAST), page.size + 1, auth.deadline.get())
        keyed = [(each, listing.started_key(each)) for each in found]
        sessions, token = self._paged(request, keyed, page)
        return session_service_pb2.ListSessionsResponse(sessions=sessions, next_page_token=token)

    async def ListActiveSessions(  # noqa: N802
        self, request: session_service_pb2.ListActiveSessionsRequest, _: auth.Context
    ) -> session_service_pb2.ListActiveSessionsResponse:
        caller, deadline = auth.caller.get(), auth.deadline.get()
        min_remaining, page, near = listing.active(request, self._pages, caller)
        caller.check(auth.Scope.ANY)
        if near:
            measured = await self._lists.near(caller.id, near, min_remaining, page.size + 1, deadline)
            keyed = [(each, listing.distance_key(each, meters)) for each, meters in measured]
        else:
            found = await self._lists.active(
                caller.id, min_remaining, page.started(listed.FIRST), page.size + 1, deadline
            )
            keyed = [(each, listing.started_key(each)) for each in found]
        sessions, token = self._paged(request, keyed, page)
        return session_service_pb2.ListActiveSessionsResponse(sessions=sessions, next_page_token=token)

    def _paged(
        self, request: message.Message, keyed: list[tuple[session.Session, cursors.Key]], page: listing.Page
    ) -> tuple[list[session_pb2.Session], str]:
        """Render a page, and sign the token of the next if one more session than it holds was found."""
        shown = keyed[: page.size]
        more = len(keyed) > page.size
        token = self._pages.sign(request, auth.caller.get().id, shown[-1][1]) if more else ""
        return [rendering.session_message(each) for each, _ in shown], token

    async def WatchSessions(  # type: ignore[override]  # noqa: N802 - in bytes, rendered once for all who watch
        self, request: session_service_pb2.WatchSessionsRequest, _: auth.Context
    ) -> collections.abc.AsyncGenerator[bytes, None]:
        caller = auth.caller.get()
        user_ids, position = listing.watch(request, caller)
        own = not caller.may_watch_all
        if own:
            for user_id in user_ids or ():
                caller.check(user_id=user_id)
            if self._own_watches.reached(caller.id):
                raise errors.Overloaded
        with self._own_watches.counted(caller.id) if own else contextlib.nullcontext():
            told_all = self._feed.watch(user_ids, position, caller.until(), tokens.expired)
            async with contextlib.aclosing(told_all) as watched:
                async for told in watched:
                    yield rendering.heartbeat_bytes(told.position) if told.event is None else told.event

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
