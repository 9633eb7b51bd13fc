"""One call for all the changes of a key that wait: for handlers with ``latest``. Pure; the server says what waits.

Theory
------
Only the *first* of these changes is in the window. It is started, retried, recorded and blamed as any other change is;
those behind it stay in the table, where they cost nothing, however many they are. When it has started, and all before
it have settled, the table is asked what else of its key is fresh: a prefix of the key's changes, up to a bound, that
ends before one that another handler gets, or one that waits. The handler gets both ends of that prefix.

    first started ──ask──► something before it has become visible:  it goes back, and its key is read from there
                      ├──► too early:  put off. It leaves the window, and its key has a time at which it is read on
                      └──► else called, with the first ``old`` and the rest of the last
                             ├─ done, or dead:  so is the last one; the others are processed, coalesced into it
                             └─ fails:  the first waits for its retry, and with it the key. The retry asks again

The changes of one key become visible in the order of their numbers. So whoever asks again, after a failure or after a
crash between a call and its mark, learns at least what was known before, and no call gets an older ``new`` than the
call before it. The mark names the changes that the answer named: what came later is not among them.

That holds for replays among themselves, and for all else. A replay locks no row, so what is visible behind one may not
be all that was written before. So a call stands for replays alone, or for none. A retry may stand for fewer than the
call before it, where one of the other kind has become visible between them. What becomes visible *before* the first is
called before it: something behind the first may have been written when it was there, and would overtake it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from cdc.core.fast_change import document, read_change
from cdc.core.model import Change, Coalesced, Committed, Outcome, Waiting

_FIELDS = tuple(field.name for field in fields(Change))
_OF_FIRST = ("attempt", "requeued", "crashed", "chain")


@dataclass(frozen=True, slots=True)
class Latest:
    """What a call is for. ``change``: as the handler gets it, its filter and its model aside.

    ``later``: the numbers of the changes after the first, as PostgreSQL writes an array; None: there are none.
    ``wait_s``: in how many seconds to ask again, because the key may not be quiet yet; 0: call. ``before``: the number
    of a fresh change of the key that has become visible late, and is to be called first.
    """

    change: Change
    later: str | None = None
    wait_s: float = 0.0
    before: int | None = None

    def outcome(self, outcome: Outcome) -> Outcome:
        """What the outcome of the call means for all of its changes."""
        if self.later is None or isinstance(outcome, Waiting | Coalesced):
            return outcome
        if isinstance(outcome, Committed):
            return replace(outcome, coalesced=self.change)
        return Coalesced(self.change, self.later, outcome)


def latest(first: Change, last: Change, later: str, wait_s: float = 0.0) -> Latest:
    """``last`` and the numbers ``later`` as the table has given them, for a call that was to be made for ``first``."""
    values = {name: getattr(last, name) for name in _FIELDS if name not in ("old", "new", "metadata")}
    values |= {name: document(last, name) for name in ("new", "metadata")}
    values |= {"old": document(first, "old"), "coalesced": later.count(",") + 2}
    values |= {name: getattr(first, name) for name in _OF_FIRST}
    return Latest(read_change(*map(values.__getitem__, _FIELDS)), later, wait_s)
