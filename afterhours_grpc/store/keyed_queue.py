"""A queue whose items have keys: those that share a key leave it one at a time, in the order in which they came."""

import collections
import collections.abc
import typing

from afterhours_grpc.sessions import errors

Key = collections.abc.Hashable


class Keyed(typing.Protocol):
    """An item of the queue, compared by identity. It has at least one key."""

    @property
    def keys(self) -> tuple[Key, ...]:
        """What two items that are out of the queue at the same time must not share."""


Item = typing.TypeVar("Item", bound=Keyed)


class KeyedQueue(typing.Generic[Item]):
    """Holds at most `capacity` items, and at most `per_key` that share a key.

    An item can be taken once no earlier item shares a key with it. A taken item stays in the queue, and keeps those
    behind it waiting, until it is released. Items that can be taken are taken in the order in which they became so.

    To put, take or release an item takes time for those that share a key with it, at most `per_key`, however many
    others wait: one user's calls do not slow down the calls of others.
    """

    def __init__(self, capacity: int, per_key: int) -> None:
        self._capacity = capacity
        self._per_key = per_key
        self._size = 0
        # The items of each key in the order in which they came. The first one is taken or ready, or it has another key
        # too, in whose line it waits.
        self._lines: dict[Key, list[Item]] = {}
        self._ready: collections.deque[Item] = collections.deque()

    def __len__(self) -> int:
        return self._size

    def put(self, item: Item) -> None:
        """Add an item. Raise Overloaded, and add nothing, if there is no room for it."""
        if self._size >= self._capacity:
            raise errors.Overloaded
        is_first = True
        for key in item.keys:
            if line := self._lines.get(key):
                is_first = False
                if len(line) >= self._per_key:
                    raise errors.Overloaded
        for key in item.keys:
            self._lines.setdefault(key, []).append(item)
        if is_first:
            self._ready.append(item)
        self._size += 1

    def last(self, key: Key) -> Item | None:
        """Return the item that came last of those with a key, waiting or taken."""
        line = self._lines.get(key)
        return line[-1] if line else None

    def take(self) -> Item | None:
        """Take an item, or return None if none can be taken now."""
        return self._ready.popleft() if self._ready else None

    def release(self, item: Item) -> None:
        """Remove an item that was taken, so that those behind it can be taken."""
        self._size -= 1
        for key in item.keys:
            line = self._lines[key]
            if len(line) == 1:
                del self._lines[key]
                continue
            was_first = line[0] is item
            line.remove(item)
            if was_first and all(self._lines[each][0] is line[0] for each in line[0].keys):
                self._ready.append(line[0])

    def withdraw(self, item: Item) -> None:
        """Remove an item that was not taken; it takes time for those that are ready before it."""
        if all(self._lines[key][0] is item for key in item.keys):
            self._ready.remove(item)
        self.release(item)
