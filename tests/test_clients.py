"""Stock Flight clients of other languages, Go's arrow-go and Java's flight-core, read what pyarrow reads.

`clients/build` makes the programs; a language whose toolchain is missing is skipped with the reason.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from oracle import NOT_FOUND, NULL_VALUE, PRESENT
from support import flight as calls

BUILD = Path(__file__).resolve().parent / "clients" / "build"
TIME = pa.timestamp("us", tz="UTC")
READINGS = """
[table]
name = "readings"
entity = [{ name = "site", type = "string" }, { name = "sensor", type = "int64" }]
event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
history = "latest"

[features]
flag = "bool"
i8 = "int8"
i16 = "int16"
i32 = "int32"
i64 = "int64"
u8 = "uint8"
u16 = "uint16"
u32 = "uint32"
u64 = "uint64"
f32 = "float32"
f64 = "float64"
text = "string"
day = "timestamp[s]"
moment = "timestamp[ns, tz=UTC]"
vector = "list<item: float>[4]"
"""
SCHEMA = pa.schema(
    [pa.field("site", pa.string(), nullable=False), pa.field("sensor", pa.int64(), nullable=False)]
    + [pa.field("at", TIME, nullable=False), ("flag", pa.bool_())]
    + [(f"i{bits}", getattr(pa, f"int{bits}")()) for bits in (8, 16, 32, 64)]
    + [(f"u{bits}", getattr(pa, f"uint{bits}")()) for bits in (8, 16, 32, 64)]
    + [("f32", pa.float32()), ("f64", pa.float64()), ("text", pa.string())]
    + [("day", pa.timestamp("s")), ("moment", pa.timestamp("ns", tz="UTC")), ("vector", pa.list_(pa.float32(), 4))]
)
FEATURES = [f"readings:{name}" for name in SCHEMA.names[3:]]
# Over 4 MiB in all: the other gRPC libraries refuse larger messages, so there have to be several.
ROWS = 40_000
EMPTY = '[table]\nname = "empty"\nentity = [{ name = "id", type = "int64" }]\n\n[features]\nvalue = "float64"\n'


def readings(sensors, seed):
    """A row per sensor at each of two sites, every feature null in one row of seven."""
    generator = np.random.default_rng(seed)
    count = 2 * len(sensors)

    def column(kind, values):
        return pa.array(values, kind, mask=generator.integers(0, 7, count) == 0)

    def integers(kind):
        info = np.iinfo(kind)
        return generator.integers(info.min, info.max, count, dtype=kind, endpoint=True)

    columns = [
        pa.array(np.repeat(["north", "söuth"], len(sensors))),
        pa.array(np.tile(sensors, 2)),
        pa.array(1_700_000_000_000_000 + seed * 10**9 + np.arange(count), TIME),
        column(pa.bool_(), generator.integers(0, 2, count) == 1),
    ]
    columns += [column(SCHEMA.field(f"i{bits}").type, integers(f"int{bits}")) for bits in (8, 16, 32, 64)]
    columns += [column(SCHEMA.field(f"u{bits}").type, integers(f"uint{bits}")) for bits in (8, 16, 32, 64)]
    vectors = pa.array(generator.random(4 * count, dtype=np.float32))
    columns += [
        column(pa.float32(), generator.standard_normal(count).astype(np.float32)),
        column(pa.float64(), generator.standard_normal(count) * 1e30),
        column(pa.string(), [f"<{n}> é\n" * (n % 3) for n in range(count)]),
        column(pa.timestamp("s"), generator.integers(-(10**9), 10**9, count)),
        column(SCHEMA.field("moment").type, generator.integers(-(2**62), 2**62, count)),
        pa.FixedSizeListArray.from_arrays(vectors, 4, mask=pa.array(generator.integers(0, 7, count) == 0)),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


@pytest.fixture(scope="module", params=["go", "java"])
def program(request):
    """The client of one language."""
    built = subprocess.run([str(BUILD), request.param], capture_output=True, text=True, timeout=280)
    if built.returncode == 3:
        pytest.skip(built.stderr.strip().splitlines()[-1])
    assert built.returncode == 0, built.stderr
    return built.stdout.strip()


@pytest.fixture
def served(store, serve, connect, transport, tmp_path):
    """A table of one segment, some of whose rows were replaced since, and one without rows: (url, pyarrow's client)."""
    store.apply(READINGS, EMPTY)
    file = tmp_path / "readings.arrow"
    with pa.ipc.new_file(str(file), SCHEMA) as writer:
        writer.write_table(readings(np.arange(ROWS // 2), seed=1))
    store.run("load", "readings", file)
    server = serve()
    client = connect(server)
    calls.put(client, "readings", readings(np.arange(0, ROWS // 2, 40), seed=2))
    return server.flight if transport == "tcp" else f"grpc+unix://{server.uds}", client


def run(program, *arguments, check=True):
    """The client's schema line, rows and last line; or, without `check`, the finished process."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{program} {arguments[1]} did not end within 60 s", pytrace=False)  # the keys make a long line
    if not check:
        return done
    assert done.returncode == 0, done.stderr
    schema, *rows, last = [json.loads(line) for line in done.stdout.splitlines()]
    return schema, rows, last


def spelled(kind):
    """A type as the clients print it."""
    if pa.types.is_timestamp(kind):
        return f"timestamp[{kind.unit}, {kind.tz or ''}]"
    if pa.types.is_fixed_size_list(kind):
        return f"{spelled(kind.value_type)}[{kind.list_size}]"
    return {"float": "float32", "double": "float64", "string": "utf8"}.get(str(kind), str(kind))


def printed(table):
    """A table as the clients print it: its schema, and its rows with timestamps as integers."""
    schema = [[field.name, spelled(field.type)] for field in table.schema]
    columns = [
        (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()
        for column in table.columns
    ]
    return schema, [list(row) for row in zip(*columns, strict=True)]


def same(found, expected):
    """The first difference is shown, not forty thousand rows."""
    (schema, rows), (wanted_schema, wanted) = found, expected
    assert schema == wanted_schema
    assert len(rows) == len(wanted)
    for number, (row, wanted_row) in enumerate(zip(rows, wanted, strict=True)):
        assert row == wanted_row, f"row {number}"


def test_a_whole_table_by_flight_info_and_get(program, served):
    url, client = served
    schema, rows, last = run(program, url, "scan", "readings")
    table = calls.whole(client, "readings")
    assert table.num_rows == ROWS and table.nbytes > 4 << 20
    same((schema, rows), printed(table))
    assert last["rows"] == ROWS and last["batches"] > 1
    assert last["metadata"]["table"] == "readings", "the reply's app_metadata reached the client"


def test_a_scan_command_and_a_table_without_rows(program, served):
    url, client = served
    request = {"table": "readings", "features": ["f32", "site", "vector"], "filter": "i32 > 0", "limit": 777}
    schema, rows, _ = run(program, url, "scan", json.dumps({"scan": request}))
    same((schema, rows), printed(calls.scan(client, **request)))
    assert len(rows) == 777
    schema, rows, last = run(program, url, "scan", "empty")
    assert (schema, rows, last["rows"]) == ([["id", "int64"], ["value", "float64"]], [], 0)


def test_keys_are_looked_up_by_exchange_in_several_batches(program, served):
    url, client = served
    generator = np.random.default_rng(3)
    # Repeated, unknown, replaced and other keys; 1,000 of them a batch.
    sensors = generator.integers(0, ROWS // 2 + 2_000, 2_500).tolist()
    sites = [["north", "söuth"][n] for n in generator.integers(0, 2, 2_500)]
    request = {"features": FEATURES, "status": True, "event_time": True}
    schema, rows, last = run(
        program,
        url,
        "lookup",
        json.dumps({"lookup": request}),
        f"sensor:int64={json.dumps(sensors)}",
        f"site:utf8={json.dumps(sites)}",
    )
    keys = pa.RecordBatch.from_pydict({"sensor": sensors, "site": sites})
    replies = calls.lookups(client, **request, batches=[keys[n : n + 1_000] for n in range(0, 2_500, 1_000)])
    same((schema, rows), printed(pa.concat_tables(replies)))
    assert last["batches"] == 3
    names = [name for name, _ in schema]
    states = {row[names.index("f64__status")] for row in rows}
    assert states == {PRESENT, NULL_VALUE, NOT_FOUND}


def test_an_error_names_the_thing_in_every_language(program, served):
    url, client = served
    with pytest.raises(pa.ArrowKeyError) as refused:
        client.get_flight_info(flight.FlightDescriptor.for_path("reading"))
    done = run(program, url, "scan", "reading", check=False)
    assert done.returncode == 1
    message = 'no table named "reading"; did you mean "readings"?'
    assert message in str(refused.value) and message in done.stderr
    assert "NotFound" in done.stderr or "NOT_FOUND" in done.stderr
