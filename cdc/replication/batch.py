"""What one read of the stream has brought, messages and keepalives as they come. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cdc.core.model import WakeUp
from cdc.replication.protocol import KEEPALIVE, Plugin, parse


class MessageBatch:
    """The wake-ups and the highest position among what was received, and how much it was."""

    # Of the class, until they are known: most batches are of one message, and set two or three.
    wakeups: Sequence[WakeUp] = ()
    committed_at: float | None = None
    highest = 0
    messages = 0
    keepalives = 0
    bytes = 0
    reply_requested = False

    def read(self, received: Sequence[memoryview], plugin: Plugin) -> None:
        self.bytes = sum(map(len, received))
        messages: list[memoryview] = []
        for data in received:
            if data[0] != KEEPALIVE:
                messages.append(data)
                continue
            position, _, reply_requested = parse(data)
            if position > self.highest:
                self.highest = position
            self.keepalives += 1
            if reply_requested:
                self.reply_requested = True
        if not messages:
            return
        if decoded := plugin.decode_all(messages):
            position, self.wakeups, self.committed_at = decoded
            if position > self.highest:
                self.highest = position
            self.messages = len(messages)
            return
        wakeups: list[WakeUp] = []
        self.wakeups = wakeups
        for data in messages:
            position, message, _ = parse(data)
            # Before decoding: a message that cannot be read is confirmed too, or the server would send it for ever.
            self.highest = max(self.highest, position)
            self.messages += 1
            # An empty one was too long to be ours.
            if message and (notified := plugin.decode(message)) is not None:
                wakeup, self.committed_at = notified
                wakeups.append(wakeup)
