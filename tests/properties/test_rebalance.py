"""Members that come, go and die, and look at figures that are not true any more when they act on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cdc.core.rebalance import balance
from tests.properties.machine import MACHINE


@dataclass(eq=False)
class _Member:
    owned: set[int] = field(default_factory=set)
    leaving: set[int] = field(default_factory=set)
    """To be given back when what runs on them has settled."""
    looked: tuple[int, int] | None = None
    """(members, free) as of some time ago."""


class MembersAndLocks(RuleBasedStateMachine):
    """The locks are the server's, so no shard is ever owned twice; the rest is for ``balance`` to bring about."""

    def __init__(self) -> None:
        super().__init__()
        self.members: list[_Member] = []
        self.vanished: list[_Member] = []
        """Dead, and the server does not know yet: they hold their locks and count as members."""

    @initialize(shards=st.sampled_from([1, 5, 64]), members=st.integers(1, 4))
    def begin(self, shards: int, members: int) -> None:
        self.shards = shards
        self.members = [_Member() for _ in range(members)]

    @property
    def free(self) -> list[int]:
        held = (member.owned for member in (*self.members, *self.vanished))
        return sorted(set(range(self.shards)).difference(*held))

    @rule()
    def join(self) -> None:
        self.members.append(_Member())

    @precondition(lambda self: len(self.members) > 1)
    @rule(data=st.data(), vanishes=st.booleans())
    def leave(self, data: st.DataObject, vanishes: bool) -> None:
        member = data.draw(st.sampled_from(self.members))
        self.members.remove(member)
        if vanishes:
            self.vanished.append(member)

    @precondition(lambda self: self.vanished)
    @rule()
    def server_notices(self) -> None:
        self.vanished.pop(0)

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        self._look(data.draw(st.sampled_from(self.members)))

    @precondition(lambda self: any(member.looked for member in self.members))
    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        self._act(data.draw(st.sampled_from([member for member in self.members if member.looked])))

    @precondition(lambda self: any(member.leaving for member in self.members))
    @rule(data=st.data())
    def release_all(self, data: st.DataObject) -> None:
        self._release(data.draw(st.sampled_from([member for member in self.members if member.leaving])))

    def _look(self, member: _Member) -> None:
        member.looked = len(self.members) + len(self.vanished), len(self.free)

    def _act(self, member: _Member) -> int:
        """How many shards were asked to move."""
        assert member.looked
        (members, free), member.looked = member.looked, None
        move = balance(members, member.owned, free, shards=self.shards)
        least, most = self._fair(members)
        assert not (move.acquire and move.release), "takes and gives at once"
        assert move.release <= member.owned
        assert move.acquire <= free
        assert len(member.owned) + move.acquire <= max(most, len(member.owned)), "takes more than its share"
        assert len(member.owned - move.release) >= min(least, len(member.owned)), "gives more than its surplus"
        taken = self.free[: move.acquire]  # others may have been quicker
        member.owned.update(taken)
        member.leaving |= move.release
        return len(taken) + len(move.release)

    def _release(self, member: _Member) -> None:
        member.owned -= member.leaving
        member.leaving.clear()

    @invariant()
    def nobody_takes_from_anybody(self) -> None:
        owned = [shard for member in (*self.members, *self.vanished) for shard in member.owned]
        assert len(owned) == len(set(owned))

    def teardown(self) -> None:
        """Nobody comes or goes any more: within three looks all is owned and fair, and nothing moves again."""
        self.vanished.clear()
        moved = sum(self._round() for _ in range(3))  # the first on what was seen before
        assert self._round() == 0, "does not come to rest"
        assert self.free == []
        _, most = self._fair(len(self.members))
        assert max(len(member.owned) for member in self.members) <= most
        assert moved <= 3 * self.shards, "shards go to and fro"

    def _fair(self, members: int) -> tuple[int, int]:
        return self.shards // members, math.ceil(self.shards / members)

    def _round(self) -> int:
        moved = 0
        for member in self.members:
            if member.looked is None:
                self._look(member)
            moved += self._act(member)
            self._release(member)
        return moved


MembersAndLocks.TestCase.settings = MACHINE
TestMembersAndLocks = MembersAndLocks.TestCase
