"""Where a user is, and the fuzzed place that others may see.

Fresh noise averages away over repeated sessions, so the fuzzed place is a function of the user, the key and a
cell of about 1 km x 1 km. Each user has a grid of their own: the sphere under a random rotation, so that no
place on Earth, pole and antimeridian included, is special. In the rotated frame band b is centred on
colatitude b * _BAND and cut into equal cells; bands 0 and _BANDS are caps of half the height, one cell each.
The output is the cell's centre moved by a keyed offset.

The bound, in metres on the sphere: a cell's farthest corner is at most 740 from its centre (next to a cap,
707 elsewhere), a candidate at most 101 away, the offset at most 100. On WGS 84 a geodesic is 0.9944 to 1.0045
times the arc between the same coordinates on the sphere, which makes 946 in all, below RADIUS_METERS.
"""

import dataclasses
import hmac
import math
import struct
from collections import abc

RADIUS_METERS = 1000.0
"""A fuzzed location is at most this far from the exact one, along the WGS 84 ellipsoid."""

EARTH_METERS = 6371008.8
_BANDS = 20016
_BAND = math.pi / _BANDS
_CELLS_AT_EQUATOR = math.tau * EARTH_METERS / 1000.0
# 101 and not 100: 100 m along the ellipsoid are up to 100.57 m on the sphere.
_NEAR = 101.0 / EARTH_METERS
_OFFSET = 100.0 / EARTH_METERS
# No band has more than 40,031 cells, so band and index together stay below 2 ** 31.
_INDEX_BITS = 16
_POLE, _ANTIMERIDIAN = 90.0, 180.0
# Digits of a key's version; int() refuses thousands of them with words of its own.
_LONGEST_VERSION = 20

_Vector = tuple[float, float, float]
_Rotation = tuple[_Vector, _Vector, _Vector]
_Cell = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ExactLocation:
    """Where a user is: degrees, WGS 84, -90 <= latitude <= 90 and -180 <= longitude <= 180.

    Anything else, NaN included, raises ValueError. Neither that nor the repr contains a coordinate.
    """

    latitude: float
    longitude: float

    def __post_init__(self) -> None:
        for name, value, limit in (("latitude", self.latitude, 90), ("longitude", self.longitude, 180)):
            # Not `abs(value) > limit`, which lets NaN pass.
            if not -limit <= value <= limit:
                raise ValueError(f"{name} must lie between -{limit} and {limit} degrees")

    def __repr__(self) -> str:
        return "ExactLocation(<redacted>)"


