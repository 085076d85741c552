"""The batcher and its queue, without a database: whatever comes in whatever order, and goes away again."""

import asyncio
import collections
import dataclasses
import random
import time

import pytest

from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import batching, database, keyed_queue

CAPACITY, PER_KEY = 12, 4


@dataclasses.dataclass(eq=False)
class Item:
    """An item; two with the same content are still two."""

    keys: tuple[str, ...]


class Model:
    """What a queue holds, in the order in which it came, and what of it is taken."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.taken: list[Item] = []

    def has_room(self, keys: tuple[str, ...]) -> bool:
        """Whether an item with these keys may come in."""
        full = any(sum(key in item.keys for item in self.items) >= PER_KEY for key in keys)
        return len(self.items) < CAPACITY and not full

    def ready(self) -> list[Item]:
        """Return what may be taken: what shares no key with an earlier item."""
        found, seen = [], set[str]()
        for item in self.items:
            if seen.isdisjoint(item.keys) and item not in self.taken:
                found.append(item)
            seen.update(item.keys)
        return found

    def remove(self, item: Item) -> None:
        """Remove an item, taken or not."""
        self.items.remove(item)
        if item in self.taken:
            self.taken.remove(item)


@pytest.mark.parametrize("seed", range(20))
def test_a_queue_does_what_its_model_does(seed: int) -> None:
    """Whatever is put, taken, released and withdrawn, items that share a key keep their order and are taken alone."""
    chance = random.Random(seed)
    queue: keyed_queue.KeyedQueue[Item] = keyed_queue.KeyedQueue(CAPACITY, PER_KEY)
    model = Model()
    for _ in range(500):
        waiting = [item for item in model.items if item not in model.taken]
        match chance.choice(("put", "put", "take", "release", "withdraw")):
            case "put":
                item = Item((chance.choice("abcde"), *chance.choice(((), ("x",), ("y",)))))
                if model.has_room(item.keys):
                    queue.put(item)
                    model.items.append(item)
                else:
                    with pytest.raises(errors.Overloaded):
                        queue.put(item)
            case "take":
                taken = queue.take()
                assert taken in model.ready() if taken else not model.ready()
                model.taken += [taken] if taken else []
            case "release" if model.taken:
                queue.release(item := chance.choice(model.taken))
                model.remove(item)
            case "withdraw" if waiting:
                queue.withdraw(item := chance.choice(waiting))
                model.remove(item)
        assert len(queue) == len(model.items)
        lasts = {key: [item for item in model.items if key in item.keys] for key in "abcdexy"}
        assert all(queue.last(key) is (items[-1] if items else None) for key, items in lasts.items())


@dataclasses.dataclass
class Flush:
    """A statement that is slow and fails by chance, and sees what it is asked to apply."""

    chance: random.Random
    in_flight: set[str] = dataclasses.field(default_factory=set)
    # By call, and the last call applied by key.
    applied: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    last: dict[str, int] = dataclasses.field(default_factory=dict)

    async def __call__(self, calls: list[tuple[int, tuple[str, ...]]]) -> list[int | Exception]:
        keys = [key for _, each in calls for key in each]
        assert len(set(keys)) == len(keys)
        assert self.in_flight.isdisjoint(keys)
        self.in_flight.update(keys)
        await asyncio.sleep(self.chance.choice((0, 0, 0.001, 0.015)))
        self.in_flight.difference_update(keys)
        if self.chance.random() < 0.1:
            raise self.chance.choice((database.StatementFailed, database.Retry))
        return [self._apply(*call) for call in calls]

    def _apply(self, number: int, keys: tuple[str, ...]) -> int | Exception:
        if self.chance.random() < 0.05:
            return database.Retry()
        assert all(self.last.get(key, 0) < number for key in keys)
        self.last.update(dict.fromkeys(keys, number))
        self.applied[number] += 1
        return number


@pytest.mark.parametrize("seed", range(3))
async def test_callers_that_come_and_go(seed: int) -> None:
    """Each call is applied once or not at all, in order for each key; none that was told DEADLINE_EXCEEDED is."""
    chance = random.Random(seed)
    flush = Flush(chance)
    batcher = batching.Batcher(flush, lambda call: call[1], per_key=1000)

    async def submit(number: int) -> object:
        keys = (
            f"user {chance.randrange(30)}",
            *((f"request {chance.randrange(40)}",) if chance.random() < 0.5 else ()),
        )
        deadline = session.Deadline(time.monotonic() + chance.choice((0.005, 0.05, 3)), of_caller=True)
        return await batcher.submit((number, keys), deadline)

    calls = {}
    for number in range(1, 800):
        calls[number] = asyncio.create_task(submit(number))
        await asyncio.sleep(chance.choice((0, 0, 0, 0.0005)))
        calls[chance.randint(1, number)].cancel()
    async with asyncio.timeout(20):
        told = dict(zip(calls, await asyncio.gather(*calls.values(), return_exceptions=True), strict=True))
        await batcher.close()
    assert max(flush.applied.values()) == 1
    assert all(flush.applied[number] for number, each in told.items() if each == number)
    late = [number for number, each in told.items() if isinstance(each, errors.DeadlineExceeded)]
    assert late
    assert not any(flush.applied[number] for number in late)
    # A statement that fails although it carries one call alone is a bug.
    known = (int, errors.DeadlineExceeded, errors.Bug, asyncio.CancelledError)
    assert all(isinstance(each, known) for each in told.values())
