"""Read your own write: whoever produced a record waits for its offset and finds it, whatever else goes on.

The fears: a barrier that lets a read through too early; one that waits for an offset that no row will ever have (an
aborted record, a transaction's marker) and hangs; and a test of all this that would pass without any barrier.

Two processes put 10,000 records a second on four partitions, one of them in transactions of which every third is aborted. A
trial writes one record in this process, plainly or in a transaction of its own, takes the offset out of the delivery
report, and a third process looks the key up: first without a barrier, which may be stale, then with one, which must not.
Of a transaction that was aborted, the barrier is the end of its partition, marker included, and what is read the value
before.
"""

import itertools
import json
import multiprocessing
import random
import subprocess
import sys
import threading
import time

import pinion
import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition

from support.process import REPOSITORY
from support.process import pinion as command
from support.truth import ends
from support.wait import until

pytestmark = pytest.mark.kafka

PARTITIONS = 4
RATE = 10_000
WORKERS = 4
WAIT_SECONDS = 20
TABLE = """
[table]
name = "items"
entity = [{{ name = "id", type = "string" }}]
history = "latest"

[features]
n = "int64"

[source.kafka]
topic = "{topic}"
format = "json"
"""


def reader(url, pipes):
    """The other process: one thread for each pipe, which answers (key, wait) with what it read, without and with it."""
    threads = [threading.Thread(target=read, args=(url, pipe)) for pipe in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read(url, pipe):
    with pinion.connect(url) as client:
        lookup = client.prepare(["items:n"])
        while (asked := pipe.recv()) is not None:
            key, wait = asked
            keys = {"id": [key]}
            try:
                (now,) = lookup(keys)["n"].to_pylist()
                began = time.perf_counter()
                (waited,) = lookup(keys, wait=wait, wait_timeout=WAIT_SECONDS)["n"].to_pylist()
                pipe.send((now, waited, time.perf_counter() - began, None))
            except pinion.PinionError as error:
                pipe.send((None, None, None, f"{type(error).__name__}: {error}"))


class Worker(threading.Thread):
    """Makes trials one after the other; keys of its own, one for each partition, so that values only grow."""

    def __init__(self, kafka, topic, number, pipe, turns, seed):
        super().__init__(daemon=True)
        self.topic, self.number, self.pipe, self.turns = topic, number, pipe, turns
        self.random = random.Random(seed * 1_000 + number)
        self.plain = kafka.producer(**{"linger.ms": 0})
        self.transactional = kafka.producer(
            **{"linger.ms": 0, "transactional.id": f"trial-{topic}-{number}", "transaction.timeout.ms": 30_000}
        )
        self.consumer = Consumer(
            {"bootstrap.servers": kafka.bootstrap, "group.id": "ends", "isolation.level": "read_uncommitted"}
        )
        self.committed = [None] * PARTITIONS
        self.written = itertools.count(1)
        self.waits = {"plain": [], "committed": [], "aborted": []}
        self.stale = 0
        self.wrong = []
        self.failure = None

    def run(self):
        try:
            self.transactional.init_transactions(30)
            for _ in self.turns:
                self.trial(self.random.choice(["plain", "plain", "committed", "aborted"]))
        except Exception as error:  # the test shows it
            self.failure = error
        finally:
            self.pipe.send(None)
            self.consumer.close()

    def key(self, partition):
        return f"trial {self.number} {partition}"

    def produce(self, producer, partition, value):
        """Produces one record; returns what its delivery report says."""
        seen = pinion.Offsets()
        value = json.dumps({"id": self.key(partition), "n": value}).encode()
        producer.produce(self.topic, value, partition=partition, on_delivery=seen.delivered)
        assert producer.flush(30) == 0 and seen, "a record was not delivered"
        return seen

    def end(self, partition):
        """The offset of the last record or marker in a partition."""
        _, high = self.consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=30, cached=False)
        return high - 1

    def trial(self, kind, partition=None):
        if partition is None:
            partition = self.random.randrange(PARTITIONS)
        value = next(self.written)
        if kind == "plain":
            wait = self.produce(self.plain, partition, value)
        else:
            self.transactional.begin_transaction()
            wait = self.produce(self.transactional, partition, value)
            if kind == "committed":
                self.transactional.commit_transaction(30)
            else:
                self.transactional.abort_transaction(30)
                wait = pinion.Offsets({self.topic: {partition: self.end(partition)}})
        if kind != "aborted":
            self.committed[partition] = value
        self.pipe.send((self.key(partition), wait.token()))
        now, waited, seconds, error = self.pipe.recv()
        expected = self.committed[partition]
        if error is not None or waited != expected:
            self.wrong.append((kind, partition, wait.token(), f"read {waited}, expected {expected}", error))
            return
        self.stale += now != expected
        self.waits[kind].append(seconds)


