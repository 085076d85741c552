"""Plans stay right as the table grows: they are cached while it is small, when any index costs the same."""

import collections.abc
import json
import types
import typing

import pytest
import replicas

from afterhours_grpc.store import connections, database, endings, lists, outbox, privacy, queries, transitions

# Indexes that are meant for these statements, and for no other.
OWNERS = {
    "after_hours_sessions_due": {
        queries.ACTIVE_DUE,
        queries.ACTIVE_SLICES,
        queries.OVERDUE,
        endings.EXPIRE_OVERDUE,
    },
    "after_hours_sessions_warning": {queries.WARNINGS_DUE, queries.WARNING_SLICES},
    "after_hours_sessions_by_start": {lists._ALL},
    "after_hours_sessions_near": {lists._NEAR},
}
# These begin at one end of a table's index, and stop soon. The outbox is no such table: while a snapshot is held, all
# that was in it is still in the way.
NOT_FROM_AN_END = "after_hours_outbox_pkey"
FROM_AN_END = {
    outbox._LOOK,
    outbox._PLACE,
    outbox._LAST,
    outbox._AFTER,
    outbox._AFTER_OF_USERS,
    privacy._ERASE_OUTBOX,
    privacy._EXPORT,
    *OWNERS["after_hours_sessions_due"],
}
SCANS = {"Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Index Scan"}


def _statements() -> dict[str, database.Statement]:
    modules: tuple[types.ModuleType, ...] = (queries, transitions, endings, lists, outbox, privacy)
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, database.Statement)
    }


def _nodes(plan: dict[str, typing.Any]) -> collections.abc.Iterator[dict[str, typing.Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)


@pytest.mark.parametrize("name", _statements())
async def test_every_row_is_found_by_a_key(engines: replicas.Engines, name: str) -> None:
    """On an empty table, too, each scan is by a key, and each index is used by whom it is meant for."""
    statement = _statements()[name]
    connection = await connections.connect(engines.database_url)
    try:
        await connection.execute(f"SET plan_cache_mode = force_generic_plan; PREPARE it AS {statement.sql}")
        arguments = f"({', '.join('NULL' for _ in statement.names)})" if statement.names else ""
        explained = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE it{arguments}")
    finally:
        await connection.close()
    scans = [node for node in _nodes(json.loads(explained)[0]["Plan"]) if node["Node Type"] in SCANS]
    for node in scans:
        owners = OWNERS.get(node.get("Index Name", ""))
        assert owners is None or statement in owners, node["Index Name"]
        from_an_end = statement in FROM_AN_END and node.get("Index Name") != NOT_FROM_AN_END
        assert "Index Cond" in node or from_an_end, (node["Node Type"], node.get("Index Name"))
    assert all(statement not in each or _uses(scans, index) for index, each in OWNERS.items())


def _uses(scans: list[dict[str, typing.Any]], index: str) -> bool:
    return any(node.get("Index Name") == index for node in scans)
