"""Which changes a handler is called with, and as what: those that its filter wants, their rows as its model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from operator import attrgetter

from cdc.core.latest import Latest
from cdc.core.model import Change, Filtered, Key, Outcome
from cdc.core.router import Handler
from cdc.engine.calls import Contexts, call_in
from cdc.engine.error_policy import ErrorPolicy, TooDeepError
from cdc.engine.handler_input import Prepare, preparations

FILTERED = Filtered()
_CHAIN = attrgetter("chain")


class Validation:
    def __init__(self, handlers: Iterable[Handler], error_policy: ErrorPolicy) -> None:
        self._preparations = preparations(handlers)
        self._error_policy = error_policy

    def of(self, handler: Handler) -> Prepare | None:
        """How a change becomes what the handler gets; None: it gets each as it was read."""
        return self._preparations.get(handler.name)

    def split(
        self,
        handler: Handler,
        changes: Sequence[Change],
        outcomes: dict[Change, Outcome],
        contexts: Contexts,
        latest: Latest | None = None,
    ) -> tuple[Sequence[Change], Sequence[Change]]:
        """The changes to call, as they are and as the handler gets them; sets the outcomes of others.

        Behind a change that waits or stays as it was, the later ones of its key stay as they were. With a transactional
        handler they do so behind any that is not called: the settle marks that one, and their own transaction would not
        wait for it. ``latest``: what is called for the only change.
        """
        prepare = self._preparations.get(handler.name)
        if prepare is None and not any(map(_CHAIN, changes)):
            return changes, [latest.change] if latest else changes
        called: list[Change] = []
        given: list[Change] = []
        held: set[Key] = set()
        for change in changes:
            if change.key in held:
                continue
            try:
                one = _given(latest.change if latest else change, prepare, contexts)
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - filter and model are the handler's code
                outcomes |= self._error_policy.of_call(handler, [change], {change.seq: error}, None, latest)
            else:
                if one is not None:
                    called.append(change)
                    given.append(one)
                    continue
                outcomes[change] = FILTERED
            outcome = outcomes.get(change)
            if handler.transactional or outcome is None or outcome.blocks_key:
                held.add(change.key)
        return called, given


def keep_order(batch: Sequence[Change], outcomes: dict[Change, Outcome]) -> None:
    """After the call: a filtered change behind one of its key that is not done has no outcome, and waits for it."""
    held: set[Key] = set()
    for change in batch:
        outcome = outcomes.get(change)
        if outcome is FILTERED and change.key in held:
            del outcomes[change]
        elif outcome is None or outcome.blocks_key:
            held.add(change.key)


def _given(change: Change, prepare: Prepare | None, contexts: Contexts) -> Change | None:
    if change.chain:
        raise TooDeepError(change)
    return call_in(contexts, prepare, change) if prepare else change
