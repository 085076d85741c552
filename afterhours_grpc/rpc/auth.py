"""Who calls."""

import contextvars

# Set by the interceptor for the length of a call. Without credentials all callers are this one.
caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="anonymous")
