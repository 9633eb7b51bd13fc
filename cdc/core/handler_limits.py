"""What handlers need to run, and how much of it there is. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cdc.core.circuit_breaker import CircuitBreaker
from cdc.core.handler_permits import Limits
from cdc.core.model import Change, Operation
from cdc.core.ready_queues import ReadyQueues, Requirements
from cdc.core.router import ANY, Handler, Router

_THREADS = "threads"
_CONNECTIONS, _CONNECTIONS_IN_THREADS = "connections", "connections in threads"
_RUN_MAX = 100
"""Calls on the event loop that may return at once."""
_READ_RUN_MAX = 10
"""The same of a backfill's: a change that is written meanwhile waits for no more than these."""
_KINDS_MAX = 10_000
"""Entity type and operation pairs remembered. Types come from the data: nothing else bounds them."""


class HandlerLimits:
    """``concurrency`` handlers may run at a time, of them ``threads`` in threads; ``transactions``: of each kind.

    ``breakers``: by the names of their handlers.
    """

    def __init__(
        self,
        router: Router,
        *,
        concurrency: int,
        threads: int,
        transactions: int,
        breakers: Mapping[str, CircuitBreaker] | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.router = router
        self.limits = Limits(router, clock=clock)
        self._breakers = breakers or {}
        self._known: dict[tuple[str, str], Requirements] = {}
        types = {entity_type for entity_type, _ in router.handlers}
        self.sole_type = len(types) == 1 and ANY not in types
        """No handler waits for changes of any other type."""
        self.coalesces = any(handler.latest for handler in router.handlers.values())
        """Some handler is called once for all that waits of a key."""
        self.ready_queues = ReadyQueues(
            concurrency,
            {_THREADS: threads, _CONNECTIONS: transactions, _CONNECTIONS_IN_THREADS: transactions},
            sole=self.sole_type and len(set(router.handlers.values())) == 1,
        )

    def needs(self, change: Change) -> Requirements:
        kind = (change.entity_type, change.operation)
        needs = self._known.get(kind)
        if needs is None:
            handler = self.router.match(*kind)
            needs = self._of_handler(*kind, handler) if handler else Requirements(change.entity_type)
            if len(self._known) < _KINDS_MAX:
                self._known[kind] = needs
        if needs.limit is not None and needs.limit.limit.by is not None:
            return needs._replace(by=needs.limit.key(change))
        return needs

    def limits_changed(self) -> None:
        """Others are in force than before."""
        self._known.clear()

    def pauses(self, kind: tuple[str, str] | None) -> bool:
        """Whether a dead letter of this type and operation blocks its key. None: of a type that no handler can name."""
        if kind is None:
            return any(
                handler.pauses for (entity_type, _), handler in self.router.handlers.items() if entity_type == ANY
            )
        handler = self.router.match(*kind)
        return handler is not None and handler.pauses

    def _of_handler(self, entity_type: str, operation: str, handler: Handler) -> Requirements:
        read = operation == Operation.READ
        limit = self.limits.of.get(handler.name)
        # A limited call is made as soon as it is counted.
        run = (_READ_RUN_MAX if read else _RUN_MAX) if handler.single and handler.is_async and limit is None else 1
        breaker = self._breakers.get(handler.name)
        return Requirements(
            entity_type, handler, _pools(handler), run=run, breaker=breaker, read=read,
            after_settled=handler.transactional or handler.latest, limit=limit,
        )  # fmt: skip


def _pools(handler: Handler) -> tuple[str, ...]:
    if handler.is_async:
        return (_CONNECTIONS,) if handler.transactional else ()
    return (_THREADS, _CONNECTIONS_IN_THREADS) if handler.transactional else (_THREADS,)
