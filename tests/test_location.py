"""Fuzzing survives repetition: properties of fuzzed locations, measured with geographiclib."""

import contextlib
import hmac
import math
import random
import statistics
from collections import abc
from unittest import mock

import hypothesis
import pytest
from geographiclib import geodesic
from hypothesis import strategies

from afterhours_grpc.sessions import location

EARTH = geodesic.Geodesic.WGS84
NEW_KEY, OLD_KEY = location.FuzzKey(2, "n" * 32), location.FuzzKey(1, "o" * 32)
FUZZER = location.Fuzzer([NEW_KEY])
SPECIAL_PLACES = [
    location.ExactLocation(*degrees)
    for degrees in [
        (0, 0),
        (90, 0),
        (-90, 0),
        (0, 180),
        (0, -180),
        (65, 180),
        (-89.9999, -120),
        (47.376887, 8.541694),
    ]
]
USER_IDS = [f"user-{number}" for number in range(2000)]

Grid = abc.Callable[[], contextlib.AbstractContextManager[None]]


def moved(place: location.ExactLocation, bearing: float, meters: float) -> location.ExactLocation:
    """Return the place so many metres away along the ellipsoid."""
    end = EARTH.Direct(place.latitude, place.longitude, bearing, meters)
    return location.ExactLocation(end["lat2"], end["lon2"])


def path(place: location.ExactLocation, fuzzed: location.FuzzedLocation) -> tuple[float, float]:
    """Return the metres from a place to a fuzzed one along the ellipsoid, and the bearing in degrees."""
    line = EARTH.Inverse(place.latitude, place.longitude, fuzzed.latitude, fuzzed.longitude)
    return line["s12"], line["azi1"]


def first(user_id: str, place: location.ExactLocation) -> location.Candidate:
    """Return what a user without history is shown."""
    return FUZZER.candidates(user_id, place)[0]


@contextlib.contextmanager
def unrotated() -> abc.Iterator[None]:
    """Make every hash zero, and thereby the poles of every grid those of the Earth, and every offset zero.

    A grid's poles, with rings of few cells around them, come near no test that uses random rotations.
    """
    with mock.patch.object(hmac, "digest", return_value=bytes(32)):
        assert first("anyone", location.ExactLocation(89.999, 8)).fuzzed.latitude == 90.0
        yield


user_ids = strategies.text(strategies.characters(exclude_categories=["Cs"]), min_size=1, max_size=255)
bearings = strategies.floats(-180, 180)
places = strategies.sampled_from(SPECIAL_PLACES) | strategies.builds(
    location.ExactLocation, strategies.floats(-90, 90), strategies.floats(-180, 180)
)
near_poles = strategies.builds(
    moved,
    strategies.sampled_from([SPECIAL_PLACES[1], SPECIAL_PLACES[2]]),
    bearings,
    strategies.floats(0, 4000),
)
# A kind of grid, and a place on it.
grounds = strategies.tuples(strategies.just(contextlib.nullcontext), places) | strategies.tuples(
    strategies.just(unrotated), near_poles | places
)


@hypothesis.given(user_ids, places)
def test_repetition(user_id: str, place: location.ExactLocation) -> None:
    """A user in one place is shown in one place, however often and by whichever replica."""
    other_replica = location.Fuzzer(location.FuzzKey.parse(f"2:{NEW_KEY.secret}"))
    assert {fuzzer.candidates(user_id, place) for fuzzer in [FUZZER, FUZZER, other_replica]} == {
        FUZZER.candidates(user_id, place)
    }


@hypothesis.given(user_ids, grounds, bearings, strategies.floats(0, 1500))
def test_cell_decides(user_id: str, ground: tuple[Grid, location.ExactLocation], bearing: float, meters: float) -> None:
    """Two points of a cell are shown at the same place, bit for bit, and points of two cells are not."""
    grid, place = ground
    with grid():
        here = FUZZER.candidates(user_id, place)
        there = FUZZER.candidates(user_id, moved(place, bearing, meters))
    for one in here:
        for other in there:
            assert (one.cell == other.cell) == (repr(one.fuzzed) == repr(other.fuzzed))


