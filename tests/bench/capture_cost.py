"""What a captured row costs its writer's server, in instructions: ``python -m tests.bench.capture_cost``

Counted by valgrind's callgrind on a single-user server, a transaction for each row: the figures depend on the version
and the build of the server, and not on how busy the machine is. Of a short and a long run the difference is taken, so
that starting, planning and compiling do not count. What a statement costs on a table that is not tracked is subtracted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from cdc.contrib.demo.temp_server import TempServer
from cdc.postgres import migrations
from cdc.postgres.tracking import track
from tests.bench import report

_SHORT, _LONG = 100, 400
_SETTINGS = {"autovacuum": "off", "fsync": "off"}
_COUNTED = re.compile(r"Collected : (\d+)")
_COLUMNS = "customer text, total numeric, note text"
_BY_ID = f"CREATE TABLE orders (id bigint PRIMARY KEY, {_COLUMNS})"
_BY_TWO = f"CREATE TABLE orders (id bigint, line integer, {_COLUMNS}, PRIMARY KEY (id, line))"
_IN_A_CHAT = f"CREATE TABLE orders (id bigint PRIMARY KEY, user_id bigint, chat_id text, {_COLUMNS})"
_BY_HAND = """
CREATE TRIGGER captured AFTER INSERT OR UPDATE OR DELETE ON orders
FOR EACH ROW EXECUTE FUNCTION capture_entity_change('', '{"key": ["id"]}')
"""
_VALUES = "'customer {n}', 12.50, 'some note of moderate length for row {n}'"
_INSERT = f"INSERT INTO orders VALUES ({{n}}, {_VALUES})"
_BULK_ROWS = 20
_BULK = f"""INSERT INTO orders SELECT n, 'customer ' || n, 12.50, 'some note of moderate length for row ' || n
FROM generate_series({{n}} * {_BULK_ROWS}, ({{n}} + 1) * {_BULK_ROWS} - 1) AS n""".replace("\n", " ")
_UPDATE = "UPDATE orders SET total = total + 1 WHERE id = {n}"
_DELETE = "DELETE FROM orders WHERE id = {n}"


@dataclass(frozen=True, slots=True)
class Case:
    """``statements``: by what is shown of them, in the order in which they run on one table."""

    table: str
    statements: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    general: bool = False
    """Captured by a trigger made by hand, with the general function."""
    rows: int = 1
    """Of each statement."""


CASES = {
    "id": Case(_BY_ID, {"INSERT": _INSERT, "UPDATE": _UPDATE, "DELETE": _DELETE}),
    "two_columns": Case(_BY_TWO, {"INSERT, key of two columns": f"INSERT INTO orders VALUES ({{n}}, 1, {_VALUES})"}),
    "excluded": Case(_BY_ID, {"INSERT, one column excluded": _INSERT}, {"exclude": ["note"]}),
    "in_a_chat": Case(
        _IN_A_CHAT, {"INSERT, user_id and chat_id": f"INSERT INTO orders VALUES ({{n}}, 7, 'c', {_VALUES})"}
    ),
    "bulk": Case(_BY_ID, {f"INSERT of {_BULK_ROWS} rows, each": _BULK}, rows=_BULK_ROWS),
    "general": Case(_BY_ID, {"INSERT, capture_entity_change()": _INSERT}, general=True),
}
"""By a name for their databases."""


def missing() -> str | None:
    """Why nothing can be counted here; None where it can."""
    return None if shutil.which("valgrind") else "valgrind is not installed"


def above_untracked(short: int = _SHORT, long: int = _LONG) -> dict[str, float]:
    """Instructions a captured row above those of the same statement untracked, by the statement's name.

    ``short``, ``long``: statements of the two runs. By default it takes some ten seconds of one core a statement.
    """
    with TempServer(settings=_SETTINGS) as server:
        for name, case in CASES.items():
            _create(server, f"{name}_untracked", case).close()
            with _create(server, f"{name}_tracked", case) as connection:
                migrations.install(connection, "public")
                if case.general:
                    connection.execute(_BY_HAND)
                else:
                    track(connection, "public", "orders", **case.options)
        server.stop()
        return {
            shown: (
                _a_statement(server, f"{name}_tracked", statement, short, long)
                - _a_statement(server, f"{name}_untracked", statement, short, long)
            )
            / case.rows
            for name, case in CASES.items()
            for shown, statement in case.statements.items()
        }


def _create(server: TempServer, database: str, case: Case) -> psycopg.Connection:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    connection = psycopg.connect(server.dsn(database), autocommit=True)
    connection.execute(case.table.encode())
    return connection


def _a_statement(server: TempServer, database: str, statement: str, short: int, long: int) -> float:
    first = _count(server, database, [statement.format(n=n) for n in range(short)])
    second = _count(server, database, [statement.format(n=n) for n in range(short, short + long)])
    return (second - first) / (long - short)


def _count(server: TempServer, database: str, statements: Sequence[str]) -> int:
    """Instructions of a server that executes these, each in a transaction of its own. The cluster is stopped."""
    owner = server.data.stat()  # the server refuses any other user, and root
    done = subprocess.run(
        [
            "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", server.bindir / "postgres",
            "--single", "-D", server.data, database,
        ],
        input="".join(f"{statement}\n" for statement in statements), text=True, capture_output=True, check=True,
        cwd=server.folder, user=owner.st_uid, group=owner.st_gid, extra_groups=[],
    )  # fmt: skip
    counted = _COUNTED.search(done.stderr)
    assert counted, done.stderr
    assert "ERROR" not in done.stderr, done.stderr
    return int(counted[1])


def main() -> None:
    if why := missing():
        raise SystemExit(f"capture_cost counts nothing: {why}")
    rows = [(shown, f"{instructions / 1000:,.0f}") for shown, instructions in above_untracked().items()]
    print(report.aligned([("statement", "thousand instructions above untracked"), *rows], right=[1]))


if __name__ == "__main__":
    main()
