"""The real Apache Kafka broker and its clients."""

import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic

# A broker that lives for a test is not worth optimizing: it starts with 4 s of CPU time instead of 7.
ENVIRONMENT = {"PINION_KAFKA_JAVA_OPTIONS": "-XX:TieredStopAtLevel=1", **os.environ}
SCRIPT = Path(__file__).resolve().parents[1] / "kafka" / "broker"


class Broker:
    """One broker with its state in a folder of its own; may be killed and started again."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.kills = 0
        self.bootstrap = self.start()

    def _script(self, verb):
        command = [str(SCRIPT), verb, str(self.folder)]
        done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=300)
        if done.returncode != 0:
            raise RuntimeError(f"tests/kafka/broker {verb} exited {done.returncode}")
        return done.stdout.strip()

    def start(self):
        return self._script("start")

    def kill(self):
        self.kills += 1
        self._script("kill")

    def alive(self):
        return subprocess.run([str(SCRIPT), "status", str(self.folder)], stdout=subprocess.DEVNULL).returncode == 0

    def stop(self):
        self._script("stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def topic(self, prefix, partitions=3, **config):
        """Creates a topic of that name plus something unique; returns the name."""
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.create(name, partitions, **config)
        return name

    def create(self, name, partitions, **config):
        admin = AdminClient({"bootstrap.servers": self.bootstrap})
        topic = NewTopic(name, partitions, 1, config={k.replace("_", "."): v for k, v in config.items()})
        deadline = time.monotonic() + 60
        while True:
            try:
                for made in admin.create_topics([topic]).values():
                    made.result(30)
                return
            except KafkaException as error:
                # A node that had too little CPU for its own heartbeat is fenced for a moment.
                fenced = error.args[0].code() == KafkaError.INVALID_REPLICATION_FACTOR
                if not fenced or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def delete(self, name):
        admin = AdminClient({"bootstrap.servers": self.bootstrap})
        for gone in admin.delete_topics([name]).values():
            gone.result(30)
        deadline = time.monotonic() + 30
        while name in admin.list_topics(timeout=10).topics:
            assert time.monotonic() < deadline, f"topic {name} is still listed 30 s after its deletion"
            time.sleep(0.1)

    def producer(self, **options):
        return Producer(
            {
                "bootstrap.servers": self.bootstrap,
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": 1,
                "log_level": 2,
                **options,
            }
        )


class Log:
    """What was produced, as the broker acknowledged it: the input of the oracle.

    `records[partition]` maps offsets to (key, value, timestamp in ms); long streams keep only their ends.
    """

    def __init__(self, producer, topic, keep=True):
        self.producer = producer
        self.topic = topic
        self.keep = keep
        self.records = {}
        self.next_offsets = {}
        self.errors = []

    def send(self, value, key=None, partition=None, timestamp_millis=0, headers=None):
        """Queues one record; blocks only while the client's queue is full."""

        def delivered(error, message):
            if error is not None:
                self.errors.append(str(error))
                return
            partition, offset = message.partition(), message.offset()
            self.next_offsets[partition] = max(self.next_offsets.get(partition, 0), offset + 1)
            if self.keep:
                self.records.setdefault(partition, {})[offset] = (key, value, message.timestamp()[1])

        options = {} if partition is None else {"partition": partition}
        if headers is not None:
            options["headers"] = headers
        while True:
            try:
                self.producer.produce(
                    self.topic, value=value, key=key, timestamp=timestamp_millis, on_delivery=delivered, **options
                )
                break
            except BufferError:
                self.producer.poll(0.05)
        self.producer.poll(0)

    def flush(self):
        """Waits until the broker has everything."""
        left = self.producer.flush(60)
        assert left == 0 and not self.errors, f"{left} records undelivered, errors {self.errors[:3]}"

    def ends(self):
        """partition -> next offset, for every partition written to."""
        return dict(self.next_offsets)

    def in_order(self):
        """(partition, offset, key, value, timestamp) of every record, partition by partition."""
        for partition in sorted(self.records):
            for offset in sorted(self.records[partition]):
                yield (partition, offset, *self.records[partition][offset])
