"""Exactly once, whatever is killed: the server, the broker, both, or the server while it recovers.

Two producers keep a topic of four partitions busy, one plainly and one in transactions of which a third is aborted. Two
tables read it: `history` keeps every record with its partition and offset, `latest` the last one of each key. Again and again
something gets a `kill -9` at a random moment and is started again, and then the tables are compared with what an
independent consumer (read_committed, confluent-kafka) found in the topic:

- below a partition's position every committed record is in `history` once, with its value, and no other: none that was
  aborted, none twice, none from the position on;
- `latest` holds of each key the last record below the position;
- no position ever goes back, and after each kill reading goes on.

At the end, what the producers were told is compared with the topic: what was acknowledged is there once, what was aborted is
not; but for transactions during which the broker was killed, of which it says nothing that can be relied on. The fast form makes 20 kills, `--soak` 200. The seed is printed; PINION_TEST_SEED repeats a run's choices.
"""

import json
import os
import random
import threading
import time

import numpy
import pytest
from confluent_kafka import KafkaException

from support import flight as calls
from support.truth import Truth, settled_ends
from support.wait import until

pytestmark = pytest.mark.kafka

PARTITIONS = 4
KEYS = 2_000
PLAIN_PER_SECOND = 1_500
QUEUED_MOST = 20_000
TABLES = [
    """
[table]
name = "history"
entity = [{{ name = "id", type = "string" }}]
event_time = {{ name = "ts", type = "timestamp[ms, tz=UTC]", from = "$timestamp" }}
history = "all"

[[feature]]
name = "n"
type = "int64"

[[feature]]
name = "source_partition"
type = "int32"
from = "$partition"

[[feature]]
name = "source_offset"
type = "int64"
from = "$offset"

[source.kafka]
topic = "{topic}"
format = "json"
""",
    """
[table]
name = "latest"
entity = [{{ name = "id", type = "string" }}]
history = "latest"

[[feature]]
name = "n"
type = "int64"

[[feature]]
name = "source_partition"
type = "int32"
from = "$partition"

[[feature]]
name = "source_offset"
type = "int64"
from = "$offset"

[source.kafka]
topic = "{topic}"
format = "json"
""",
]
# Small logs: kills also find segments being written and merged.
# With monitors, so that a broker dies while they are told as well.
SETTINGS = {
    "PINION__STORE__DELTA_MAX_ROWS": 1_500,
    "PINION__STORE__MAX_SEGMENTS": 4,
    "PINION__KAFKA__MONITORS": "true",
}
FAST = {"server": 11, "recovery": 4, "broker": 3, "both": 2}
SOAK = {"server": 120, "recovery": 30, "broker": 30, "both": 20}


class Numbers:
    """Record numbers, each given once to one of the producers."""

    def __init__(self):
        self._lock = threading.Lock()
        self._next = 0

    def take(self, count):
        with self._lock:
            first, self._next = self._next, self._next + count
        return range(first, first + count)


def event(number):
    """(value, partition) of a record. A key stays on its partition, so that its records have one order."""
    key = number * 7919 % KEYS
    return json.dumps({"id": f"k{key}", "n": number}).encode(), key % PARTITIONS


class Plain(threading.Thread):
    """One idempotent producer, at a steady rate; `acknowledged` are the numbers that the broker took."""

    def __init__(self, kafka, topic, numbers):
        super().__init__(daemon=True)
        self.producer = kafka.producer(**{"reconnect.backoff.max.ms": 500})
        self.topic, self.numbers = topic, numbers
        self.acknowledged, self.errors = [], []
        self.stopping = threading.Event()

    def run(self):
        began, sent = time.monotonic(), 0
        while not self.stopping.wait(0.01):
            due = min(round((time.monotonic() - began) * PLAIN_PER_SECOND) - sent, PLAIN_PER_SECOND)
            if len(self.producer) > QUEUED_MOST:
                # The broker is gone for long: what is due now is never sent.
                due, sent = 0, sent + due
            for number in self.numbers.take(due):
                value, partition = event(number)
                self.send(value, partition, number)
            sent += due
            self.producer.poll(0)

    def send(self, value, partition, number):
        def delivered(error, _):
            if error is None:
                self.acknowledged.append(number)
            else:
                self.errors.append(str(error))

        while True:
            try:
                self.producer.produce(self.topic, value, partition=partition, on_delivery=delivered)
                return
            except BufferError:
                self.producer.poll(0.05)

    def stop(self):
        self.stopping.set()
        self.join()
        left = self.producer.flush(60)
        assert left == 0 and not self.errors, f"{left} records undelivered, errors {self.errors[:3]}"


