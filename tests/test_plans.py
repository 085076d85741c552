"""Plans stay right as the table grows: they are cached while it is small, when any index costs the same."""

import collections.abc
import json
import types
import typing

import pytest
import replicas

from afterhours_grpc.store import database, privacy, queries, transitions

# By design these walk through an index from its beginning, or to a bound in it.
WALKS = {queries.ACTIVE_AFTER, queries.OVERDUE, transitions.EXPIRE_OVERDUE}
SCANS = {"Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Index Scan"}


def _statements() -> dict[str, database.Statement]:
    modules: tuple[types.ModuleType, ...] = (queries, transitions, privacy)
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
    """On an empty table, too, each scan is by a key, and none by when sessions are due but those that ask for it."""
    statement = _statements()[name]
    connection = await database.connect(engines.database_url)
    try:
        await connection.execute(f"SET plan_cache_mode = force_generic_plan; PREPARE it AS {statement.sql}")
        arguments = f"({', '.join('NULL' for _ in statement.names)})" if statement.names else ""
        explained = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE it{arguments}")
    finally:
        await connection.close()
    scans = [node for node in _nodes(json.loads(explained)[0]["Plan"]) if node["Node Type"] in SCANS]
    walks = [
        (node["Node Type"], node.get("Index Name"))
        for node in scans
        if "Index Cond" not in node or node["Index Name"] == "after_hours_sessions_due"
    ]
    assert bool(walks) == (statement in WALKS), walks