@dataclasses.dataclass(frozen=True, slots=True)
class FuzzedLocation:
    """What others may see: degrees, WGS 84, in the ranges of ExactLocation, at most 6 decimals."""

    latitude: float
    longitude: float


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A cell in which a user may be shown: 0 <= cell < 2**31, counted anew for each user and key version."""

    key_version: int
    cell: int
    fuzzed: FuzzedLocation


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class FuzzKey:
    """A version, 0 < version < 2**31, and its secret of at least 32 characters.

    Anything else raises ValueError. Neither that nor the repr contains any part of the secret.
    """

    version: int
    secret: str

    def __post_init__(self) -> None:
        if not 0 < self.version < 2**31 or len(self.secret) < 32:
            raise ValueError("a fuzz key needs 0 < version < 2**31 and a secret of at least 32 characters")

    def __repr__(self) -> str:
        return f"FuzzKey(version={self.version}, secret=<redacted>)"

    @classmethod
    def parse(cls, text: str) -> tuple["FuzzKey", ...]:
        """Read `version:secret,version:secret`, at least one, in the order given: newest first.

        A secret may contain colons but no comma; white space around an entry is dropped. A malformed entry, or two
        of one version, raise ValueError, with nothing of the text in it.
        """
        keys = []
        for entry in text.split(","):
            version, _, secret = entry.strip().partition(":")
            # int() quotes what it cannot read, and where the colon was forgotten that is the secret.
            if not (version.isascii() and version.isdecimal() and len(version) <= _LONGEST_VERSION):
                raise ValueError("a fuzz key must be written version:secret, the version being a whole number")
            keys.append(cls(int(version), secret))
        if len({key.version for key in keys}) < len(keys):
            raise ValueError("no version of a fuzz key may occur twice")
        return tuple(keys)


class Fuzzer:
    """Fuzzes locations. Holds keys and nothing about any user; may be shared between threads."""

    def __init__(self, keys: abc.Sequence[FuzzKey]) -> None:
        """Take the keys, newest first; ValueError if there is none or a version occurs twice."""
        if not keys or len({key.version for key in keys}) < len(keys):
            raise ValueError("at least one fuzz key is needed, and no version twice")
        # Strict encoding would raise the whole text; os.environ makes surrogates of bytes that are not UTF-8.
        self._keys = tuple((key.version, key.secret.encode("utf-8", "surrogatepass")) for key in keys)

    def candidates(self, user_id: str, exact: ExactLocation) -> tuple[Candidate, ...]:
        """List the cells in which this user may be shown, being here: at least one for each key.

        Keys keep their order, newest first; within a key comes the cell that contains the place, then every
        other one at most 100 m from it, and none more than 102 m. So the first is the answer for a user
        without history, and a user last shown in any of the others stays there.

        The result depends on the arguments and the keys alone. A user's (key_version, cell) has one fuzzed
        location, bit for bit the same from anywhere, at most RADIUS_METERS from the exact location.
        """
        user, place = user_id.encode("utf-8", "surrogatepass"), _vector(exact)
        subject = len(user).to_bytes(4, "big") + user
        return tuple(
            candidate
            for version, secret in self._keys
            # The version is hashed too: a secret that is used again must not bring its old grid back.
            for candidate in _candidates(version, secret, version.to_bytes(4, "big") + subject, place)
        )


def _candidates(version: int, secret: bytes, subject: bytes, place: _Vector) -> abc.Iterator[Candidate]:
    # No message of one kind is one of the other: they start differently, and every field's length is known.
    rotation = _rotation(hmac.digest(secret, b"rotation" + subject, "sha256"))
    for band, index in _cells_near(_rotated(rotation, place)):
        cell = band << _INDEX_BITS | index
        offset = hmac.digest(secret, b"offset" + subject + cell.to_bytes(8, "big"), "sha256")
        yield Candidate(version, cell, _fuzzed(_rotated(_inverse(rotation), _shown(band, index, offset))))


def _uniforms(digest: bytes) -> _Vector:
    """Return three numbers in [0, 1)."""
    first, second, third, _ = struct.unpack(">4Q", digest)
    return (first >> 11) * 2.0**-53, (second >> 11) * 2.0**-53, (third >> 11) * 2.0**-53


def _rotation(digest: bytes) -> _Rotation:
    """Return a rotation, uniform over SO(3), as the rows of its matrix; zeros give the identity.

    Three uniform numbers make a uniform unit quaternion: Shoemake, "Uniform random rotations", 1992.
    """
    share, first, second = _uniforms(digest)
    near, far = math.sqrt(1.0 - share), math.sqrt(share)
    w, x = near * math.cos(math.tau * first), near * math.sin(math.tau * first)
    y, z = far * math.cos(math.tau * second), far * math.sin(math.tau * second)
    return (
        (1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y)),
        (2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x)),
        (2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y)),
    )


def _rotated(rotation: _Rotation, vector: _Vector) -> _Vector:
    (a, b, c), (d, e, f), (g, h, i) = rotation
    x, y, z = vector
    return a * x + b * y + c * z, d * x + e * y + f * z, g * x + h * y + i * z


def _inverse(rotation: _Rotation) -> _Rotation:
    (a, b, c), (d, e, f), (g, h, i) = rotation
    return (a, d, g), (b, e, h), (c, f, i)


def _vector(exact: ExactLocation) -> _Vector:
    # One vector for all names of a place: sin(pi) is not quite 0, nor is cos(pi / 2).
    at_pole, at_antimeridian = abs(exact.latitude) == _POLE, exact.longitude == -_ANTIMERIDIAN
    longitude = math.radians(0.0 if at_pole else _ANTIMERIDIAN if at_antimeridian else exact.longitude)
    latitude = math.radians(exact.latitude)
    across = math.cos(latitude)
    return across * math.cos(longitude), across * math.sin(longitude), math.sin(latitude)


def _cells_in(band: int) -> int:
    return max(1, math.ceil(_CELLS_AT_EQUATOR * math.sin(band * _BAND)))


def _cells_near(place: _Vector) -> list[_Cell]:
    """Return the cell that contains a place, then the others at most _NEAR from it."""
    x, y, z = place
    # Not acos(z), which loses half of its digits near the poles. The longitude runs from 0 to tau.
    colatitude, longitude = math.atan2(math.hypot(x, y), z), math.atan2(y, x) + math.pi
    upper, middle, lower = (int((colatitude + step) / _BAND + 0.5) for step in (-_NEAR, 0.0, _NEAR))
    own = middle, int(longitude / math.tau * _cells_in(middle)) % _cells_in(middle)
    # A point at most _NEAR away differs by at most this in longitude, except next to the frame's pole: there
    # it may differ by anything, but nothing is near except the cap, whose one cell has all longitudes.
    reach = math.asin(math.sin(_NEAR) / max(math.sin(colatitude), math.sin(_NEAR)))
    within: dict[_Cell, None] = {}
    for band in range(upper, lower + 1):
        count = _cells_in(band)
        west, east = (math.floor((longitude + step) / math.tau * count) for step in (-reach, reach))
        within.update(((band, index % count), None) for index in range(west, east + 1))
    within.pop(own)
    return [own, *(cell for cell in within if _separation(colatitude, longitude, cell) <= _NEAR)]


def _separation(colatitude: float, longitude: float, cell: _Cell) -> float:
    """Return the angle from a point to the nearest point of a cell less than pi / 2 of longitude away."""
    band, index = cell
    count = _cells_in(band)
    off_centre = abs(math.remainder(longitude - (index + 0.5) / count * math.tau, math.tau))
    beyond = max(0.0, off_centre - math.pi / count)
    # At any colatitude the cell's nearest point lies on its nearer meridian (or on the point's own, between
    # the two); along a meridian the angle grows on both sides of the foot of the perpendicular.
    foot = math.atan2(math.sin(colatitude) * math.cos(beyond), math.cos(colatitude))
    foot = min(max(foot, (band - 0.5) * _BAND), (band + 0.5) * _BAND)
    across = math.sin(colatitude) * math.sin(foot) * math.sin(beyond / 2.0) ** 2
    return 2.0 * math.asin(math.sqrt(math.sin((colatitude - foot) / 2.0) ** 2 + across))


def _shown(band: int, index: int, digest: bytes) -> _Vector:
    """Return a cell's centre, moved by at most _OFFSET, uniformly over that disc."""
    down, around = band * _BAND, (index + 0.5) / _cells_in(band) * math.tau - math.pi
    share, bearing, _ = _uniforms(digest)
    distance = _OFFSET * math.sqrt(share)
    south = math.sin(distance) * math.cos(math.tau * bearing)
    east = math.sin(distance) * math.sin(math.tau * bearing)
    outward = math.cos(distance) * math.sin(down) + south * math.cos(down)
    x = outward * math.cos(around) - east * math.sin(around)
    y = outward * math.sin(around) + east * math.cos(around)
    return x, y, math.cos(distance) * math.cos(down) - south * math.sin(down)


def _fuzzed(vector: _Vector) -> FuzzedLocation:
    x, y, z = vector
    latitude, longitude = math.degrees(math.atan2(z, math.hypot(x, y))), math.degrees(math.atan2(y, x))
    return FuzzedLocation(round(latitude, 6), round(longitude, 6))
