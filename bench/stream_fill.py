"""Topics of 20-feature rows in every format, for `stream.py`; and a Python consumer that writes such JSON to Redis.

    stream_fill.py BROKERS TOPIC FORMAT ROWS KEYS     fills a topic
"""

import io
import json
import sys
import time

import gen
import numpy as np
import pyarrow as pa
from confluent_kafka import Producer

# name -> (format in [source.kafka], rows a message)
FORMATS = {
    "json": ("json", 1),
    "avro": ("avro", 1),
    "protobuf": ("protobuf", 1),
    "arrow-1": ("arrow", 1),
    "arrow-100": ("arrow", 100),
    "arrow-10000": ("arrow", 10_000),
}
CHUNK = 50_000
AVRO = {"double": "double", "int64": "long", "float": "float", "int32": "int", "string": "string"}
PROTOBUF = {"double": "double", "int64": "int64", "float": "float", "int32": "int32", "string": "string"}


def avro_schema():
    fields = [{"name": "id", "type": "long"}, {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}}]
    fields += [{"name": field.name, "type": ["null", AVRO[str(field.type)]]} for field in list(gen.SCHEMA)[2:]]
    return {"type": "record", "name": "wide", "fields": fields}


def protobuf_schema():
    lines = ['syntax = "proto3";', "message Wide {", "  int64 id = 1;", "  int64 at = 2;"]
    lines += [f"  {PROTOBUF[str(f.type)]} {f.name} = {n};" for n, f in enumerate(list(gen.SCHEMA)[2:], 3)]
    return "\n".join([*lines, "}"])


def definition(name, topic):
    """The table that reads such a topic."""
    form, _ = FORMATS[name]
    text = gen.DEFINITION + f'\n[source.kafka]\ntopic = "{topic}"\nformat = "{form}"\n'
    if form == "avro":
        text += f"schema = '''{json.dumps(avro_schema())}'''\n"
    if form == "protobuf":
        text += f"schema = '''{protobuf_schema()}'''\nmessage = \"Wide\"\n"
    return text


def values(name, rows):
    """The messages of these rows, in order."""
    form, each = FORMATS[name]
    if form == "arrow":
        for start in range(0, len(rows), each):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, rows.schema) as writer:
                writer.write_table(rows.slice(start, each).combine_chunks())
            yield sink.getvalue().to_pybytes()
        return
    plain = rows.set_column(1, "at", rows["at"].cast(pa.int64())).to_pylist()
    if form == "json":
        for row in plain:
            yield json.dumps(row).encode()
    elif form == "avro":
        import fastavro

        schema = fastavro.parse_schema(avro_schema())
        for row in plain:
            sink = io.BytesIO()
            fastavro.schemaless_writer(sink, schema, row)
            yield sink.getvalue()
    else:
        message = protobuf_message()
        for row in plain:
            yield message(**row).SerializeToString()


def protobuf_message():
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="wide.proto", syntax="proto3")
    wide = file.message_type.add(name="Wide")
    kinds = descriptor_pb2.FieldDescriptorProto
    types = {"double": kinds.TYPE_DOUBLE, "int64": kinds.TYPE_INT64, "float": kinds.TYPE_FLOAT}
    types |= {"int32": kinds.TYPE_INT32, "string": kinds.TYPE_STRING}
    for number, field in enumerate(gen.SCHEMA, 1):
        kind = types.get(str(field.type), kinds.TYPE_INT64)
        wide.field.add(name=field.name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Wide"))


def fill(brokers, topic, name, rows, keys, seed=7):
    """Sends `rows` random updates of `keys` keys; returns bytes of all values and messages."""
    producer = Producer(
        {"bootstrap.servers": brokers, "acks": "all", "linger.ms": 20, "batch.size": 1_000_000,
         "message.max.bytes": 20_000_000, "queue.buffering.max.messages": 1_000_000}  # fmt: skip
    )
    failed, total, messages = [], 0, 0

    def delivered(error, _):
        if error is not None:
            failed.append(str(error))

    generator = np.random.default_rng(seed)
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        part = gen.rows(generator, generator.integers(0, keys, count), gen.START_MICROS + start)
        for value in values(name, part):
            while True:
                try:
                    producer.produce(topic, value=value, on_delivery=delivered)
                    break
                except BufferError:
                    producer.poll(0.05)
            total += len(value)
            messages += 1
            if messages % 256 == 0:
                producer.poll(0)
    left = producer.flush(120)
    assert left == 0 and not failed, (left, failed[:3])
    return {"bytes": total, "messages": messages}


def into_redis(brokers, topic, rows, socket, batch=1_000):
    """What people do without a feature server: consume, decode, HSET in a pipeline. Seconds and CPU."""
    import redis
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": brokers, "group.id": "redis", "enable.auto.commit": False})
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
    store = redis.Redis(unix_socket_path=socket)
    done, began, cpu = 0, time.monotonic(), time.process_time()
    while done < rows:
        messages = consumer.consume(batch, timeout=5)
        if not messages:
            raise RuntimeError(f"only {done} of {rows} came")
        with store.pipeline(transaction=False) as pipe:
            for message in messages:
                row = json.loads(message.value())
                pipe.hset(f"e:{row.pop('id')}", mapping=row)
            pipe.execute()
        done += len(messages)
    return {"rows": done, "seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}


if __name__ == "__main__":
    brokers, topic, name, rows, keys = sys.argv[1:6]
    print(json.dumps(fill(brokers, topic, name, int(rows), int(keys))))
