"""A service on the other side of Kafka. ``prepare`` makes the topics, once; ``read`` reads them, in a group."""

import os
import signal
import sys
import threading

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from events import Events

SERVERS = os.environ["BROKER"]
TOPICS = ["shop.message", "shop.reaction"]
stopping = threading.Event()


def prepare() -> None:
    topics = [NewTopic(topic, num_partitions=6, replication_factor=1) for topic in TOPICS]
    admin = AdminClient({"bootstrap.servers": SERVERS})
    for made in admin.create_topics(topics).values():
        try:
            made.result(60)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise


def read() -> None:
    """Each reader of the group has some of the partitions, and so all of the changes of its keys."""
    consumer = Consumer({
        "bootstrap.servers": SERVERS, "group.id": "billing", "auto.offset.reset": "earliest",
        "enable.auto.offset.store": False,
    })  # fmt: skip
    consumer.subscribe(TOPICS)
    events = Events()
    try:
        while not stopping.is_set():
            record = consumer.poll(1.0)
            if record is None:
                continue
            if record.error():
                print("waits:", record.error().name(), file=sys.stderr, flush=True)
                continue
            if (body := record.value()) is not None:  # None: a tombstone
                events.take(body)
            consumer.store_offsets(record)  # only now: what was not finished comes again
    finally:
        consumer.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())  # between two messages
    {"prepare": prepare, "read": read}[sys.argv[1]]()
