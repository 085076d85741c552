"""Who calls, and by when it must be answered."""

import contextvars

# Both are set by the interceptor for the length of a call. Without credentials all callers are this one.
caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="anonymous")
# In seconds of time.monotonic().
deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")
