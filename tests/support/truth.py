"""What a topic holds, by a client that is not Pinion: every record that read_committed lets through, and where it ends."""

import json
import threading

import numpy
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition


class Truth(threading.Thread):
    """Reads a topic from its start until told to stop, across restarts of the broker.

    Of each partition: `offsets` and `numbers` (the member `n` of the JSON values), ascending by offset, and `reached`:
    below it everything committed has been read.
    """

    def __init__(self, bootstrap, topic, partitions):
        super().__init__(daemon=True)
        self.offsets = [[] for _ in range(partitions)]
        self.numbers = [[] for _ in range(partitions)]
        self.keys = [[] for _ in range(partitions)]
        self.reached = [0] * partitions
        self.failure = None
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "truth",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 100,
                "reconnect.backoff.max.ms": 500,
                "log_level": 2,
            }
        )
        self._consumer.assign([TopicPartition(topic, partition, 0) for partition in range(partitions)])

    def run(self):
        try:
            while not self.stopping.is_set():
                for message in self._consumer.consume(5_000, 0.05):
                    self._take(message)
        except Exception as error:  # whoever waits for us shows it
            self.failure = error
        finally:
            self._consumer.close()

    def _take(self, message):
        error = message.error()
        partition = message.partition()
        if error is None:
            value = json.loads(message.value())
            with self._lock:
                assert message.offset() >= self.reached[partition]
                self.offsets[partition].append(message.offset())
                self.numbers[partition].append(value["n"])
                self.keys[partition].append(value["id"])
                self.reached[partition] = message.offset() + 1
        elif error.code() == KafkaError._PARTITION_EOF:
            with self._lock:
                self.reached[partition] = max(self.reached[partition], message.offset())
        elif error.fatal() or error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise KafkaException(error)

    def has_reached(self, positions):
        """True once it has read below all of {partition: offset}."""
        if self.failure is not None:
            raise self.failure
        return all(self.reached[partition] >= offset for partition, offset in positions.items())

    def below(self, partition, position):
        """(offsets, numbers) of what is committed below a position, as arrays."""
        with self._lock:
            offsets = numpy.array(self.offsets[partition], dtype=numpy.int64)
            numbers = numpy.array(self.numbers[partition], dtype=numpy.int64)
        below = offsets < position
        return offsets[below], numbers[below]

    def newest(self, partition, position):
        """{key: (offset, number)} of the last committed record of each key below a position."""
        with self._lock:
            records = zip(self.keys[partition], self.offsets[partition], self.numbers[partition], strict=True)
            return {key: (offset, number) for key, offset, number in records if offset < position}

    def stop(self):
        self.stopping.set()
        self.join(30)


def settled_ends(bootstrap, topic, partitions):
    """{partition: next offset}, once no transaction is open there: a broker says that it has ended one before its
    markers are written. None until then."""
    found = ends(bootstrap, topic, partitions)
    return found if found == ends(bootstrap, topic, partitions, "read_committed") else None


def ends(bootstrap, topic, partitions, isolation="read_uncommitted"):
    """{partition: next offset}: behind the last record or marker, whether it is committed or not; with "read_committed"
    where the first open transaction begins, if there is one."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "ends", "isolation.level": isolation})
    try:
        return {
            partition: consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=30, cached=False)[1]
            for partition in partitions
        }
    finally:
        consumer.close()