@hypothesis.given(user_ids, grounds)
def test_radius(user_id: str, ground: tuple[Grid, location.ExactLocation]) -> None:
    """No candidate is shown more than 1,000 m from the exact location, nor at coordinates that are none."""
    grid, place = ground
    with grid():
        candidates = FUZZER.candidates(user_id, place)
    for candidate in candidates:
        fuzzed = candidate.fuzzed
        assert path(place, fuzzed)[0] <= location.RADIUS_METERS
        assert abs(fuzzed.latitude) <= 90
        assert abs(fuzzed.longitude) <= 180
        assert (fuzzed.latitude, fuzzed.longitude) == (round(fuzzed.latitude, 6), round(fuzzed.longitude, 6))


@hypothesis.given(user_ids, grounds)
def test_candidates_are_cells_of_their_own(user_id: str, ground: tuple[Grid, location.ExactLocation]) -> None:
    """A place has at least one candidate and at most four, each another cell whose number fits 31 bits."""
    grid, place = ground
    with grid():
        cells = [candidate.cell for candidate in FUZZER.candidates(user_id, place)]
    assert 1 <= len(set(cells)) == len(cells) <= 4
    assert all(0 <= cell < 2**31 for cell in cells)


@hypothesis.given(user_ids, grounds, bearings, strategies.floats(0, 100))
def test_every_near_cell_is_a_candidate(
    user_id: str, ground: tuple[Grid, location.ExactLocation], bearing: float, meters: float
) -> None:
    """A cell that contains a point at most 100 m away is a candidate, so that its user may stay there."""
    grid, place = ground
    with grid():
        cells = {candidate.cell for candidate in FUZZER.candidates(user_id, place)}
        assert first(user_id, moved(place, bearing, meters)).cell in cells


@pytest.mark.parametrize("grid", [contextlib.nullcontext, unrotated])
def test_every_near_cell_at_any_latitude(grid: Grid) -> None:
    """So it is for 4,000 points 100 m away, at all latitudes and in the rings around a grid's pole."""
    numbers = random.Random(10)
    with grid():
        for number in range(4000):
            reach = 4000 if number % 2 else 20000000
            place = moved(SPECIAL_PLACES[1], numbers.uniform(-180, 180), numbers.uniform(0, reach))
            cells = {candidate.cell for candidate in FUZZER.candidates(f"{number}", place)}
            assert first(f"{number}", moved(place, numbers.uniform(-180, 180), 100)).cell in cells


def test_edge() -> None:
    """On the equator, where the sphere errs the most, an edge is near at 100 m and no longer so at 102 m."""
    with unrotated():
        # Northward from the equator, as far as the first cell's edge: halved to a millimetre.
        inside, outside = 0.0, 1000.0
        middle = first("anyone", SPECIAL_PLACES[0]).cell
        while outside - inside > 0.001:
            half = (inside + outside) / 2
            same = first("anyone", moved(SPECIAL_PLACES[0], 0, half)).cell == middle
            inside, outside = (half, outside) if same else (inside, half)
        for meters, near in [(99.99, True), (102, False)]:
            place = moved(SPECIAL_PLACES[0], 0, outside + meters)
            cells = {candidate.cell for candidate in FUZZER.candidates("anyone", place)}
            assert (middle in cells) is near


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(user_ids, grounds)
def test_every_candidate_is_near(user_id: str, ground: tuple[Grid, location.ExactLocation]) -> None:
    """A candidate contains the place or a point about 100 m away: no user stays in a cell long left."""
    grid, place = ground
    with grid():
        cells = {candidate.cell for candidate in FUZZER.candidates(user_id, place)}
        # A cell that begins within 102 m takes up at least 8 of the 660 m of the circle of 105 m.
        around = {first(user_id, moved(place, 2.0 * step, 105.0)).cell for step in range(180)}
        assert cells <= around | {first(user_id, place).cell}


