"""Who calls, and by when it must be applied."""

import contextvars

from afterhours_grpc.sessions import session

# Both are set by the interceptor for the length of a call. Without credentials all callers are this one.
caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="anonymous")
deadline: contextvars.ContextVar[session.Deadline] = contextvars.ContextVar("deadline")
