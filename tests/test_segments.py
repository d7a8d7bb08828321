"""Segments are ordinary Arrow files that map without a copy.

The fear: a layout that only our own reader understands, or one that a reader quietly copies because a buffer
is not where it should be.
"""

import random
import re
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pytest

from oracle import same_rows
from support import flight as calls

MIXED = """
[table]
name = "mixed"
entity = [{ name = "id", type = "int64" }, { name = "kind", type = "string" }]
event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
history = "latest"

[features]
flag = "bool"
small = "int8"
count = "int64"
ratio = "float64"
score = "float32"
half = "halffloat"
name = "string"
long_name = "large_string"
blob = "binary"
day = "date32"
price = "decimal128(12, 2)"
tags = "list<item: string>"
embedding = "list<item: float>[16]"
place = "struct<lat: double, lon: double>"
"""


def rows(generator_seed, ids, at):
    """One row per id with every type, nulls included."""
    generator = random.Random(generator_seed)

    def maybe(value):
        return None if generator.random() < 0.1 else value

    return [
        {
            "id": n,
            "kind": f"k{n % 3}",
            "at": at + n,
            "flag": maybe(generator.random() < 0.5),
            "small": maybe(generator.randrange(-128, 128)),
            "count": maybe(generator.randrange(-(2**63), 2**63)),
            "ratio": maybe(generator.random()),
            "score": maybe(generator.randrange(1000) / 8),
            "half": maybe(generator.randrange(100) / 4),
            "name": maybe("".join(generator.choices("abcäß", k=generator.randrange(20)))),
            "long_name": maybe(str(generator.random()) * 3),
            "blob": maybe(generator.randbytes(generator.randrange(30))),
            "day": maybe(date(2020, 1, 1 + generator.randrange(28))),
            "price": maybe(Decimal(generator.randrange(10**9)) / 100),
            "tags": maybe([maybe(str(k)) for k in range(generator.randrange(4))]),
            "embedding": maybe([generator.randrange(100) / 4 for _ in range(16)]),
            "place": maybe({"lat": maybe(generator.random()), "lon": generator.random()}),
        }
        for n in ids
    ]


@pytest.fixture
def mixed(store, serve):
    """A table whose segment holds 30 000 rows, and the client."""
    store.apply(MIXED)
    server = serve(env={"PINION__STORE__MAX_SEGMENTS": 12})
    client = calls.connect(server)
    schema = client.get_schema(calls.flight.FlightDescriptor.for_path("mixed")).schema
    for start in range(0, 30_000, 10_000):
        batch = pa.Table.from_pylist(rows(start, range(start, start + 10_000), 10**15), schema=schema)
        calls.put(client, "mixed", batch)
    calls.action(client, "merge", table="mixed")
    return store, client, schema


def mappings(path):
    """The address ranges at which this process has the file mapped."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.rstrip().endswith(str(path)):
                low, high = re.match(r"([0-9a-f]+)-([0-9a-f]+)", line).groups()
                found.append((int(low, 16), int(high, 16)))
    return found


def buffers(array):
    """Every buffer of an array, children included (pyarrow lists them all)."""
    return [buffer for buffer in array.buffers() if buffer is not None and buffer.size > 0]


def test_every_buffer_of_every_segment_is_aligned_and_mapped(mixed):
    store, _, _ = mixed
    files = store.segments()
    assert files
    big = small = 0
    for path in files:
        before = pa.total_allocated_bytes()
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            ranges = mappings(path)
            assert ranges, "pyarrow did not map the file"
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                for name, column in zip(batch.schema.names, batch.columns):
                    for buffer in buffers(column):
                        where = f"{path.name} batch {number} column {name} ({buffer.size} bytes)"
                        assert any(low <= buffer.address < high for low, high in ranges), f"{where} was copied"
                        if buffer.size >= 4096:
                            assert buffer.address % 4096 == 0, where
                            big += 1
                        else:
                            assert buffer.address % 64 == 0, where
                            small += 1
            assert pa.total_allocated_bytes() == before, "reading allocated: something was copied"
    assert big > 50 and small > 0


def test_a_freshly_merged_segment_equals_the_scan(mixed):
    store, client, _ = mixed
    (path,) = store.segments()
    with pa.memory_map(str(path)) as source:
        segment = pa.ipc.open_file(source).read_all()
    assert segment.cast(calls.scan(client, "mixed").schema).equals(calls.scan(client, "mixed"))
    assert segment.num_rows == 30_000


def test_a_segment_with_superseded_rows_equals_the_scan_plus_those_rows(mixed):
    store, client, schema = mixed
    old = {row["id"]: row for row in calls.scan(client, "mixed").to_pylist()}
    before = set(store.segments())
    changed = range(100, 3_000, 7)
    newer = pa.Table.from_pylist(rows(99, changed, 10**15 + 10**9), schema=schema)
    calls.put(client, "mixed", newer)
    calls.action(client, "flush", table="mixed")
    scanned = calls.scan(client, "mixed").to_pylist()
    assert len(scanned) == 30_000
    assert before <= set(store.segments()), "a published segment was replaced though no merge ran"
    stored = []
    for path in store.segments():
        with pa.memory_map(str(path)) as source:
            stored.extend(pa.ipc.open_file(source).read_all().cast(schema).to_pylist())
    same_rows(stored, scanned + [old[n] for n in changed])


def test_published_files_are_read_only(mixed):
    store, _, _ = mixed
    for path in store.segments():
        assert path.stat().st_mode & 0o777 == 0o444, path


def test_a_limit_sends_few_bytes(mixed):
    """A sliced batch must not drag its whole buffers along."""
    _, client, _ = mixed
    found = calls.scan(client, "mixed", limit=10)
    assert found.num_rows == 10
    assert found.get_total_buffer_size() < 64 * 1024