@hypothesis.given(user_ids, places)
def test_keys_newest_first(user_id: str, place: location.ExactLocation) -> None:
    """With two keys come the candidates of the newer one, then those of the older one's other grid."""
    older = location.Fuzzer([OLD_KEY]).candidates(user_id, place)
    newer = FUZZER.candidates(user_id, place)
    assert {candidate.key_version for candidate in newer} == {2}
    assert {candidate.key_version for candidate in older} == {1}
    assert location.Fuzzer([NEW_KEY, OLD_KEY]).candidates(user_id, place) == newer + older
    assert not {candidate.fuzzed for candidate in newer} & {candidate.fuzzed for candidate in older}


@hypothesis.given(user_ids, places)
def test_version_makes_the_grid(user_id: str, place: location.ExactLocation) -> None:
    """A secret that is used again under another version does not bring its old grid back."""
    again = location.Fuzzer([location.FuzzKey(3, NEW_KEY.secret)]).candidates(user_id, place)
    assert again[0].fuzzed != first(user_id, place).fuzzed


@hypothesis.given(user_ids, user_ids, places)
def test_users_differ(one: str, other: str, place: location.ExactLocation) -> None:
    """Two users in one place are shown in two places."""
    hypothesis.assume(one != other)
    assert first(one, place).fuzzed != first(other, place).fuzzed


@hypothesis.given(user_ids, strategies.floats(-90, 90), strategies.floats(-180, 180))
def test_names_of_one_place(user_id: str, latitude: float, longitude: float) -> None:
    """Both names of the antimeridian, and all longitudes of a pole, are one place."""
    for names in (
        [(latitude, 180), (latitude, -180)],
        [(90, longitude), (90, 0), (90, -180)],
        [(-90, longitude), (-90, 0), (-90, 180)],
    ):
        named = [location.ExactLocation(*name) for name in names]
        assert len({FUZZER.candidates(user_id, place) for place in named}) == 1
        # The candidates would show a difference in the last bit to one user in a billion only.
        assert len({location._vector(place) for place in named}) == 1


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    user_ids, grounds, strategies.lists(strategies.tuples(bearings, strategies.floats(0, 50)), min_size=10)
)
def test_noise_shows_one_place(
    user_id: str, ground: tuple[Grid, location.ExactLocation], noise: list[tuple[float, float]]
) -> None:
    """A user who jitters by 50 m and keeps the last cell when it is a candidate is never moved."""
    grid, home = ground
    with grid():
        shown = first(user_id, moved(home, *noise[0]))
        for jitter in noise:
            assert shown in FUZZER.candidates(user_id, moved(home, *jitter))


def test_noise_crosses_edges() -> None:
    """Without the kept cell the same jitter would move many users: a home near an edge is nothing rare."""
    home = SPECIAL_PLACES[-1]
    jittered = [moved(home, bearing, 50) for bearing in range(0, 360, 30)]
    moving = [user_id for user_id in USER_IDS if len({first(user_id, place).cell for place in jittered}) > 1]
    assert 0.1 < len(moving) / len(USER_IDS) < 0.3