class Load:
    """The background: one process that produces plainly, one that does so in transactions."""

    def __init__(self, kafka, topic):
        self.processes = []
        for name, transactional in (("plain", None), ("transactions", f"load-{topic}")):
            want = {
                "bootstrap": kafka.bootstrap,
                "topic": topic,
                "partitions": PARTITIONS,
                "rate": RATE // 2,
                "name": name,
                "transactional": transactional,
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "support.load", json.dumps(want)],
                cwd=REPOSITORY / "tests",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)
        for process in self.processes:
            assert process.stdout.readline().strip() == "ready"
        self.began = time.monotonic()

    def stop(self):
        """Ends both; returns what they say, and the seconds that they ran."""
        seconds = time.monotonic() - self.began
        counts = [json.loads(process.communicate(timeout=90)[0]) for process in self.processes]
        return counts, seconds

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait(10)


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@pytest.mark.timeout(400)
def test_a_read_that_waits_for_its_own_write_sees_it_under_load(store, kafka, serve, soak):
    trials = 10_000 if soak else 1_000
    seed = time.time_ns() % 2**32
    print(f"seed {seed}")
    topic = kafka.topic("items", partitions=PARTITIONS)
    store.apply(TABLE.format(topic=topic))
    server = serve(brokers=kafka.bootstrap)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = zip(*(spawn.Pipe() for _ in range(WORKERS)))
    process = spawn.Process(target=reader, args=(server.flight, theirs), daemon=True)
    process.start()
    load = Load(kafka, topic)
    try:
        # An iterator shared by threads: each takes the next trial that nobody made yet.
        turns = iter(range(trials))
        workers = [Worker(kafka, topic, number, ours[number], turns, seed) for number in range(WORKERS)]
        began = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(3000)
            assert not worker.is_alive(), "a trial hangs"
        seconds = time.monotonic() - began
        counts, loaded = load.stop()
    finally:
        load.kill()
        process.join(30)
        process.kill()
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure
    wrong = [failure for worker in workers for failure in worker.wrong]
    assert not wrong, f"{len(wrong)} of {trials} trials, seed {seed}: {wrong[:5]}"
    waits = {kind: [w for worker in workers for w in worker.waits[kind]] for kind in ("plain", "committed", "aborted")}
    stale = sum(worker.stale for worker in workers)
    sent = sum(count["sent"] for count in counts)
    aborted = counts[1]["aborted"]
    print(f"load: {sent / loaded:.0f} records/s over {loaded:.0f} s, {aborted} of them aborted, {counts}")
    print(f"trials: {sum(map(len, waits.values()))} in {seconds:.1f} s; without the barrier {stale} were stale")
    for kind, found in waits.items():
        ms = [1000 * w for w in found]
        print(
            f"wait, {kind}: {len(ms)} trials, median {percentile(ms, 0.5):.2f} ms, p99 {percentile(ms, 0.99):.2f} ms,"
            f" longest {max(ms):.1f} ms"
        )
    assert sum(map(len, waits.values())) == trials
    assert all(len(found) > trials / 10 for found in waits.values())
    assert stale > 0, "without the barrier no read was stale: these trials show nothing"
    assert aborted > 0 and counts[1]["committed"] > 0

    # The topic now ends on abort markers, and nothing follows that could lift the positions over them.
    last_offsets = {p: end - 1 for p, end in ends(kafka.bootstrap, topic, range(PARTITIONS)).items()}
    with pinion.connect(server.flight) as client:
        began = time.monotonic()
        last = client.scan("items", wait={topic: last_offsets}, wait_timeout=WAIT_SECONDS)
        print(f"the end of the topic, on abort markers: {1000 * (time.monotonic() - began):.1f} ms")
    newest = {row["id"]: row["n"] for row in last.to_pylist()}
    for worker in workers:
        for partition, value in enumerate(worker.committed):
            assert newest.get(worker.key(partition)) == value