class Transactions(threading.Thread):
    """Transactions of 1 to 40 records, a third aborted. Numbers of a transaction that did not end, or during which the broker
    was killed, are `unsure`, whatever the producer says of them: librdkafka 2.16 before Kafka 4.3 then reports aborts of
    which the topic has no marker (the records fall to the next transaction of the same epoch), and commits of which
    nothing is there. A producer in doubt is made anew."""

    def __init__(self, kafka, topic, numbers, seed):
        super().__init__(daemon=True)
        self.kafka, self.topic, self.numbers = kafka, topic, numbers
        self.random = random.Random(seed + 1)
        self.committed, self.aborted, self.unsure = [], [], []
        self.made_anew = 0
        self.producer = None
        self.failure = None
        self.stopping = threading.Event()

    def ready(self):
        """The producer; a new one once the last cannot be used any more."""
        while self.producer is None:
            producer = self.kafka.producer(
                **{
                    "transactional.id": f"exactly-once-{self.topic}",
                    "transaction.timeout.ms": 10_000,
                    "reconnect.backoff.max.ms": 500,
                    "linger.ms": 0,
                }
            )
            try:
                producer.init_transactions(10)
                self.producer = producer
            except KafkaException:
                time.sleep(0.2)
        return self.producer

    def run(self):
        try:
            while not self.stopping.wait(0.02):
                self.transaction(abort=self.random.random() < 1 / 3)
            # The topic ends on abort markers.
            while not self.transaction(abort=True, count=4 * PARTITIONS):
                pass
        except Exception as error:  # the test shows it
            self.failure = error

    def transaction(self, abort, count=None):
        """One transaction; true when it ended as it should."""
        producer = self.ready()
        kills = self.kafka.kills
        numbers = self.numbers.take(count or self.random.randrange(1, 40))

        def ended(as_told):
            (as_told if self.kafka.kills == kills else self.unsure).extend(numbers)

        try:
            producer.begin_transaction()
            for number in numbers:
                value, partition = event(number)
                producer.produce(self.topic, value, partition=partition)
            if abort:
                producer.flush(10)
                self.again(lambda: producer.abort_transaction(10))
                ended(self.aborted)
            else:
                self.again(lambda: producer.commit_transaction(10))
                ended(self.committed)
            return True
        except KafkaException as error:
            self.unsure.extend(numbers)
            if error.args[0].txn_requires_abort():
                try:
                    self.again(lambda: producer.abort_transaction(10))
                    return False
                except KafkaException:
                    pass
            self.producer = None
            self.made_anew += 1
            return False

    def again(self, step):
        """Repeats a step that may be repeated."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return step()
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > deadline:
                    raise

    def stop(self):
        self.stopping.set()
        self.join(120)
        assert not self.is_alive(), "the transactional producer hangs"
        assert self.failure is None, f"the transactional producer ended: {self.failure!r}"


class Campaign:
    """Kills, restarts and comparisons on one store and one topic."""

    def __init__(self, kafka, server, topic, truth, seed):
        self.kafka, self.server, self.topic, self.truth = kafka, server, topic, truth
        self.random = random.Random(seed)
        self.positions = {}
        self.starts = []
        self.broker_starts = []
        self.rows = 0

    def start_server(self):
        self.server.start(env=SETTINGS)
        self.starts.append(self.server.start_seconds)

    def start_broker(self):
        began = time.monotonic()
        self.kafka.start()
        self.broker_starts.append(time.monotonic() - began)

    def cycle(self, kind):
        """Lets everything run for a moment, kills, starts again, compares, and sees that reading goes on."""
        time.sleep(self.random.random() * 0.8)
        if kind in ("broker", "both"):
            self.kafka.kill()
        if kind == "both":
            time.sleep(self.random.random() * 0.3)
        if kind != "broker":
            self.server.kill()
        if kind == "recovery":
            for _ in range(self.random.randrange(1, 4)):
                self.server.start(env=SETTINGS, wait=False)
                time.sleep(self.random.random() * 0.06)
                self.server.kill()
        # Either may be back first.
        if kind == "both" and self.random.random() < 0.5:
            self.start_server()
            self.read("history")
        if kind in ("broker", "both"):
            self.start_broker()
        if not self.server.alive():
            self.start_server()
        self.compare("history")
        self.compare("latest")
        self.goes_on()

    def read(self, table):
        """The rows, and the positions of the same snapshot, which never go back."""
        client = calls.connect(self.server)
        rows, positions = calls.scan_with_positions(client, table)
        reached = positions.get(self.topic, {})
        before = self.positions.get(table, {})
        back = {p: (before[p], reached.get(p)) for p in before if reached.get(p, -1) < before[p]}
        assert not back, f"{table}: positions went back: {back}"
        self.positions[table] = reached
        return rows, reached

    def compare(self, table):
        rows, reached = self.read(table)
        until(lambda: self.truth.has_reached(reached), 60, f"the other consumer reading up to {reached}")
        partitions, offsets, numbers = (
            rows[name].to_numpy() for name in ("source_partition", "source_offset", "n")
        )
        assert set(numpy.unique(partitions)) <= set(reached), f"{table}: rows of partitions without a position"
        for partition, position in reached.items():
            here = partitions == partition
            order = numpy.argsort(offsets[here], kind="stable")
            found = offsets[here][order], numbers[here][order]
            if table == "history":
                expected = self.truth.below(partition, position)
            else:
                newest = sorted(self.truth.newest(partition, position).values())
                expected = tuple(numpy.array(newest, dtype=numpy.int64).reshape(-1, 2).T)
            same(f"{table}, partition {partition} below {position}", found, expected)
        if table == "history":
            self.rows = rows.num_rows

    def goes_on(self):
        """Waits until both tables have read what the other consumer has by now."""
        ends = dict(enumerate(self.truth.reached))

        def reached():
            assert self.server.alive(), f"the server exited\n{self.server.log_text()}"
            client = calls.connect(self.server)
            found = [calls.scan_with_positions(client, t, limit=1)[1].get(self.topic, {}) for t in ("history", "latest")]
            return all(positions.get(p, 0) >= end for positions in found for p, end in ends.items())

        until(reached, 60, f"both tables reading up to {ends}")


def same(what, found, expected):
    """Fails with the first offsets that differ."""
    (offsets, numbers), (expected_offsets, expected_numbers) = found, expected
    if not numpy.array_equal(offsets, expected_offsets):
        unique, counts = numpy.unique(offsets, return_counts=True)
        missing = numpy.setdiff1d(expected_offsets, offsets)
        alien = numpy.setdiff1d(offsets, expected_offsets)
        raise AssertionError(
            f"{what}: {len(offsets)} rows of {len(expected_offsets)}; missing {missing[:5]} ({len(missing)}), not"
            f" committed or past the position {alien[:5]} ({len(alien)}), more than once {unique[counts > 1][:5]}"
        )
    assert numpy.array_equal(numbers, expected_numbers), f"{what}: other values"


@pytest.mark.timeout(7200)
def test_every_record_is_there_once_whatever_is_killed(store, kafka, serve, soak):
    seed = int(os.environ.get("PINION_TEST_SEED", time.time_ns() % 2**32))
    print(f"PINION_TEST_SEED={seed}")
    kinds = [kind for kind, count in (SOAK if soak else FAST).items() for _ in range(count)]
    random.Random(seed).shuffle(kinds)
    topic = kafka.topic("exactly-once", partitions=PARTITIONS)
    store.apply(*(table.format(topic=topic) for table in TABLES))
    server = serve(brokers=kafka.bootstrap, start=False)
    truth = Truth(kafka.bootstrap, topic, PARTITIONS)
    campaign = Campaign(kafka, server, topic, truth, seed)
    numbers = Numbers()
    plain, transactions = Plain(kafka, topic, numbers), Transactions(kafka, topic, numbers, seed)
    began = time.monotonic()
    campaign.start_server()
    for thread in (truth, plain, transactions):
        thread.start()
    try:
        campaign.goes_on()
        for number, kind in enumerate(kinds):
            try:
                campaign.cycle(kind)
            except Exception as error:
                state = "runs" if server.alive() else f"exited ({server.process.poll()})"
                raise AssertionError(
                    f"cycle {number} ({kind}), PINION_TEST_SEED={seed}: {error!r}; the server {state}\n{server.log_text()}"
                ) from error
            if number % 5 == 4:
                server.kill()
                store.run("check")
                campaign.start_server()
    finally:
        if not kafka.alive():
            kafka.start()
        plain.stop()
        transactions.stop()

    # To the end of the topic, over its last abort markers, with nothing lagging.
    ends = until(lambda: settled_ends(kafka.bootstrap, topic, range(PARTITIONS)), what="the end of every transaction")
    client = calls.connect(server)
    for table in ("history", "latest"):
        barrier = {topic: {str(p): end - 1 for p, end in ends.items()}}
        _, reached = calls.scan_with_positions(client, table, limit=1, at_least=barrier, timeout_ms=60_000)
        assert reached[topic] == ends, (table, reached, ends)
        campaign.compare(table)
    until(lambda: lag(client, topic) == 0, what="the lag returning to 0")
    until(lambda: truth.has_reached(ends), what="the other consumer reading everything")
    truth.stop()
    server.stop()
    store.run("check")

    written = numpy.concatenate([truth.below(p, 2**62)[1] for p in range(PARTITIONS)])
    assert len(numpy.unique(written)) == len(written), "the producers wrote a record twice"
    for what, claimed in (("acknowledged", plain.acknowledged), ("committed", transactions.committed)):
        lost = numpy.setdiff1d(claimed, written)
        assert len(lost) == 0, f"{len(lost)} {what} records are not in the topic: {lost[:5]}"
    leaked = numpy.intersect1d(transactions.aborted, written)
    assert len(leaked) == 0, f"{len(leaked)} aborted records are in the topic: {leaked[:5]}"
    # Most transactions are in doubt while a broker is killed every few seconds; the last one's 16 records alone are not enough.
    assert len(transactions.aborted) > 32 and len(transactions.committed) > 32
    assert campaign.rows == len(written)

    print(f"kills: {len(kinds)}, {({kind: kinds.count(kind) for kind in FAST})}, in {time.monotonic() - began:.0f} s")
    print(
        f"records: {campaign.rows}, each once; {len(transactions.committed)} of them in transactions, beside"
        f" {len(transactions.aborted)} aborted and {len(transactions.unsure)} that a dead broker left in doubt"
        f" ({transactions.made_anew} producers made anew)"
    )
    starts, broker = sorted(campaign.starts), sorted(campaign.broker_starts)
    print(f"server, kill to ready: median {starts[len(starts) // 2]:.3f} s, slowest {starts[-1]:.3f} s of {len(starts)}")
    print(f"broker, start to listening: median {broker[len(broker) // 2]:.1f} s, slowest {broker[-1]:.1f} s")


def lag(client, topic):
    (result,) = calls.action(client, "source", action="list")
    (source,) = [source for source in result["sources"] if source["topic"] == topic]
    return source["lag"] if source["state"] == "running" else None