@pytest.mark.parametrize("place", SPECIAL_PLACES, ids=repr)
def test_offsets_are_even(place: location.ExactLocation) -> None:
    """Over many users the output is centred on the exact location, evenly around and far from it."""
    paths = [path(place, first(user_id, place).fuzzed) for user_id in USER_IDS]
    meters = sorted(length for length, _ in paths)
    assert statistics.median(meters) >= 350
    assert meters[len(meters) // 10] >= 150
    north = [length * math.cos(math.radians(bearing)) for length, bearing in paths]
    east = [length * math.sin(math.radians(bearing)) for length, bearing in paths]
    # The standard error of each mean is 7 m.
    assert abs(statistics.mean(north)) < 30
    assert abs(statistics.mean(east)) < 30
    assert 0.9 < statistics.pstdev(north) / statistics.pstdev(east) < 1.1


def test_best_guess_after_a_thousand_sessions() -> None:
    """Many outputs tell no more than one: median error at least 350 m, tenth percentile at least 150 m."""
    homes = random.Random(10)
    errors = []
    for user_id in USER_IDS[:1000]:
        home = location.ExactLocation(homes.uniform(-60, 60), homes.uniform(-179, 179))
        # Ten sessions stand for any number: their outputs are equal, so that their mean is one of them.
        (fuzzed,) = {first(user_id, home).fuzzed for _ in range(10)}
        errors.append(path(home, fuzzed)[0])
    assert statistics.median(errors) >= 350
    assert statistics.quantiles(errors, n=10)[0] >= 150


@pytest.mark.parametrize("grid", [contextlib.nullcontext, unrotated])
def test_cells_are_a_square_kilometre(grid: Grid) -> None:
    """A cell has about a square kilometre, around a grid's pole too: a disc of 10 km holds about 314."""
    numbers = random.Random(10)
    with grid():
        visits: dict[int, int] = {}
        for _ in range(15000):
            place = moved(SPECIAL_PLACES[1], numbers.uniform(-180, 180), 10000 * math.sqrt(numbers.random()))
            cell = first("anyone", place).cell
            visits[cell] = visits.get(cell, 0) + 1
    # 48 visits to a square kilometre. Cells on the rim are cut off, hence no lower bound for a single one.
    assert 314 <= len(visits) <= 314 + 80
    assert max(visits.values()) < 48 * 1.6


@pytest.mark.parametrize(
    "degrees",
    [(90.5, 12.25), (-91.5, 12.25), (12.25, 180.5), (12.25, -181.5), (math.nan, 12.25), (12.25, math.inf)],
)
def test_no_coordinate_is_told(degrees: tuple[float, float]) -> None:
    """Coordinates out of range are refused without being repeated."""
    with pytest.raises(ValueError, match="must lie between") as refusal:
        location.ExactLocation(*degrees)
    assert not any(str(number) in str(refusal.value) for number in degrees)


@hypothesis.given(places)
def test_repr_tells_no_coordinate(place: location.ExactLocation) -> None:
    """An exact location is printed, alone or in a container, without a digit of its coordinates."""
    assert not any(character.isdigit() for character in f"{place} {place!r} {[place]}")


@hypothesis.given(strategies.text(min_size=32))
@hypothesis.example("\udcff" * 32)
def test_repr_tells_no_secret(secret: str) -> None:
    """A key is printed with its version alone, whatever the secret."""
    key = location.FuzzKey(7, secret)
    assert f"{key}" == repr(key) == repr(location.FuzzKey(7, "s" * 32))
    assert "7" in repr(key)
    # A surrogate, which os.environ makes of a byte that is not UTF-8, must not end in an error that holds it.
    location.Fuzzer([key])


def test_parse() -> None:
    """Keys are read in the order given; a secret may contain colons; white space around it is dropped."""
    text = f"12:{'a:' * 16}, 3:{'b' * 40}\n"
    assert location.FuzzKey.parse(text) == (location.FuzzKey(12, "a:" * 16), location.FuzzKey(3, "b" * 40))


SECRET = "correct-horse-battery-staple-and-more"


@pytest.mark.parametrize(
    "text",
    [
        "",
        SECRET,
        f":{SECRET}",
        f"0:{SECRET}",
        f"-1:{SECRET}",
        f"1.0:{SECRET}",
        f"\u0661:{SECRET}",
        f"2147483648:{SECRET}",
        f"{SECRET}:1",
        f"1:{SECRET[:31]}",
        f"1:{SECRET},",
        f"2:{SECRET},1",
        f"2:{SECRET};1:{SECRET},{SECRET}",
        f"2:{SECRET},1:{SECRET},2:{SECRET}",
    ],
)
def test_malformed_keys(text: str) -> None:
    """A malformed list of keys is refused without a word of its secrets."""
    with pytest.raises(ValueError, match="fuzz key") as refusal:
        location.FuzzKey.parse(text)
    assert not any(word in str(refusal.value) for word in SECRET.split("-")[:4])
    assert refusal.value.__context__ is None


@pytest.mark.parametrize("keys", [[], [NEW_KEY, OLD_KEY, location.FuzzKey(2, SECRET)]])
def test_unusable_keys(keys: list[location.FuzzKey]) -> None:
    """No key at all, or two of one version, make no fuzzer."""
    with pytest.raises(ValueError, match="fuzz key") as refusal:
        location.Fuzzer(keys)
    assert SECRET not in str(refusal.value)
