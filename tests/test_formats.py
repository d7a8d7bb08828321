"""The same rows in every format give the same table.

The fears: a number that changes on its way through one format but not the others; a frame that a real serializer
writes and the tests by hand do not; a registry that is down and costs records; a record of many rows of which a part
is applied; a delete of a change stream that is lost.

Values are written by Confluent's own serializers, fastavro and pyarrow, not by code of this project.
"""

import io
import json

import fastavro
import pyarrow as pa
import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient, header_schema_id_serializer
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from oracle import same_rows
from support import flight as calls
from support.ingest import caught_up
from support.registry import Registry
from support.wait import until

pytestmark = pytest.mark.kafka

START = 1_700_000_000_000  # ms

ROWS = [
    {
        "id": f"k{n % 7}",
        "ts": START + n,
        "count": [0, -1, 2**53 + 1, -(2**63), 2**63 - 1][n % 5],
        "ratio": [0.1, -0.0, 1e300, 5e-324][n % 4],
        "label": [None, "", "söök", "x" * 300][n % 4],
        "ok": n % 3 == 0,
    }
    for n in range(60)
]

AVRO = {
    "type": "record",
    "name": "Row",
    "namespace": "test",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "ts", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "count", "type": "long"},
        {"name": "ratio", "type": "double"},
        {"name": "label", "type": ["null", "string"], "default": None},
        {"name": "ok", "type": "boolean"},
    ],
}

PROTO = """
syntax = "proto3";
package test;
message First { string id = 1; }
message Holder {
  message Row {
    string id = 1;
    int64 ts = 2;
    int64 count = 3;
    double ratio = 4;
    optional string label = 5;
    bool ok = 6;
  }
}
"""

JSON_SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Row",
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "ts": {"type": "integer"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "label": {"type": ["string", "null"]},
        "ok": {"type": "boolean"},
    },
}

ARROW = pa.schema(
    [
        ("ok", pa.bool_()),
        ("label", pa.dictionary(pa.int32(), pa.string())),
        ("id", pa.large_string()),
        ("ts", pa.timestamp("ms", tz="UTC")),
        ("count", pa.int64()),
        ("ratio", pa.float64()),
    ]
)


@pytest.fixture
def registry():
    registry = Registry()
    yield registry
    registry.close()


def table(topic, settings, fields=""):
    return f"""
[table]
name = "rows"
entity = [{{ name = "id", type = "string" }}]
event_time = {{ name = "ts", type = "timestamp[ms, tz=UTC]" }}
history = "all"

[features]
count = "int64"
ratio = "double"
label = "string"
ok = "bool"

[source.kafka]
topic = "{topic}"
{settings}
{fields}
"""


def proto_row():
    """The message class of PROTO's Holder.Row."""
    file = descriptor_pb2.FileDescriptorProto(name="row.proto", package="test", syntax="proto3")
    file.message_type.add(name="First").field.add(name="id", number=1, type=9, label=1)
    row = file.message_type.add(name="Holder").nested_type.add(name="Row")
    for number, (name, kind) in enumerate(
        [("id", 9), ("ts", 3), ("count", 3), ("ratio", 1), ("label", 9), ("ok", 8)], 1
    ):
        field = row.field.add(name=name, number=number, type=kind, label=1)
        if name == "label":
            field.proto3_optional = True
            field.oneof_index = 0
            row.oneof_decl.add(name="_label")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Holder.Row"))


