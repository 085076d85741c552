"""The checker of histories: it accepts what a correct service may show, and nothing else."""

import dataclasses
import heapq
import random
import time

import history
import pytest
from history import SECOND

ZERO = 1_700_000_000 * SECOND


def seconds(at: float) -> int:
    """Give an instant, in seconds since the beginning of a history."""
    return ZERO + round(at * SECOND)


def session(id: str, start: float, expire: float, as_of: float | None = None, *, ended: bool = False) -> history.Answer:
    """Give a session as it is answered."""
    return history.Answer(
        id,
        seconds(start),
        seconds(expire),
        seconds(start if as_of is None else as_of),
        active=not ended,
        reason="USER" if ended else "UNSPECIFIED",
    )


def call(
    operation: str,
    called: float,
    returned: float | None = None,
    outcome: str = history.OK,
    told: history.Answer | tuple[str, float] | None = None,
    length: int = 0,
    request_id: str = "",
) -> history.Call:
    """Give a call of ada's that took 10 ms, or as told; without a return, its outcome is unknown."""
    unknown = outcome == history.UNKNOWN
    return history.Call(
        operation,
        "ada",
        seconds(called),
        history.FOREVER if unknown else seconds(called + 0.01 if returned is None else returned),
        outcome,
        length,
        request_id,
        told if isinstance(told, history.Answer) else None,
        (told[0], seconds(told[1])) if isinstance(told, tuple) else None,
    )


def start(at: float, length: int = 900, id: str = "one", request_id: str = "") -> history.Call:
    """Give an OK start."""
    return call("start", at, None, history.OK, session(id, at, at + length), length, request_id)


def lost(operation: str, at: float, length: int = 0, request_id: str = "") -> history.Call:
    """Give a call of unknown outcome."""
    return call(operation, at, None, history.UNKNOWN, None, length, request_id)


PROFILE = call("put_profile", 0)
STARTED = [PROFILE, start(1)]
EXTENDED = call("extend", 5, told=session("one", 1, 1801, 5), length=900)
ENDED = call("end", 10, told=session("one", 1, 901, 10, ended=True))

