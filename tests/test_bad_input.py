"""Bad input is refused at the edge: a clear error, the server lives, nothing is lost.

Every test ends with the same question: does the store still answer what it held before?
"""

import json
import random
import shutil
import subprocess
import time

import grpc
import pyarrow as pa
import pytest
from pyarrow import flight, parquet

from support import flight as calls
from support import raw
from support.broker import Log
from support.ingest import wait_caught_up
from support.process import binary, environment

READINGS = """
[table]
name = "readings"
entity = [{ name = "sensor", type = "string" }]
event_time = { name = "at", type = "timestamp[s, tz=UTC]" }

[features]
celsius = "float64"
count = "int32"
"""

ROWS = [{"sensor": f"s{n}", "at": 1_600_000_000 + n, "celsius": n / 4, "count": n} for n in range(100)]
SCHEMA = pa.schema(
    [
        pa.field("sensor", pa.string(), nullable=False),
        pa.field("at", pa.timestamp("s", tz="UTC"), nullable=False),
        ("celsius", pa.float64()),
        ("count", pa.int32()),
    ]
)
TABLE = pa.Table.from_pylist(ROWS, schema=SCHEMA)


@pytest.fixture
def readings(store):
    """A store with one table of 100 rows; afterwards the same rows must be there and `check` be clean."""
    store.apply(READINGS)
    file = store.folder / "rows.parquet"
    parquet.write_table(TABLE, file)
    store.run("load", "readings", file)
    yield store
    rows = json.loads(store.run("scan", "readings", "--output", "json").stdout)
    assert sorted(row["count"] for row in rows) == list(range(100))
    store.run("check")


@pytest.fixture
def served(readings, serve):
    """A server on it and a client; afterwards the server must still answer."""
    server = serve()
    client = calls.connect(server)
    yield server, client
    assert server.alive(), server.log_text()
    again = calls.lookup(calls.connect(server), ["readings:count"], {"sensor": ["s7", "s99"]})
    assert again["count"].to_pylist() == [7, 99]
    server.stop()


