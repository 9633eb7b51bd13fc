"""What one read of the stream has brought, messages and keepalives as they come. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cdc.core.model import WakeUp
from cdc.replication.protocol import KEEPALIVE, Plugin, parse


class MessageBatch:
    """The wake-ups and the highest position among what was received, and how much it was."""

    __slots__ = ("bytes", "committed_at", "highest", "keepalives", "messages", "reply_requested", "wakeups")

    def __init__(self) -> None:
        self.wakeups: list[WakeUp] = []
        self.committed_at: float | None = None
        self.highest = 0
        self.messages = 0
        self.keepalives = 0
        self.bytes = 0
        self.reply_requested = False

    def read(self, received: Sequence[memoryview], plugin: Plugin) -> None:
        self.bytes = sum(map(len, received))
        messages = [data for data in received if data[0] != KEEPALIVE]
        for data in received if len(messages) < len(received) else ():
            if data[0] == KEEPALIVE:
                position, _, reply_requested = parse(data)
                self.highest = max(self.highest, position)
                self.keepalives += 1
                self.reply_requested = self.reply_requested or reply_requested
        if not messages:
            return
        if decoded := plugin.decode_all(messages):
            position, self.wakeups, self.committed_at = decoded
            self.highest = max(self.highest, position)
            self.messages = len(messages)
            return
        for data in messages:
            position, message, _ = parse(data)
            # Before decoding: a message that cannot be read is confirmed too, or the server would send it for ever.
            self.highest = max(self.highest, position)
            self.messages += 1
            # An empty one was too long to be ours.
            if message and (notified := plugin.decode(message)) is not None:
                wakeup, self.committed_at = notified
                self.wakeups.append(wakeup)
