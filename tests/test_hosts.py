"""The hosts of a URL, as libpq reads them."""

import pytest

from afterhours_grpc.store import hosts


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://ada:a%40b@one/name", [("one", None)]),
        ("postgres://one:5433,two/name?sslmode=require", [("one", 5433), ("two", None)]),
        ("postgresql://ada@one:,two:5434/", [("one", None), ("two", 5434)]),
        ("postgresql://[::1]:5433,[::2],127.0.0.1:1/", [("::1", 5433), ("::2", None), ("127.0.0.1", 1)]),
        ("postgresql://%2Frun%2Fpostgresql:5433,two/", [("/run/postgresql", 5433), ("two", None)]),
        ("postgresql:///name?host=/run/postgresql", [("/run/postgresql", None)]),
        ("postgresql:///name?host=one,two&port=1,2", [("one", 1), ("two", 2)]),
        ("postgresql:///name?host=one,::2,[::3]:3&port=5433", [("one", 5433), ("::2", 5433), ("::3", 5433)]),
        ("postgresql://one:1,two:2/name?host=three", [("three", None)]),
        ("postgresql://one,two/name?port=5433", [("one", 5433), ("two", 5433)]),
        ("postgresql:///name", [(None, None)]),
        ("postgresql://ada@/name?port=5433", [(None, 5433)]),
    ],
)
def test_hosts_are_read_one_by_one(url: str, expected: list[tuple[str | None, int | None]]) -> None:
    """Hosts stand before the path or in parameters, with a port each, one for all, or none."""
    assert [(each.name, each.port) for each in hosts.read(url)] == expected


@pytest.mark.parametrize(
    "url", ["postgresql://one:port/", "postgresql://[::1/", "postgresql://one,two,three/?port=1,2", "postgresql://a[b/"]
)
def test_a_nonsensical_host_is_refused(url: str) -> None:
    """What is no host, or has no port of its own in a list of ports, is an error."""
    with pytest.raises(ValueError, match=r"."):
        hosts.read(url)