LEGAL = {
    "nothing": [],
    "a session from its start to its end": [
        call("get_profile", -1, outcome="PROFILE_NOT_FOUND"),
        call("delete_profile", -0.5, outcome="PROFILE_NOT_FOUND"),
        PROFILE,
        call("get_profile", 0.5),
        call("get", 0.6),
        start(1),
        call("start", 2, outcome="SESSION_ALREADY_ACTIVE", told=("one", 901), length=900),
        call("get", 3, told=session("one", 1, 901, 3)),
        EXTENDED,
        call("get", 6, told=session("one", 1, 1801, 6)),
        call("end", 10, told=session("one", 1, 1801, 10, ended=True)),
        call("end", 11, outcome="NO_ACTIVE_SESSION"),
        call("extend", 11.5, outcome="NO_ACTIVE_SESSION", length=900),
        call("get", 12),
        start(13, id="two"),
    ],
    "a session that expires": [
        PROFILE,
        start(1, 2),
        call("get", 2.9, told=session("one", 1, 3, 2.9)),
        call("get", 3),
        call("extend", 3.1, outcome="NO_ACTIVE_SESSION", length=2),
        call("end", 3.2, outcome="NO_ACTIVE_SESSION"),
        start(3.3, id="two"),
    ],
    "at the instant of the expiry either answer": [
        PROFILE,
        start(1, 2),
        call("get", 2.999, 3.01, told=session("one", 1, 3, 2.9995)),
        call("get", 2.999, 3.01),
        call("extend", 2.999, 3.01, told=session("one", 1, 5, 2.999999), length=2),
    ],
    "a deleted profile": [
        *STARTED,
        call("delete_profile", 2),
        call("get", 3),
        call("start", 4, outcome="PROFILE_REQUIRED"),
    ],
    "two starts at once, one wins": [
        PROFILE,
        call("start", 1, 2, told=session("one", 1.5, 901.5), length=900),
        call("start", 1, 2, "SESSION_ALREADY_ACTIVE", ("one", 901.5), 900),
    ],
    "a replay": [
        PROFILE,
        start(1, request_id="r"),
        ENDED,
        dataclasses.replace(start(1, request_id="r"), called=seconds(20), returned=seconds(20.01)),
    ],
    "another body": [
        PROFILE,
        start(1, request_id="r"),
        call("start", 2, outcome="REQUEST_ID_REUSED", length=1800, request_id="r"),
    ],
    "a refused call sent again": [
        call("start", 0.5, outcome="PROFILE_REQUIRED", length=900, request_id="r"),
        call("put_profile", 0.7),
        start(1, request_id="r"),
    ],
    "a lost start that was applied, late": [
        PROFILE,
        lost("start", 1, 900),
        call("get", 2),
        call("get", 3, told=session("one", 2.5, 902.5, 3)),
        call("get", 4, told=session("one", 2.5, 902.5, 4)),
    ],
    "a lost start that was not applied": [PROFILE, lost("start", 1, 900), call("get", 2), start(3)],
    "a lost start that its retry tells": [
        PROFILE,
        lost("start", 1, 900, "r"),
        call("get", 2, told=session("one", 1.5, 901.5, 2)),
        call("start", 3, told=session("one", 1.5, 901.5), length=900, request_id="r"),
    ],
    "a lost start that expired unseen": [PROFILE, lost("start", 1, 2), start(3.5)],
    "a lost extension, applied": [*STARTED, lost("extend", 2, 900), call("get", 3, told=session("one", 1, 1801, 3))],
    "a lost extension, not applied": [*STARTED, lost("extend", 2, 900), call("get", 3, told=session("one", 1, 901, 3))],
    "a lost extension, applied late": [
        *STARTED,
        lost("extend", 2, 900),
        call("get", 3, told=session("one", 1, 901, 3)),
        call("get", 4, told=session("one", 1, 1801, 4)),
    ],
    "a lost extension of a lost start": [
        PROFILE,
        lost("start", 1, 2),
        lost("extend", 2, 2),
        call("end", 4.5, told=session("one", 1.5, 5.5, 4.5, ended=True)),
    ],
    "a lost end": [*STARTED, lost("end", 2), call("get", 3)],
    "a lost removal of the profile": [
        *STARTED,
        lost("delete_profile", 2),
        call("get_profile", 3, outcome="PROFILE_NOT_FOUND"),
    ],
    "a server that says it applied nothing": [*STARTED, call("end", 2, outcome="SHUTTING_DOWN"), ENDED],
    "lost reads": [*STARTED, lost("get", 2), lost("get_profile", 2), ENDED],
}

