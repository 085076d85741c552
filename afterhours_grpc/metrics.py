"""What is counted, for Prometheus. No label carries a user, a session or a place."""

import collections.abc

import prometheus_client
from prometheus_client import core, registry

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


class _Count(registry.Collector):
    """A counter that is kept elsewhere."""

    def __init__(self, name: str, documentation: str, read: collections.abc.Callable[[], int]) -> None:
        self._name = name
        self._documentation = documentation
        self._read = read

    def collect(self) -> collections.abc.Iterator[core.Metric]:
        """Read the counter."""
        yield core.CounterMetricFamily(self._name, self._documentation, value=self._read())


def count(name: str, documentation: str, read: collections.abc.Callable[[], int]) -> None:
    """Export a counter that must not be locked where it counts, and so is read when it is asked for."""
    REGISTRY.register(_Count(name, documentation, read))
