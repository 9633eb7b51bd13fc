"""The cause of a rejected statement, by its SQLSTATE. Pure.

    SESSION   the connection, the role, the schema: no statement on this session will succeed
    MOMENT    a temporary obstacle: a lock, a full disk, another transaction
    ROW       a value, a constraint, an index, a trigger: one of the rows, and the others are not the cause

Classes as in appendix A of PostgreSQL's manual.
"""

from __future__ import annotations

from enum import Enum


class About(Enum):
    SESSION = "session"
    MOMENT = "moment"
    ROW = "row"


_SESSION = ("08", "0L", "25", "26", "28", "34", "3D", "3F", "42", "57P", "F0", "HV")
_MOMENT = ("40", "53", "55P03", "55006", "57014", "58")


def passes(sqlstate: str | None) -> bool:
    """Whether the same statement may succeed on the same session, a moment later."""
    return about(sqlstate) is About.MOMENT


def about(sqlstate: str | None) -> About:
    """None: an error of libpq itself, which is about the connection."""
    if sqlstate is None or sqlstate.startswith(_SESSION):
        return About.SESSION
    return About.MOMENT if sqlstate.startswith(_MOMENT) else About.ROW
