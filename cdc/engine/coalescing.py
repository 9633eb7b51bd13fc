"""Asks the table what the call of a ``latest`` handler stands for; ``core.latest`` says what that means.

Asked on the reader's session: by the time of the question every change that was read is visible there. Whoever asks
while a question is under way shares the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import islice

import psycopg

from cdc.core.latest import Latest
from cdc.core.model import Change
from cdc.core.router import Handler, Router
from cdc.engine.transactions import AskTheTableError
from cdc.postgres.coalesced import Ask
from cdc.postgres.outbox import Store
from cdc.postgres.unreadable import may_be_refused

_SHARED_MAX = 50
"""Changes of one question: some ten milliseconds, if there is much behind each of them."""


class _Question:
    """``answer`` of None: the change is not as it was read."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.answered = False
        self.answer: Latest | None = None

    def is_answered(self, answer: Latest | None) -> None:
        self.answered, self.answer = True, answer


class Coalescing:
    """``router``: which handler gets what."""

    def __init__(self, router: Router, store: Store) -> None:
        self._router = router
        self._store = store
        self._reader: psycopg.AsyncConnection | None = None
        self._questions: dict[int, _Question] = {}
        """By the number of their change, the oldest first; those that are answered until it was taken."""
        self._asking = asyncio.Lock()

    def use_reader(self, reader: psycopg.AsyncConnection) -> None:
        """Ask on this session from now on."""
        self._reader = reader

    async def ask(self, handler: Handler, change: Change, *, may_wait: bool) -> Latest:
        """What a call for this started change stands for. Raises AskTheTableError: it is not as it was read.

        ``may_wait``: the key is given its time to settle, unless there was a call before.
        """
        waits = may_wait and not (change.requeued or change.crashed)
        operations = self._router.operations(change.entity_type, handler)
        ask = Ask(change, operations, handler.quiet_s if waits else 0.0, handler.at_most_s)
        question = self._questions[change.seq] = _Question(ask)
        try:
            async with self._asking:
                while not question.answered:
                    await self._ask_for_all()
        finally:
            del self._questions[change.seq]
        if question.answer is None:
            raise AskTheTableError("another call, or another session, has processed the change", 0.0)
        return question.answer

    async def _ask_for_all(self) -> None:
        open_ = {each.ask: each for each in self._questions.values() if not each.answered}
        asks = list(islice(open_, _SHARED_MAX))
        for ask, answer in (await self._answers(asks)).items():
            open_[ask].is_answered(answer)

    async def _answers(self, asks: list[Ask]) -> Mapping[Ask, Latest | None]:
        assert self._reader is not None
        try:
            return await self._store.coalesced.ask(self._reader, asks)
        except psycopg.Error as error:
            if self._reader.closed or not may_be_refused("ask", error):
                raise AskTheTableError("the table could not be asked what waits behind it") from error
        # A row is refused, which its reader makes a dead letter of. A call for the first one alone is always right.
        if len(asks) == 1:
            return {asks[0]: Latest(asks[0].change)}
        return {ask: answer for each in asks for ask, answer in (await self._answers([each])).items()}