def refused(store, *arguments, code=1):
    """Runs a command that must fail without a panic; returns what it says."""
    done = store.run(*arguments, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: "), done.stderr
    assert "panicked" not in done.stderr
    return done.stderr


def test_malformed_toml_names_the_line(readings):
    file = readings.folder / "bad.toml"
    file.write_text('[table]\nname = "x"\nentity = [{ name = "k", type = "string" }\n\n[features]\na = "int32"\n')
    said = refused(readings, "apply", file)
    assert "bad.toml" in said and "line " in said, said


def test_an_unknown_key_in_a_definition_names_the_nearest(readings):
    file = readings.folder / "bad.toml"
    file.write_text('[table]\nname = "x"\nentitty = [{ name = "k", type = "string" }]\n\n[features]\na = "int32"\n')
    said = refused(readings, "apply", file)
    assert "line 3" in said and "entitty" in said and "entity" in said, said


def test_an_unknown_type_names_the_line_and_the_nearest(readings):
    file = readings.folder / "bad.toml"
    file.write_text('[table]\nname = "x"\nentity = [{ name = "k", type = "string" }]\n\n[features]\na = "flaot64"\n')
    said = refused(readings, "apply", file)
    assert "line 6" in said and "flaot64" in said and "float64" in said, said


def test_of_several_definitions_one_bad_one_applies_none(readings):
    good = readings.folder / "good.toml"
    good.write_text(READINGS.replace('"readings"', '"fine"'))
    bad = readings.folder / "bad.toml"
    bad.write_text("[table]\n")
    refused(readings, "apply", good, bad)
    assert "fine" not in readings.run("ls").stdout


def test_a_missing_key_column_is_named_with_those_found(readings):
    file = readings.folder / "nokey.csv"
    file.write_text("at,celsius,count\n2024-01-01T00:00:00Z,1.5,1\n")
    said = refused(readings, "load", "readings", file)
    assert "sensor" in said and "celsius" in said, said


def test_a_truncated_parquet_file_loads_nothing(readings):
    whole = readings.folder / "rows.parquet"
    cut = readings.folder / "cut.parquet"
    for part in (0.0, 0.3, 0.9, 0.999):
        cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
        said = refused(readings, "load", "readings", cut)
        assert "cut.parquet" in said, said


def test_a_parquet_file_with_damaged_pages_never_panics(readings):
    generator = random.Random(9)
    whole = (readings.folder / "rows.parquet").read_bytes()
    damaged = readings.folder / "damaged.parquet"
    for _ in range(20):
        data = bytearray(whole)
        for _ in range(5):
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        damaged.write_bytes(data)
        # --null nothing: only that it ends by itself, with or without an error, and into a table of its own.
        copy = readings.folder / "scratch"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(readings.data, copy)
        done = subprocess.run(
            [str(binary()), "load", "--data", str(copy), "readings", str(damaged)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode in (0, 1), (done.returncode, done.stderr)
        assert "panicked" not in done.stderr, done.stderr


def test_a_bad_csv_cell_names_file_row_column_and_value(readings):
    file = readings.folder / "bad.csv"
    file.write_text("sensor,at,celsius,count\na,2024-01-01T00:00:00Z,1.5,1\nb,2024-01-01T00:00:00Z,warm,2\n")
    said = refused(readings, "load", "readings", file)
    assert "bad.csv" in said and "celsius" in said and "warm" in said and "2" in said, said


def test_a_bad_csv_cell_may_be_skipped_and_is_reported(readings):
    copy = readings.folder / "copy"
    shutil.copytree(readings.data, copy)
    file = readings.folder / "bad.csv"
    file.write_text("sensor,at,celsius,count\na,2024-01-01T00:00:00Z,1.5,1\nb,2024-01-01T00:00:00Z,warm,2\n")
    done = subprocess.run(
        [str(binary()), "load", "--data", str(copy), "readings", str(file), "--on-error", "skip"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "warm" in done.stdout + done.stderr


@pytest.mark.kafka
def test_a_json_event_with_a_wrong_type_becomes_a_dead_letter(readings, kafka, serve):
    topic = kafka.topic("readings", partitions=1)
    readings.apply(
        READINGS.replace('"readings"', '"streamed"') + f'\n[source.kafka]\ntopic = "{topic}"\nformat = "json"\n'
    )
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    log = Log(kafka.producer(), topic)
    good = {"sensor": "a", "at": 1_600_000_000, "celsius": 1.5, "count": 1}
    for value in (good, {**good, "count": 1.5}, {**good, "sensor": 7}, {**good, "celsius": "7"}, {**good, "at": [1]}):
        log.send(json.dumps(value).encode())
    wait_caught_up(server, client, "streamed", log)
    assert calls.scan(client, "streamed").num_rows == 1
    letters = json.dumps(calls.action(client, "dead_letters", table="streamed"))
    for column in ("count", "sensor", "celsius", "at"):
        assert column in letters, letters
    server.stop()


def test_tickets_of_random_bytes_are_invalid_arguments(served):
    _, client = served
    generator = random.Random(30)
    for length in [0, 1, 2, 16, 64, 300, 5_000] * 10:
        with pytest.raises(pa.ArrowInvalid):
            calls.read(client.do_get(flight.Ticket(generator.randbytes(length))))


def test_a_forged_ticket_is_refused(served):
    _, client = served
    info = client.get_flight_info(flight.FlightDescriptor.for_path("readings"))
    honest = info.endpoints[0].ticket.ticket
    assert calls.read(client.do_get(flight.Ticket(honest)))[0].num_rows == 100
    for position in range(len(honest)):
        forged = bytearray(honest)
        forged[position] ^= 1
        with pytest.raises((pa.ArrowInvalid, flight.FlightUnauthorizedError)):
            calls.read(client.do_get(flight.Ticket(bytes(forged))))


def test_malformed_commands_name_what_is_wrong(served):
    _, client = served
    cases = [
        (b"{", ""),
        (b"[]", ""),
        (b"{}", ""),
        (b'{"scan": {"table": "readings", "fliter": "count > 1"}}', "fliter"),
        (b'{"scan": {"table": "readings", "filter": "count >"}}', ""),
        (b'{"scan": {"table": "readings", "filter": "drop table readings"}}', ""),
        (b'{"scan": {"table": "readings", "features": ["kelvin"]}}', "kelvin"),
        (b'{"scan": {"table": "readings", "limit": -1}}', ""),
        (b'{"lookup": {"features": ["readings:kelvin"], "keys": {"sensor": ["a"]}}}', "kelvin"),
        (b'{"lookup": {"features": ["readings:count"], "keys": {"senser": ["a"]}}}', "sens"),
        (b'{"lookup": {"features": ["readings:count"], "keys": {"sensor": ["a"]}, "as_of": "noon"}}', "noon"),
        (b'{"lookup": {"service": "x@v1", "keys": {"sensor": ["a"]}}}', "service"),
        (b'{"scan": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", ""),
    ]
    for command, part in cases:
        with pytest.raises((pa.ArrowInvalid, KeyError)) as failure:
            calls.read(client.do_get(flight.Ticket(command)))
        assert part in str(failure.value), (command, str(failure.value))
    with pytest.raises(KeyError, match="nowhere"):
        calls.scan(client, "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.drop_columns(["sensor"]),
        lambda t: t.drop_columns(["at"]),
        lambda t: t.append_column("kelvin", t["celsius"]),
        lambda t: t.set_column(0, "sensor", pa.array(range(100), pa.int64())),
        lambda t: t.set_column(3, "count", pa.array(["x"] * 100)),
        lambda t: t.set_column(0, "sensor", pa.array([None] * 100, pa.string())),
    ],
    ids=["no key", "no event time", "unknown column", "key of another type", "feature of another type", "null keys"],
)
def test_a_put_with_the_wrong_schema_applies_nothing(served, change):
    _, client = served
    with pytest.raises(pa.ArrowInvalid):
        calls.put(client, "readings", change(TABLE.cast(pa.schema([f.with_nullable(True) for f in SCHEMA]))))


def test_a_compressed_body_that_claims_a_tebibyte_is_refused(served):
    server, _ = served
    address = server.flight.removeprefix("grpc://")
    numbers = pa.array(range(10_000), pa.int64())
    for compression in ("lz4", "zstd"):
        for table, batch in (
            ("readings", TABLE.combine_chunks().to_batches()[0]),
            ("readings", pa.record_batch({"sensor": numbers})),
        ):
            header, body = raw.split(raw.serialize_compressed(batch, compression))
            bomb = bytearray(body)
            # Every 8-byte prefix of a compressed buffer stands at a multiple of 8: claim it everywhere.
            claims = 0
            for at in range(0, len(bomb) - 8, 8):
                value = int.from_bytes(bomb[at : at + 8], "little", signed=True)
                if 0 < value < 1_000_000:
                    bomb[at : at + 8] = (1 << 40).to_bytes(8, "little")
                    claims += 1
            assert claims
            descriptor = raw.path_descriptor(table)
            with pytest.raises(grpc.RpcError) as failure:
                raw.stream(
                    address,
                    "DoPut",
                    [
                        raw.flight_data(raw.schema_header(batch.schema), descriptor=descriptor),
                        raw.flight_data(header, bytes(bomb)),
                    ],
                )
            assert failure.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    rss = int(open(f"/proc/{server.process.pid}/status").read().split("VmHWM:")[1].split()[0]) * 1024
    assert rss < 1 << 30, f"peak resident size {rss} bytes"


def test_damaged_arrow_messages_are_refused_and_never_end_the_server(served):
    server, _ = served
    address = server.flight.removeprefix("grpc://")
    generator = random.Random(28)
    batch = TABLE.combine_chunks().to_batches()[0]
    schema = raw.schema_header(batch.schema)
    codes = {}
    for number in range(200):
        # A lookup's keys and a put to a dropped table would do as well: nothing here may be applied.
        header, body = map(
            bytearray, raw.split(raw.serialize_compressed(batch, "lz4") if number % 2 else batch.serialize())
        )
        for _ in range(generator.randrange(1, 6)):
            target = header if generator.random() < 0.7 else body
            target[generator.randrange(len(target))] ^= 1 << generator.randrange(8)
        keys = batch.select(["sensor"])
        if number % 3 == 0:
            schema_bytes, header, body = raw.schema_header(keys.schema), *map(bytearray, raw.split(keys.serialize()))
            for _ in range(3):
                header[generator.randrange(len(header))] ^= 1 << generator.randrange(8)
        else:
            schema_bytes = schema
        descriptor = raw.command_descriptor(b'{"lookup": {"features": ["readings:count"]}}')
        try:
            raw.stream(
                address,
                "DoExchange",
                [raw.flight_data(schema_bytes, descriptor=descriptor), raw.flight_data(bytes(header), bytes(body))],
            )
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
        codes[code] = codes.get(code, 0) + 1
        assert server.alive(), server.log_text()
    assert set(codes) <= {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}, codes


@pytest.mark.parametrize(
    "name",
    [
        "../escape",
        "/etc/passwd",
        "a/b",
        "..",
        "",
        "a\0b",
        "a" * 300,
        "Ω",
        "a b",
        "x\x1b[31m",
        "x\ny",
        "readings/../readings",
    ],
)
def test_path_traversal_names_are_refused_everywhere(served, readings, name):
    _, client = served
    before = sorted(p for p in readings.folder.rglob("*") if "log" not in p.name)
    with pytest.raises((pa.ArrowInvalid, KeyError)) as failure:
        client.get_flight_info(flight.FlightDescriptor.for_path(name))
    assert "\x1b" not in str(failure.value)
    with pytest.raises((pa.ArrowInvalid, KeyError)):
        calls.scan(client, name)
    with pytest.raises((pa.ArrowInvalid, KeyError)):
        calls.lookup(client, [f"{name}:count"], {"sensor": ["a"]})
    with pytest.raises((pa.ArrowInvalid, KeyError)):
        calls.put(client, name, TABLE)
    with pytest.raises((pa.ArrowInvalid, KeyError)):
        calls.action(client, "drop", table=name)
    text = READINGS.replace('"readings"', json.dumps(name))
    with pytest.raises(pa.ArrowInvalid):
        calls.action(client, "apply", definitions=[text])
    assert sorted(p for p in readings.folder.rglob("*") if "log" not in p.name) == before


def test_a_second_server_on_the_directory_is_refused_and_names_the_first(served, readings):
    server, _ = served
    said = refused(readings, "serve", "--flight", "127.0.0.1:0")
    assert str(server.process.pid) in said and "--server" in said, said


def test_a_writing_command_on_a_served_directory_is_refused(served, readings):
    said = refused(readings, "put", "readings", "sensor=x", "at=2024-01-01T00:00:00Z")
    assert "--server" in said, said


@pytest.mark.parametrize("kind", ["manifest", "catalog"])
def test_a_newer_format_version_is_refused_with_both_versions_named(readings, kind):
    copy = readings.folder / "copy"
    shutil.copytree(readings.data, copy)
    (*_, newest) = sorted(copy.rglob(f"*.{kind}"))
    content = newest.read_bytes()
    line, payload = content.split(b"\n", 1)
    words = line.split(b" ")
    assert words[:2] == [b"pinion", kind.encode()]
    newest.chmod(0o644)
    newest.write_bytes(b" ".join([*words[:2], b"999", *words[3:]]) + b"\n" + payload)
    done = subprocess.run(
        [str(binary()), "scan", "--data", str(copy), "readings"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "999" in done.stderr and words[2].decode() in done.stderr and "upgrade" in done.stderr, done.stderr


def test_an_oversized_put_names_the_limit(readings, serve):
    server = serve(env={"PINION__STORE__PUT_MAX_BYTES": 1 << 20})
    client = calls.connect(server)
    big = pa.Table.from_pylist([{**ROWS[0], "sensor": "x" * 100_000 + str(n)} for n in range(30)], schema=SCHEMA)
    with pytest.raises((flight.FlightError, pa.ArrowInvalid, pa.ArrowException)) as failure:
        calls.put(client, "readings", big)
    assert "put_max_bytes" in str(failure.value) and str(1 << 20) in str(failure.value), str(failure.value)
    assert calls.scan(client, "readings").num_rows == 100
    server.stop()


def test_a_cancelled_put_is_invisible(served):
    server, client = served
    new = pa.Table.from_pylist([{**ROWS[0], "sensor": f"new{n}"} for n in range(50)], schema=SCHEMA)
    header, body = raw.split(new.combine_chunks().to_batches()[0].serialize())
    messages = [
        raw.flight_data(raw.schema_header(SCHEMA), descriptor=raw.path_descriptor("readings")),
        raw.flight_data(header, body),
    ]
    assert raw.stream_then_cancel(server.flight.removeprefix("grpc://"), "DoPut", messages) >= 1
    time.sleep(0.2)
    assert calls.scan(client, "readings").num_rows == 100