ILLEGAL = {
    "two starts without an end between": [*STARTED, start(2, id="two")],
    "a start before the other expires": [PROFILE, start(1, 2), start(2.999, id="two")],
    "two starts at once, both win": [
        PROFILE,
        call("start", 1, 2, told=session("one", 1.5, 901.5), length=900),
        call("start", 1, 2, told=session("two", 1.6, 901.6), length=900),
    ],
    "a start that gives an old session": [*STARTED, ENDED, call("start", 20, told=session("one", 20, 920), length=900)],
    "a start without a profile": [start(1)],
    "a start after the profile was deleted": [PROFILE, call("delete_profile", 0.5), start(1)],
    "a start refused without a session": [
        PROFILE,
        call("start", 1, outcome="SESSION_ALREADY_ACTIVE", told=("one", 901), length=900),
    ],
    "a start refused for another session": [
        *STARTED,
        call("start", 2, outcome="SESSION_ALREADY_ACTIVE", told=("two", 901), length=900),
    ],
    "a start refused for another expire_time": [
        *STARTED,
        call("start", 2, outcome="SESSION_ALREADY_ACTIVE", told=("one", 1801), length=900),
    ],
    "a start refused for an overdue session": [
        PROFILE,
        start(1, 2),
        call("start", 3.5, outcome="SESSION_ALREADY_ACTIVE", told=("one", 3), length=900),
    ],
    "a start refused with a profile": [PROFILE, call("start", 1, outcome="PROFILE_REQUIRED", length=900)],
    "a start of another length": [PROFILE, call("start", 1, told=session("one", 1, 900), length=900)],
    "a start by another clock": [PROFILE, call("start", 1, told=session("one", 0.9, 900.9), length=900)],
    "a lost extension": [*STARTED, EXTENDED, call("get", 6, told=session("one", 1, 901, 6))],
    "two extensions that add once": [
        *STARTED,
        call("extend", 5, 6, told=session("one", 1, 1801, 5.5), length=900),
        call("extend", 5, 6, told=session("one", 1, 1801, 5.6), length=900),
    ],
    "an extension that adds too much": [*STARTED, call("extend", 5, told=session("one", 1, 1802, 5), length=900)],
    "an extension that revives": [
        PROFILE,
        start(1, 2),
        call("extend", 3.5, told=session("one", 1, 903, 3.5), length=900),
    ],
    "an extension that took its clock too late": [
        PROFILE,
        start(1, 2),
        call("extend", 2.9, 3.5, told=session("one", 1, 903, 3.1), length=900),
    ],
    "an extension refused while active": [*STARTED, call("extend", 5, outcome="NO_ACTIVE_SESSION", length=900)],
    "an extension of another session": [*STARTED, call("extend", 5, told=session("two", 1, 1801, 5), length=900)],
    "an end of the old time": [*STARTED, EXTENDED, call("end", 6, told=session("one", 1, 901, 6, ended=True))],
    "an end at the old time": [
        PROFILE,
        start(1, 2),
        call("extend", 2, told=session("one", 1, 903, 2), length=900),
        call("get", 3.5),
    ],
    "an end that does not end": [*STARTED, ENDED, call("get", 11, told=session("one", 1, 901, 11))],
    "an end after the expiry": [PROFILE, start(1, 2), call("end", 3.5, told=session("one", 1, 3, 3, ended=True))],
    "an end by another clock": [*STARTED, call("end", 10, told=session("one", 1, 901, 9, ended=True))],
    "an end refused while active": [*STARTED, call("end", 5, outcome="NO_ACTIVE_SESSION")],
    "two ends at once, both win": [
        *STARTED,
        call("end", 5, 6, told=session("one", 1, 901, 5.5, ended=True)),
        call("end", 5, 6, told=session("one", 1, 901, 5.6, ended=True)),
    ],
    "a get of an inactive session": [*STARTED, ENDED, call("get", 12, told=session("one", 1, 901, 12))],
    "a get of another session": [*STARTED, call("get", 3, told=session("two", 1, 901, 3))],
    "a get with another start_time": [*STARTED, call("get", 3, told=session("one", 1.1, 901, 3))],
    "a get with another expire_time": [*STARTED, call("get", 3, told=session("one", 1, 901.000001, 3))],
    "a get without the session": [*STARTED, call("get", 3)],
    "active at expire_time": [PROFILE, start(1, 2), call("get", 2.9, 3.1, told=session("one", 1, 3, 3))],
    "active after expire_time": [PROFILE, start(1, 2), call("get", 3.1, told=session("one", 1, 3, 2.9999))],
    "active without a profile": [*STARTED, call("delete_profile", 2), call("get", 3, told=session("one", 1, 901, 3))],
    "a replay with another answer": [
        PROFILE,
        start(1, request_id="r"),
        ENDED,
        call("start", 20, told=session("two", 20, 920), length=900, request_id="r"),
    ],
    "a replay in other bytes": [
        PROFILE,
        start(1, request_id="r"),
        dataclasses.replace(start(1, request_id="r"), session=dataclasses.replace(session("one", 1, 901), raw=b"?")),
    ],
    "a replay that is refused": [
        PROFILE,
        start(1, request_id="r"),
        call("start", 2, outcome="SESSION_ALREADY_ACTIVE", told=("one", 901), length=900, request_id="r"),
    ],
    "another body accepted": [
        PROFILE,
        call("start", 1, told=session("one", 1, 3), length=2, request_id="r"),
        call("start", 4, told=session("two", 4, 904), length=900, request_id="r"),
    ],
    "a body called another": [PROFILE, call("start", 1, outcome="REQUEST_ID_REUSED", length=900, request_id="r")],
    "a lost start applied twice": [
        PROFILE,
        lost("start", 1, 900),
        call("end", 2, told=session("one", 1.5, 901.5, 2, ended=True)),
        call("end", 3, told=session("two", 2.5, 902.5, 3, ended=True)),
    ],
    "a lost start and its retry, both applied": [
        PROFILE,
        lost("start", 1, 2, "r"),
        call("get", 2, told=session("one", 1.5, 3.5, 2)),
        call("start", 4, told=session("two", 4, 6), length=2, request_id="r"),
    ],
    "a lost start applied before it was sent": [
        PROFILE,
        lost("start", 1, 900),
        call("get", 2, told=session("one", 0.5, 900.5, 2)),
    ],
    "a lost extension applied twice": [
        *STARTED,
        lost("extend", 2, 900),
        call("get", 3, told=session("one", 1, 1801, 3)),
        call("get", 4, told=session("one", 1, 2701, 4)),
    ],
    "a lost extension under one id applied twice": [
        *STARTED,
        lost("extend", 2, 900, "r"),
        lost("extend", 2.5, 900, "r"),
        call("get", 4, told=session("one", 1, 2701, 4)),
    ],
    "a lost extension taken back": [
        *STARTED,
        lost("extend", 2, 900),
        call("get", 3, told=session("one", 1, 1801, 3)),
        call("get", 4, told=session("one", 1, 901, 4)),
    ],
    "a lost end that revived": [
        *STARTED,
        lost("end", 2),
        call("get", 3),
        call("get", 4, told=session("one", 1, 901, 4)),
    ],
    "a server that applied what it denied": [*STARTED, call("end", 2, outcome="SHUTTING_DOWN"), call("get", 3)],
    "a profile that is not there": [PROFILE, call("get_profile", 1, outcome="PROFILE_NOT_FOUND")],
    "a profile that is still there": [PROFILE, call("delete_profile", 1), call("get_profile", 2)],
    "a profile deleted twice": [PROFILE, call("delete_profile", 1), call("delete_profile", 2)],
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_a_correct_service_may_show_is_accepted(name: str) -> None:
    """A legal history is accepted."""
    assert history.check(LEGAL[name]) == []


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_no_correct_service_shows_is_rejected(name: str) -> None:
    """An illegal history is rejected, with the calls that it was rejected for."""
    [rejection] = history.check(ILLEGAL[name])
    assert rejection.user == "ada"
    assert str(rejection).count("\n> ") == 1


def test_one_user_is_rejected_among_others() -> None:
    """Users are checked alone: the bad one is named, whatever the others do."""
    others = [dataclasses.replace(each, user="bob") for each in [*STARTED, ENDED]]
    assert [each.user for each in history.check([*others, *STARTED, start(2, id="two")])] == ["ada"]


class Server:
    """A correct service, the slow and plain way: it does one thing at a time, each at an instant of its own."""

    def __init__(self) -> None:
        self.profile = False
        self.id, self.start, self.expire = "", 0, 0
        self.kept: dict[tuple[str, str], history.Call] = {}
        self.count = 0

    def do(self, call: history.Call, at: int) -> history.Call:
        """Answer a call at an instant."""
        kept = self.kept.get((call.operation, call.request_id))
        if kept:
            return dataclasses.replace(call, outcome=history.OK, session=kept.session)
        done = self._done(call, at)
        if call.request_id and done.outcome == history.OK:
            self.kept[call.operation, call.request_id] = done
        return done

    def _done(self, call: history.Call, at: int) -> history.Call:
        active = bool(self.id) and at < self.expire
        refused = self._refused(call.operation, active=active)
        if refused:
            told = (self.id, self.expire) if refused == "SESSION_ALREADY_ACTIVE" else None
            return dataclasses.replace(call, outcome=refused, told=told)
        match call.operation:
            case "put_profile":
                self.profile = True
            case "delete_profile":
                self.profile, self.id = False, ""
            case "start":
                self.count += 1
                self.id, self.start, self.expire = f"session {self.count}", at, at + call.seconds * SECOND
            case "extend":
                self.expire += call.seconds * SECOND
        answer = None
        if call.operation in ("start", "extend") or (call.operation in ("end", "get") and active):
            ends = call.operation == "end"
            reason = "USER" if ends else "UNSPECIFIED"
            answer = history.Answer(self.id, self.start, self.expire, at, active=not ends, reason=reason)
        if call.operation == "end":
            self.id = ""
        return dataclasses.replace(call, outcome=history.OK, session=answer)

    def _refused(self, operation: str, *, active: bool) -> str | None:
        match operation:
            case "get_profile" | "delete_profile" if not self.profile:
                return "PROFILE_NOT_FOUND"
            case "start" if not self.profile:
                return "PROFILE_REQUIRED"
            case "start" if active:
                return "SESSION_ALREADY_ACTIVE"
            case "extend" | "end" if not active:
                return "NO_ACTIVE_SESSION"
        return None


def recorded(seed: int, lanes: int, count: int, loss: float, user: str = "ada") -> list[history.Call]:
    """Give what callers of a correct service see, some of whose calls are lost, before or after they are applied."""
    chance, server = random.Random(seed), Server()
    operations = ["start", "extend", "end", "get", "put_profile", "delete_profile", "get_profile"]
    # What happens next: the instant, then a call's making or the instant of its effect.
    agenda: list[tuple[int, int, int, history.Call | None]] = [(ZERO, n, n, None) for n in range(lanes)]
    again: dict[int, history.Call] = {}
    calls: list[history.Call] = []
    left: set[int] = set()
    number = lanes
    while agenda:
        at, _, lane, due = heapq.heappop(agenda)
        number += 1
        if due is None:
            if number > count * 2:
                continue
            made = again.pop(lane, None) or history.Call(
                chance.choices(operations, [5, 3, 2, 6, 3, 1, 1])[0],
                user,
                at,
                history.FOREVER,
                seconds=chance.choice([2, 2, 900]),
                request_id=f"{number}" if chance.random() < 0.8 else "",
            )
            if made.operation not in ("start", "extend"):
                made = dataclasses.replace(made, seconds=0)
            if made.operation not in ("start", "extend", "end"):
                made = dataclasses.replace(made, request_id="")
            made = dataclasses.replace(made, called=at, returned=history.FOREVER, outcome=history.UNKNOWN)
            heapq.heappush(agenda, (at + chance.randrange(1, 300_000), number, lane, made))
            if chance.random() < loss / 3:  # the caller goes away while the call is under way, and it may still come
                left.add(id(made))
                calls.append(made)
                again[lane] = made
                heapq.heappush(agenda, (at + chance.randrange(1, 200_000), number, lane, None))
            continue
        if id(due) in left:
            server.do(due, at)
            continue
        fate = chance.random()
        done = due if fate < loss / 3 else server.do(due, at)
        later = at + chance.randrange(1, 300_000)
        if fate < loss * 2 / 3:  # the call or its answer is lost
            calls.append(due)
            again[lane] = due
        else:
            calls.append(dataclasses.replace(done, returned=later))
        heapq.heappush(agenda, (later + chance.randrange(1, 400_000), number, lane, None))
    return calls


@pytest.mark.parametrize("seed", range(40))
def test_the_history_of_a_correct_service_is_accepted(seed: int) -> None:
    """Whatever is lost, and however calls overlap, a correct service's history is accepted."""
    calls = recorded(seed, lanes=1 + seed % 4, count=200, loss=(0, 0.05, 0.1)[seed % 3])
    rejections = history.check(calls)
    assert not rejections, str(rejections[0])


@pytest.mark.parametrize("seed", range(40))
def test_one_wrong_answer_is_found(seed: int) -> None:
    """One answer of a long history without losses, told otherwise, has it rejected."""
    calls = recorded(seed, lanes=1, count=200, loss=0)
    assert history.check(calls) == []
    chance = random.Random(seed)
    at = chance.choice([n for n, each in enumerate(calls) if each.session])
    right = calls[at]
    assert right.session
    wrong = [
        dataclasses.replace(right.session, expire=right.session.expire + chance.choice([-1, 1, 2 * SECOND])),
        dataclasses.replace(right.session, id="another"),
        dataclasses.replace(right.session, start=right.session.start + 1),
        dataclasses.replace(right.session, as_of=right.session.expire + 1),
        dataclasses.replace(right.session, active=not right.session.active),
    ]
    for each in wrong:
        changed = [*calls[:at], dataclasses.replace(right, session=each), *calls[at + 1 :]]
        assert history.check(changed), each


def test_two_minutes_of_200_users_are_checked_in_reasonable_time() -> None:
    """A history as long as the full chaos run's, with many lost calls, takes well under a minute."""
    calls = [each for n in range(20) for each in recorded(n, lanes=3, count=300, loss=0.04, user=f"user {n}")]
    began = time.monotonic()
    assert history.check(calls) == []
    assert time.monotonic() - began < 6, "a tenth of the users"
