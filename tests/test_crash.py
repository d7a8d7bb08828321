"""`kill -9` during ingest, puts and merges: every acknowledged row once, no offset lost or doubled.

One server takes a Kafka stream into `events` and puts with ids into `writes`, with logs so small that segments
are written and merged all the time. It is killed again and again: at random moments from outside, and from
inside at named points (PINION_FAIL; the engine writes the name of the point into a file as it dies). After each
kill the server starts again on what is left and is asked:

- `events`: for each partition, exactly the offsets below the stored position, each once;
- `writes`: every acknowledged put whole and once; the one that was in flight whole or absent, and whole and
  once after it was sent again under its id;
- `pinion check`: clean; and the start took less than a second.

The fast form makes some 20 kills, `--soak` at least 200 (30 in a merge, 30 between append and acknowledgement,
10 in recovery). The seed is printed; PINION_TEST_SEED repeats a run's choices.
"""

import json
import os
import random
import threading
import time

import pyarrow as pa
import pytest
from support import flight as calls
from support.broker import Log

pytestmark = pytest.mark.kafka

ROWS_BETWEEN_KILLS = 5_000
ROWS_PER_PUT = 20
EVENTS = """
[table]
name = "events"
entity = [{{ name = "user", type = "int64" }}]
event_time = {{ name = "ts", type = "timestamp[ms, tz=UTC]" }}
history = "all"

[features]
text = "string"

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
"""
WRITES = """
[table]
name = "writes"
entity = [{ name = "put", type = "int64" }, { name = "part", type = "int32" }]
history = "all"

[features]
attempt = "int32"
text = "string"
"""
WRITES_SCHEMA = pa.schema(
    [
        pa.field("put", pa.int64(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        ("attempt", pa.int32()),
        ("text", pa.string()),
    ]
)
# Small logs: a segment every few thousand rows, a merge after a few of those.
SETTINGS = {"PINION__STORE__DELTA_MAX_ROWS": 1_500, "PINION__STORE__MAX_SEGMENTS": 4}


class Stream(threading.Thread):
    """Produces events at a steady rate until told to stop."""

    def __init__(self, broker, topic, rows_per_second):
        super().__init__(daemon=True)
        self.log = Log(broker.producer(), topic)
        self.rows_per_second = rows_per_second
        self.stopping = threading.Event()

    def run(self):
        number = 0
        while not self.stopping.wait(0.01):
            for _ in range(self.rows_per_second // 100):
                event = {"user": number * 7919 % 5_000, "ts": 1_700_000_000_000 + number % 50_000, "text": f"event {number}"}
                self.log.send(json.dumps(event).encode(), partition=number % 3)
                number += 1

    def stop(self):
        self.stopping.set()
        self.join()
        self.log.flush()


class Writer(threading.Thread):
    """Puts batches with ids until the server dies; `acknowledged` only grows after the last PutResult."""

    def __init__(self, server, first, unsure):
        super().__init__(daemon=True)
        self.server = server
        self.number = first
        self.unsure = unsure  # (put, attempt) that was in flight when the server died before
        self.acknowledged = []
        self.stopping = threading.Event()

    def send(self, client, number, attempt):
        rows = [{"put": number, "part": part, "attempt": attempt, "text": f"row {part}"} for part in range(ROWS_PER_PUT)]
        last = calls.put(client, "writes", pa.Table.from_pylist(rows, WRITES_SCHEMA), id=f"put-{number}")[-1]
        assert last["durable"] is True, last
        self.acknowledged.append(number)
        return last

    def run(self):
        try:
            client = calls.connect(self.server)
            if self.unsure is not None:
                number, attempt = self.unsure
                self.unsure = (number, attempt + 1)
                self.send(client, number, attempt + 1)
                self.unsure = None
            while not self.stopping.is_set():
                self.unsure = (self.number, 0)
                self.number += 1
                self.send(client, self.number - 1, 0)
                self.unsure = None
        except (pa.ArrowException, IndexError, OSError):
            pass  # the server died: `unsure` says what was in flight


def verify_events(client, topic):
    """Every offset below the position once. Returns the number of rows."""
    rows, positions = calls.scan_with_positions(client, "events", features=["source_partition", "source_offset"])
    reached = positions.get(topic, {})
    found = rows.group_by("source_partition").aggregate(
        [("source_offset", "count"), ("source_offset", "count_distinct"), ("source_offset", "min"), ("source_offset", "max")]
    )
    by_partition = {row["source_partition"]: row for row in found.to_pylist()}
    for partition, end in reached.items():
        row = by_partition.pop(partition, None)
        if end == 0:
            assert row is None, (partition, row)
            continue
        assert row is not None, f"partition {partition}: no rows although the position is {end}"
        assert (row["source_offset_min"], row["source_offset_max"]) == (0, end - 1), (partition, end, row)
        assert row["source_offset_count"] == row["source_offset_count_distinct"] == end, (partition, end, row)
    assert not by_partition, f"rows of partitions without a position: {by_partition}"
    return rows.num_rows


def verify_writes(client, acknowledged, unsure):
    """Every acknowledged put whole and once; the unsure one whole or absent; no other."""
    rows = calls.scan(client, "writes", features=["put", "part"])
    found = rows.group_by("put").aggregate([("part", "count"), ("part", "count_distinct")]).to_pylist()
    counts = {row["put"]: (row["part_count"], row["part_count_distinct"]) for row in found}
    whole = (ROWS_PER_PUT, ROWS_PER_PUT)
    wrong = {put: count for put, count in counts.items() if count != whole}
    assert not wrong, f"puts not whole or doubled: {wrong}"
    lost = acknowledged - counts.keys()
    assert not lost, f"acknowledged puts lost: {sorted(lost)[:10]}"
    alien = counts.keys() - acknowledged - ({unsure[0]} if unsure else set())
    assert not alien, f"puts that nobody acknowledged or had in flight: {sorted(alien)[:10]}"
    return rows.num_rows


class Campaign:
    """A run of kills on one store."""

    def __init__(self, store, server, topic, seed):
        self.store, self.server, self.topic = store, server, topic
        self.random = random.Random(seed)
        self.counts = store.folder / "fail-points"
        self.acknowledged, self.unsure, self.next_put = set(), None, 0
        self.killed = {}
        self.skipped = 0
        self.start_seconds = []
        self.rows = 0

    def fail_points(self):
        """How often each point has killed so far."""
        text = self.counts.read_text() if self.counts.exists() else ""
        return {name: text.splitlines().count(name) for name in set(text.splitlines())}

    def environment(self, point=None):
        env = dict(SETTINGS, PINION_FAIL_COUNT_FILE=self.counts)
        if point is not None:
            env["PINION_FAIL"] = f"{point[0]}={point[1]}"
        return env

    def rows_now(self):
        """Rows of both tables, or None when the server is gone."""
        try:
            client = calls.connect(self.server)
            stats = [calls.action(client, "stats", table=name)[0] for name in ("events", "writes")]
            return sum(rows_of(each) for each in stats)
        except (pa.ArrowException, IndexError):
            return None

    def round(self, kind, passes=None):
        """Starts, verifies, works, and kills. A kill counts when enough rows came in since the last one."""
        inside = kind not in ("random", "recovery.logs", "recovery.manifest")
        point = (kind, passes) if inside else None
        self.server.start(env=self.environment(point))
        self.start_seconds.append(self.server.start_seconds)
        client = calls.connect(self.server)
        writer = None
        died_early = False
        try:
            before = verify_events(client, self.topic) + verify_writes(client, self.acknowledged, self.unsure)
        except (pa.ArrowException, IndexError):
            if self.server.alive():
                raise
            died_early = True  # its fail point came before the questions: the next start asks them
            before = self.rows
        self.rows = before
        if not died_early:
            writer = Writer(self.server, self.next_put, self.unsure)
            writer.start()
            self.work(writer, inside, before)
            writer.stopping.set()
            self.server.kill()
            writer.join(60)
            assert not writer.is_alive(), "a put hangs although the server is dead"
            self.acknowledged.update(writer.acknowledged)
            self.unsure, self.next_put = writer.unsure, writer.number
        self.server.wait_dead(10)
        if kind.startswith("recovery."):
            # Enough rows are in the logs; now die again while recovering from the first death.
            self.server.start(env=self.environment((kind, 1)), wait=False)
            assert self.server.wait_dead(30), f"{kind} was not reached\n{self.server.log_text()}"
        if died_early:
            self.skipped += 1
        else:
            self.killed[kind] = self.killed.get(kind, 0) + 1

    def work(self, writer, inside, before):
        """Waits until enough rows came in, then a random moment more or until the fail point kills."""
        deadline = time.monotonic() + 60
        while True:
            if self.server.wait_dead(0.02):
                return
            now = self.rows_now()
            if now is not None and now - before >= ROWS_BETWEEN_KILLS:
                break
            assert time.monotonic() < deadline, f"no {ROWS_BETWEEN_KILLS} rows within 60 s: {now} after {before}"
        if inside:
            self.server.wait_dead(20)
        else:
            time.sleep(self.random.random() * 0.5)


def rows_of(stats):
    return stats["tables"][0]["rows"]


@pytest.mark.timeout(7200)
def test_kill_9_at_any_moment_loses_and_doubles_nothing(store, kafka, serve, soak):
    seed = int(os.environ.get("PINION_TEST_SEED", time.time_ns() % 2**32))
    print(f"PINION_TEST_SEED={seed}")
    topic = kafka.topic("crash", partitions=3)
    store.apply(EVENTS.format(topic=topic), WRITES)
    server = serve(brokers=kafka.bootstrap, start=False)
    campaign = Campaign(store, server, topic, seed)
    generator = campaign.random

    plan = {"random": 5, "commit.appended": 5, "merge.writing": 4, "merge.published": 2, "manifest.renamed": 2}
    plan |= {"recovery.logs": 1, "recovery.manifest": 1}
    if soak:
        plan = {"random": 70, "commit.appended": 45, "merge.writing": 35, "merge.published": 20, "manifest.renamed": 20}
        plan |= {"recovery.logs": 8, "recovery.manifest": 8}
    rounds = [kind for kind, count in plan.items() for _ in range(count)]
    generator.shuffle(rounds)

    stream = Stream(kafka, topic, rows_per_second=8_000)
    stream.start()
    try:
        for number, kind in enumerate(rounds):
            # Passes: late enough for the rows that must lie between two kills.
            passes = {
                "commit.appended": generator.randrange(250, 600),
                "merge.writing": generator.randrange(5, 14),
                "merge.published": generator.randrange(4, 9),
                "manifest.renamed": generator.randrange(4, 9),
            }.get(kind)
            campaign.round(kind, passes)
            if not soak or number % 10 == 0:
                store.run("check")
    finally:
        stream.stop()

    # Once more, to the end of the topic, with nothing in flight.
    server.start(env=SETTINGS)
    client = calls.connect(server)
    writer = Writer(server, campaign.next_put, campaign.unsure)
    writer.start()
    time.sleep(0.5)
    writer.stopping.set()
    writer.join(60)
    campaign.acknowledged.update(writer.acknowledged)
    deadline = time.monotonic() + 120
    while verify_events(client, topic) < sum(stream.log.ends().values()):
        assert time.monotonic() < deadline, "the rest of the topic was not read within 120 s"
        time.sleep(0.2)
    rows = verify_events(client, topic) + verify_writes(client, campaign.acknowledged, writer.unsure)
    server.stop()
    store.run("check")

    inside = campaign.fail_points()
    slowest = max(campaign.start_seconds)
    print(f"kills: {sum(campaign.killed.values())} with the server at work, by plan {campaign.killed}")
    print(f"kills by fail point: {inside}; {campaign.skipped} before the questions could be asked")
    print(f"rows at the end: {rows}; puts acknowledged: {len(campaign.acknowledged)}")
    print(f"starts: median {sorted(campaign.start_seconds)[len(campaign.start_seconds) // 2]:.3f} s, slowest {slowest:.3f} s")
    assert slowest < 1.0, f"a start took {slowest:.2f} s"
    assert inside.get("commit.appended", 0) >= plan["commit.appended"] * 2 // 3, inside
    assert inside.get("merge.writing", 0) + inside.get("merge.published", 0) >= 3, inside
    if soak:
        assert sum(campaign.killed.values()) >= 200
        assert inside["commit.appended"] >= 30
        assert inside["merge.writing"] + inside["merge.published"] >= 30
        assert inside["recovery.logs"] + inside["recovery.manifest"] >= 10
