"""What is counted, for Prometheus. No label carries a user, a session or a place."""

import prometheus_client

REGISTRY = prometheus_client.CollectorRegistry()

CALLS = prometheus_client.Counter(
    "afterhours_calls", "Calls answered.", ["method", "code", "reason"], registry=REGISTRY
)
SECONDS = prometheus_client.Histogram(
    "afterhours_call_seconds", "Seconds from a call's arrival to its answer.", ["method"], registry=REGISTRY
)
EXPIRED = prometheus_client.Counter(
    "afterhours_sessions_expired", "Sessions that this process closed as EXPIRED, each once.", registry=REGISTRY
)
TIMER_WRITES_FAILED = prometheus_client.Counter(
    "afterhours_timer_writes_failed", "Pipelines of timers that Redis did not take.", registry=REGISTRY
)
RATE_LIMIT_SKIPPED = prometheus_client.Counter(
    "afterhours_rate_limit_skipped", "Starts and extends that passed uncounted, without Redis.", registry=REGISTRY
)
