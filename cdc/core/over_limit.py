"""What is over the limit of its handler, and how it comes back. Pure.

A limited handler has some keys ready to start in memory (``Limit.ahead``), so that it uses what it may. The next change
of any further key is *put off*: its key is held, as a number, and the change stays in the table. When fewer than half
of them are ready, the keys that were put off first are read again. Each key of a limit has its own, so that one with a
backlog does not stop another; where too many keys are put off, the type is not read on until some have had their turn.
"""

from __future__ import annotations

from collections.abc import Callable

from cdc.core.admission import Admission
from cdc.core.deferred_keys import DeferredKeys
from cdc.core.handler_permits import PUT_OFF_MAX
from cdc.core.model import Change, Key
from cdc.core.ready_queues import ReadyQueues, Requirements

_AT_LEAST_S = 5.0
"""A key that was put off is read again after so long in any case."""
_DUE_MAX = 2_000


class OverLimit:
    """``due``: the numbers of waiting changes that a read of due changes has brought, and that wait on."""

    def __init__(
        self, deferred: DeferredKeys, ready_queues: ReadyQueues, due: set[int], clock: Callable[[], float]
    ) -> None:
        self._deferred = deferred
        self._ready_queues = ready_queues
        self._due = due
        self._clock = clock
        self._types = set[str]()

    def full(self, entity_type: str) -> bool:
        """Whether so many keys of the type are put off that no more is read of it."""
        return entity_type in self._types and self._deferred.count(entity_type) >= PUT_OFF_MAX

    def admission(self, needs: Requirements, change: Change, *, due: bool) -> Admission | None:
        """What becomes of a change that has room otherwise, and whose key has no queue; None: it is taken."""
        if needs.limit is None or self._ready_queues.waiting(needs) < needs.limit.limit.ahead:
            return None
        if due:
            if len(self._due) < _DUE_MAX:
                self._due.add(change.seq)
            return Admission.RUNS_LATER
        self._types.add(change.entity_type)
        return (
            Admission.REJECT
            if self.full(change.entity_type) or not self._deferred.has_room(change.key)
            else Admission.PUT_OFF
        )

    def put_off(self, needs: Requirements, key: Key) -> None:
        """This key has a mark: hold it until its turn."""
        assert needs.limit is not None
        self._deferred.hold(key, self._clock() + _AT_LEAST_S)
        needs.limit.put_off.setdefault(needs.by, {})[key] = None

    def started(self, needs: Requirements) -> None:
        """Some of these have started: there may be room for the keys that wait the longest."""
        if needs.limit is None or not (keys := needs.limit.put_off.get(needs.by)):
            return
        ahead, coming = needs.limit.limit.ahead, len(self._deferred.reads.get(needs.entity_type, ()))
        if self._ready_queues.waiting(needs) + coming > ahead // 2:
            return
        for key in list(keys)[: ahead - ahead // 2]:
            del keys[key]
            self._deferred.release(key)
        if not keys:
            del needs.limit.put_off[needs.by]
