"""What readers of all brokers have in common: an event, and whether it is a double."""

import json
from collections import OrderedDict

_KEYS_MAX = 100_000


class Events:
    """Takes each event once, in the order of its key, although a broker may hold some of them twice.

    The first copy of an event comes after those of the earlier changes of its key. So what is not behind the last one
    of its key is a double. A service that must not work twice keeps this number in its own database, written in the
    transaction that does the work.
    """

    def __init__(self) -> None:
        self._last: OrderedDict[str, str] = OrderedDict()

    def take(self, body: bytes) -> None:
        event = json.loads(body)
        key, sequence = event["partitionkey"], event["sequence"]
        double = sequence <= self._last.get(key, "")
        if not double:
            self._last[key] = sequence
            self._last.move_to_end(key)
            if len(self._last) > _KEYS_MAX:
                self._last.popitem(last=False)
        print("double" if double else "took", event["type"], key, sequence, flush=True)