def stream(rows, schema=ARROW, **options):
    """An Arrow IPC stream of these rows."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema))
    return sink.getvalue()


def bare_avro(row):
    body = io.BytesIO()
    fastavro.schemaless_writer(body, fastavro.parse_schema(AVRO), row)
    return body.getvalue()


def records(form, registry, topic):
    """(value, headers) of ROWS in that form, and the settings of the source."""
    client = SchemaRegistryClient({"url": registry.url})
    framed = f'registry = "{registry.url}"\nformat = '
    by_header = {"schema.id.serializer": header_schema_id_serializer}

    def serialized(serializer, values):
        for value in values:
            headers = []
            context = SerializationContext(topic, MessageField.VALUE, headers)
            yield serializer(value, context), headers

    def protobuf(**options):
        registry.proto_texts[f"{topic}-value"] = PROTO
        make = proto_row()
        rows = [make(**{name: value for name, value in row.items() if value is not None}) for row in ROWS]
        return serialized(ProtobufSerializer(make, client, {"use.deprecated.format": False, **options}), rows)

    match form:
        case "json":
            return [(json.dumps(row).encode(), []) for row in ROWS], 'format = "json"'
        case "json_schema":
            serializer = JSONSerializer(json.dumps(JSON_SCHEMA), client)
            return serialized(serializer, ROWS), 'format = "json_schema"'
        case "avro":
            return serialized(AvroSerializer(client, json.dumps(AVRO)), ROWS), framed + '"avro"'
        case "avro_by_header":
            serializer = AvroSerializer(client, json.dumps(AVRO), conf=by_header)
            return serialized(serializer, ROWS), framed + '"avro"'
        case "avro_bare":
            settings = f"format = \"avro\"\nschema = '''{json.dumps(AVRO)}'''"
            return [(bare_avro(row), []) for row in ROWS], settings
        case "protobuf":
            return protobuf(), framed + '"protobuf"'
        case "protobuf_by_header":
            return protobuf(**by_header), framed + '"protobuf"'
        case "protobuf_bare":
            make = proto_row()
            rows = [make(**{name: value for name, value in row.items() if value is not None}) for row in ROWS]
            settings = f"format = \"protobuf\"\nmessage = \"test.Holder.Row\"\nschema = '''{PROTO}'''"
            return [(row.SerializeToString(), []) for row in rows], settings
        case "arrow":
            return [(stream(ROWS[:50]), [])] + [(stream([row]), []) for row in ROWS[50:]], 'format = "arrow"'
        case "arrow_compressed":
            halves = [stream(ROWS[:30], compression="zstd"), stream(ROWS[30:], compression="lz4")]
            return [(half, []) for half in halves], 'format = "arrow"'
        case "debezium":
            events = [{"before": None, "after": row, "op": "c", "ts_ms": START} for row in ROWS]
            values = [json.dumps({"schema": {"type": "struct"}, "payload": event}).encode() for event in events]
            return [(value, []) for value in values], 'format = "json"\nenvelope = "debezium"'
        case "debezium_avro":
            value = {**AVRO, "name": "Value"}
            event = {
                "type": "record",
                "name": "Envelope",
                "fields": [
                    {"name": "before", "type": ["null", value], "default": None},
                    {"name": "after", "type": ["null", "test.Value"], "default": None},
                    {"name": "op", "type": "string"},
                ],
            }
            events = [{"before": None, "after": row, "op": "r"} for row in ROWS]
            serializer = AvroSerializer(client, json.dumps(event))
            return serialized(serializer, events), framed + '"avro"\nenvelope = "debezium"'
    raise AssertionError(form)


FORMS = [
    "json",
    "json_schema",
    "avro",
    "avro_by_header",
    "avro_bare",
    "protobuf",
    "protobuf_by_header",
    "protobuf_bare",
    "arrow",
    "arrow_compressed",
    "debezium",
    "debezium_avro",
]


def send(kafka, topic, values, **options):
    """Sends (value, headers) or (value, headers, key) to partition 0; returns how many."""
    producer = kafka.producer(**options)
    count = 0
    for value, headers, *key in values:
        producer.produce(topic, value, key=key[0] if key else None, headers=headers, partition=0, timestamp=START)
        count += 1
    assert producer.flush(60) == 0
    return count


def wait_read(server, client, topic, count, name="rows"):
    def done():
        assert server.alive(), server.log_text()
        return caught_up(client, name, topic, {0: count})

    until(done, what=f"{name} reading {topic} up to {count}", why=server.log_text)


def plain(client, name="rows"):
    found = calls.scan(client, name)
    index = found.schema.get_field_index("ts")
    return found.set_column(index, "ts", found["ts"].cast("int64")).to_pylist()


def letters_of(client, name="rows"):
    (result,) = calls.action(client, "dead_letters", table=name)
    return result["dead_letters"]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_in_every_format_give_the_same_table(store, kafka, serve, registry, form):
    topic = kafka.topic(form.replace("_", "-"), partitions=1)
    values, settings = records(form, registry, topic)
    count = send(kafka, topic, values)
    store.apply(table(topic, settings))
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_read(server, client, topic, count)
    assert letters_of(client) == []
    same_rows(plain(client), ROWS)


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_every_codec_is_read(store, kafka, serve, codec):
    topic = kafka.topic(codec, partitions=1)
    values = [(json.dumps(row).encode(), []) for row in ROWS]
    count = send(kafka, topic, values, **{"compression.type": codec, "linger.ms": 50})
    store.apply(table(topic, 'format = "json"'))
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_read(server, client, topic, count)
    same_rows(plain(client), ROWS)


def test_keys_and_times_come_from_headers_and_avro_keys(store, kafka, serve, registry):
    topic = kafka.topic("beside", partitions=1)
    client = SchemaRegistryClient({"url": registry.url})
    keys = AvroSerializer(client, '"string"')
    values = AvroSerializer(client, json.dumps(AVRO))
    sent = []
    for row in ROWS:
        key = keys(row["label"] or "none", SerializationContext(topic, MessageField.KEY))
        value = values(row, SerializationContext(topic, MessageField.VALUE))
        sent.append((value, [("user", f"h-{row['id']}".encode()), ("at", str(row["ts"]).encode())], key))
    count = send(kafka, topic, sent)
    store.apply(
        table(
            topic,
            f'format = "avro"\nkey = "avro"\nregistry = "{registry.url}"',
            'fields = { id = "$header.user", ts = "$header.at", label = "$key" }',
        )
    )
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_read(server, client, topic, count)
    assert letters_of(client) == []
    same_rows(plain(client), [{**row, "id": f"h-{row['id']}", "label": row["label"] or "none"} for row in ROWS])


def test_deletes_of_a_change_stream_hide_the_row(store, kafka, serve):
    topic = kafka.topic("changes", partitions=1)
    row = {"id": "a", "ts": START, "count": 1, "ratio": 1.0, "label": "x", "ok": True}
    events = [
        {"op": "c", "before": None, "after": row},
        {"op": "c", "before": None, "after": {**row, "id": "b"}},
        {"op": "u", "before": row, "after": {**row, "ts": START + 1, "count": 2}},
        {"op": "d", "before": {**row, "id": "b"}, "after": None, "source": {"ts_ms": START + 5}},
        {"op": "t", "before": None, "after": None},
    ]
    sent = [(json.dumps(event).encode(), []) for event in events]
    # What Debezium sends after a delete, for compaction: at the time of sending, far after the row comes back.
    sent.append((None, [], b'{"id": "b"}'))
    sent.append((json.dumps({"op": "c", "before": None, "after": {**row, "id": "b", "ts": START + 9}}).encode(), []))
    count = send(kafka, topic, sent)
    store.apply(table(topic, 'format = "json"\nenvelope = "debezium"').replace('"all"', '"latest"'))
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_read(server, client, topic, count)
    same_rows(
        plain(client), [{**row, "ts": START + 1, "count": 2}, {**row, "id": "b", "ts": START + 9}]
    )
    (letter,) = letters_of(client)
    assert letter["offset"] == 4 and "truncate" in letter["error"]


def test_broken_records_of_every_format_are_dead_letters_and_the_rest_goes_on(store, kafka, serve, registry):
    topic = kafka.topic("broken", partitions=1)
    values, settings = records("avro", registry, topic)
    good = list(values)
    other = registry.register("other", {"schema": json.dumps({**AVRO, "fields": [
        *AVRO["fields"][:2], {"name": "count", "type": "string"}, *AVRO["fields"][3:]]})})
    frame = b"\0" + other["id"].to_bytes(4, "big")
    wrong = io.BytesIO()
    fastavro.schemaless_writer(wrong, json.loads(registry.schemas[other["id"] - 1]["schema"]), {**ROWS[0], "count": "5"})
    bad = {
        1: (b"", "empty"),
        3: (b"{}", "magic"),
        5: (good[5][0][:12], "Avro"),
        7: (good[7][0] + b"x", "follow"),
        9: (frame + wrong.getvalue(), "field count: expected int64, found string"),
    }
    sent = [(bad[n][0] if n in bad else value, headers) for n, (value, headers) in enumerate(good)]
    count = send(kafka, topic, sent)
    store.apply(table(topic, settings))
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_read(server, client, topic, count)
    same_rows(plain(client), [row for n, row in enumerate(ROWS) if n not in bad])
    letters = {letter["offset"]: letter["error"] for letter in letters_of(client)}
    assert sorted(letters) == sorted(bad)
    for offset, (_, words) in bad.items():
        assert words in letters[offset], letters[offset]


def test_a_broken_row_of_an_arrow_record_refuses_the_record_whole(store, kafka, serve):
    topic = kafka.topic("whole", partitions=1)
    rows = [dict(row) for row in ROWS]
    without_key = [*rows[10:15], {**rows[15], "id": None}, *rows[16:20]]
    sent = [stream(rows[:10]), stream(without_key), stream(rows[20:30])[:-40], stream(rows[30:])]
    count = send(kafka, topic, [(value, []) for value in sent])
    store.apply(table(topic, 'format = "arrow"'))
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_read(server, client, topic, count)
    same_rows(plain(client), [*ROWS[:10], *ROWS[30:]])
    letters = {letter["offset"]: letter["error"] for letter in letters_of(client)}
    assert sorted(letters) == [1, 2], letters
    assert "id" in letters[1] and "null" in letters[1], letters[1]


def test_a_registry_that_is_down_costs_no_record(store, kafka, serve, registry):
    topic = kafka.topic("down", partitions=1)
    values, settings = records("avro", registry, topic)
    count = send(kafka, topic, values)
    registry.down = True
    # The server's own registry this time, with a password that nobody may see.
    settings = 'format = "avro"'
    store.apply(table(topic, settings))
    url = registry.url.replace("http://", "http://user:hunter2@")
    server = serve(brokers=kafka.bootstrap, env={"PINION__KAFKA__REGISTRY": url})
    client = calls.connect(server)

    def degraded():
        (result,) = calls.action(client, "source", action="list")
        text = json.dumps(result)
        return text if "degraded" in text.lower() and "503" in text else None

    until(degraded, what="the source saying that the registry is down")
    assert calls.scan(client, "rows").num_rows == 0
    registry.down = False
    wait_read(server, client, topic, count)
    assert letters_of(client) == []
    same_rows(plain(client), ROWS)
    assert "hunter2" not in server.log_text()