def test_a_barrier_on_an_abort_marker_is_met_on_a_quiet_topic(store, kafka, serve):
    topic = kafka.topic("quiet", partitions=1)
    store.apply(TABLE.format(topic=topic))
    server = serve(brokers=kafka.bootstrap)
    producer = kafka.producer(**{"linger.ms": 0, "transactional.id": f"quiet-{topic}"})
    producer.init_transactions(30)
    waits = []
    with pinion.connect(server.flight) as client:
        for number in range(8):
            producer.begin_transaction()
            seen = pinion.Offsets()
            producer.produce(topic, json.dumps({"id": "a", "n": number}).encode(), on_delivery=seen.delivered)
            producer.flush(30)
            with pytest.raises(pinion.DeadlineExceeded):
                client.scan("items", wait=seen, wait_timeout=0.02)  # it is still open
            producer.abort_transaction(30)
            end = ends(kafka.bootstrap, topic, [0])[0] - 1
            assert end == 2 * number + 1
            began = time.monotonic()
            rows = client.scan("items", wait={topic: {0: end}}, wait_timeout=10)
            waits.append(time.monotonic() - began)
            assert rows.num_rows == 0
    print(f"abort markers on a quiet topic: median {1000 * percentile(waits, 0.5):.1f} ms, longest {max(waits):.3f} s")


def test_a_barrier_is_met_across_a_restart_and_fails_at_once_when_the_source_has_stopped(store, kafka, serve):
    topic = kafka.topic("stopped", partitions=2)
    store.apply(TABLE.format(topic=topic))
    producer = kafka.producer()
    seen = pinion.Offsets()
    for number in range(100):
        value = json.dumps({"id": f"{number}", "n": number}).encode()
        producer.produce(topic, value, partition=number % 2, on_delivery=seen.delivered)
    assert producer.flush(30) == 0
    server = serve(brokers=kafka.bootstrap)
    with pinion.connect(server.flight) as client:
        assert client.scan("items", wait=seen, wait_timeout=30).num_rows == 100
    server.kill()
    server.start()
    with pinion.connect(server.flight) as client:
        # What is stored counts at once, before any broker was asked.
        assert client.scan("items", wait=seen, wait_timeout=0).num_rows == 100
    server.stop()
    kafka.delete(topic)
    until(lambda: made_again(kafka, topic), what="the topic being made again")
    server.start()
    with pinion.connect(server.flight) as client:
        def refused():
            with pytest.raises((pinion.FailedPrecondition, pinion.DeadlineExceeded)) as error:
                client.scan("items", wait={topic: {0: 10_000}}, wait_timeout=0.1)
            return error.value if error.value.error == "SOURCE_STOPPED" else None

        stopped = until(refused, what="the source having stopped")
        assert "re-created" in str(stopped)
        began = time.monotonic()
        with pytest.raises(pinion.FailedPrecondition):
            client.scan("items", wait={topic: {0: 10_000}}, wait_timeout=30)
        assert time.monotonic() - began < 5
        # An offset does not say of which topic it is: the positions in the former one meet none.
        with pytest.raises(pinion.FailedPrecondition):
            client.scan("items", wait=seen, wait_timeout=0)


def test_a_barrier_waits_for_a_source_that_is_about_to_start(store, kafka, serve):
    topic = kafka.topic("about", partitions=2)
    producer = kafka.producer()
    seen = pinion.Offsets()
    producer.produce(topic, b'{"id":"a","n":1}', partition=0, on_delivery=seen.delivered)
    assert producer.flush(30) == 0
    server = serve(brokers=kafka.bootstrap)
    with pinion.connect(server.flight) as client:
        definition = store.folder / "items.toml"
        definition.write_text(TABLE.format(topic=topic))
        command("apply", "--server", server.flight, definition)
        # Most likely before the catalog is looked at again for new sources.
        assert client.scan("items", wait=seen, wait_timeout=30).num_rows == 1


def made_again(kafka, topic):
    try:
        kafka.create(topic, 2)
        return True
    except KafkaException:  # the deletion is still under way
        return False
