"""A service on the other side of Redis. ``prepare`` makes streams and group, once; ``read`` reads in the group."""

import os
import signal
import sys
import threading

from events import Events
from redis import Redis, ResponseError

SERVER = os.environ["BROKER"]
STREAMS, GROUP, READER = ["shop:message", "shop:reaction"], "billing", "worker-1"
stopping = threading.Event()


def prepare() -> None:
    with Redis.from_url(SERVER) as client:
        for stream in STREAMS:
            try:
                client.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):  # it is there
                    raise


def read() -> None:
    """First what this reader was given and did not acknowledge (from 0 on), then what is new (">")."""
    events = Events()
    with Redis.from_url(SERVER) as client:
        begin = dict.fromkeys(STREAMS, "0")
        while not stopping.is_set():
            found = client.xreadgroup(GROUP, READER, begin, count=100, block=1_000)
            for stream, entries in found:
                for number, fields in entries:
                    if fields:  # none: MAXLEN has removed it meanwhile
                        events.take(fields[b"event"])
                    client.xack(stream, GROUP, number)
                if not entries:
                    begin[stream.decode()] = ">"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())  # between two messages
    {"prepare": prepare, "read": read}[sys.argv[1]]()
