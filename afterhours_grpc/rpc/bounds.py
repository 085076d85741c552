"""A bound on how much of something each key has at a time."""

import collections
import collections.abc
import contextlib


class Bound:
    """Counts what each key has, of which `most` are allowed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: collections.Counter[str] = collections.Counter()

    def reached(self, key: str) -> bool:
        """Return whether a key has as much as is allowed."""
        return self._counts[key] >= self._most

    @contextlib.contextmanager
    def counted(self, key: str) -> collections.abc.Iterator[None]:
        """Count one more for a key until the context is left."""
        self._counts[key] += 1
        try:
            yield
        finally:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
