"""The lookup clients that are compared, one class each. (Those of scans: `scan_clients`.)

A client is made once in its process. `requests(ids)` brings arrays of keys into the form that the client library
takes; that is not timed. `ask(request)` is timed: from there to the reply in the process. `typed(reply)` gives the reply
as Arrow, for the check of values; where a client is said to reply typed, `ask` has done it already.

`PREPARED_KEYS` are made ready before a run, and asked again from the first one when a run is longer: more than a
processor caches, and not much more than the client can ask for in a run.
"""

import json
import os

import numpy as np
import pyarrow as pa
from scan_clients import FlightTable, MappedTable, Scan

KEY = pa.schema([pa.field("id", pa.int64(), nullable=False)])


class Flight:
    """pyarrow's Flight client: one DoExchange stream, a batch of keys a request."""

    PREPARED_KEYS = 400_000

    def __init__(self, url, table, features, limit=None):
        from pyarrow import flight

        self.client = flight.connect(url)
        asked = {"lookup": {"features": [f"{table}:{name}" for name in features]}}
        self.descriptor = flight.FlightDescriptor.for_command(json.dumps(asked).encode())
        self.writer, self.reader = self.client.do_exchange(self.descriptor)
        self.writer.begin(KEY)

    def requests(self, arrays):
        return [pa.RecordBatch.from_arrays([pa.array(ids)], schema=KEY) for ids in arrays]

    def ask(self, request):
        self.writer.write_batch(request)
        return self.reader.read_chunk().data

    def typed(self, reply, ids):
        return reply


class Lane:
    """Pinion's Python client on the local lane."""

    PREPARED_KEYS = 400_000

    def __init__(self, socket, table, features, spin_micros=0):
        import pinion

        client = pinion.connect(lane=f"lane://{socket}", spin_micros=spin_micros)
        self.lookup = client.prepare([f"{table}:{name}" for name in features])

    def requests(self, arrays):
        return [pa.RecordBatch.from_arrays([pa.array(ids)], schema=KEY) for ids in arrays]

    def ask(self, request):
        return self.lookup.lookup(request)

    def typed(self, reply, ids):
        return reply


class Redis:
    """redis-py. Every row is a hash `e:<rank>` of fixed-width little-endian values and texts, read by HMGET.

    `hiredis` chooses the parser; `pipeline` sends all HMGETs of a request together, else one after the other; `types`
    builds the typed Arrow batch that Pinion replies with, else the values stay bytes.
    """

    PREPARED_KEYS = 50_000

    def __init__(self, socket, schema, step, hiredis=True, pipeline=True, types=False):
        import redis
        from redis import _parsers

        parser = _parsers._HiredisParser if hiredis else _parsers._RESP2Parser
        pool = redis.ConnectionPool(
            connection_class=redis.UnixDomainSocketConnection, path=socket, parser_class=parser, protocol=2
        )
        self.redis = redis.Redis(connection_pool=pool)
        self.schema = pa.schema([tuple(field) for field in schema])
        self.names = self.schema.names[1:]
        self.step, self.pipeline, self.types = step, pipeline, types

    def requests(self, arrays):
        return [(ids, [f"e:{rank:012d}" for rank in (ids // self.step).tolist()]) for ids in arrays]

    def ask(self, request):
        ids, keys = request
        if self.pipeline and len(keys) > 1:
            with self.redis.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.hmget(key, self.names)
                reply = pipe.execute()
        else:
            reply = [self.redis.hmget(key, self.names) for key in keys]
        return self.batch(reply, ids) if self.types else reply

    def typed(self, reply, ids):
        return reply if self.types else self.batch(reply, ids)

    def batch(self, reply, ids):
        columns = [pa.array(ids)]
        for field, values in zip(list(self.schema)[1:], zip(*reply)):
            if pa.types.is_string(field.type):
                columns.append(pa.array(values, pa.binary()).view(pa.string()))
            else:
                columns.append(pa.Array.from_buffers(field.type, len(values), [None, pa.py_buffer(b"".join(values))]))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


class RedisPacked(Redis):
    """redis-py, every row one value `p:<rank>` that its author packed: an MGET a request, unpacked into Arrow.

    No feature store does it so, and a single feature cannot be read or written: what Redis can do at its very best.
    """

    PREPARED_KEYS = 200_000

    def requests(self, arrays):
        return [(ids, [f"p:{rank:012d}" for rank in (ids // self.step).tolist()]) for ids in arrays]

    def ask(self, request):
        ids, keys = request
        reply = self.redis.mget(keys)
        return self.unpack(reply, ids) if self.types else reply

    def typed(self, reply, ids):
        return reply if self.types else self.unpack(reply, ids)

    def unpack(self, reply, ids):
        fixed = [field for field in list(self.schema)[1:] if not pa.types.is_string(field.type)]
        kinds = np.dtype([(field.name, field.type.to_pandas_dtype()) for field in fixed])
        rows = np.frombuffer(b"".join(value[: kinds.itemsize] for value in reply), kinds)
        texts = list(zip(*(value[kinds.itemsize :].split(b"\0") for value in reply)))
        columns = [pa.array(ids)] + [pa.array(np.ascontiguousarray(rows[field.name])) for field in fixed]
        columns += [pa.array(values, pa.binary()).view(pa.string()) for values in texts]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


class FeastSdk:
    """Feast's Python SDK on its Redis online store."""

    PREPARED_KEYS = 10_000

    def __init__(self, repository, features, schema, arrow=False):
        from feast import FeatureStore

        os.chdir(repository)
        self.store = FeatureStore(repo_path=repository)
        self.features = [f"profile:{name}" for name in features]
        self.schema = pa.schema([tuple(field) for field in schema])
        self.arrow = arrow

    def requests(self, arrays):
        return [[{"id": i} for i in ids.tolist()] for ids in arrays]

    def ask(self, request):
        found = self.store.get_online_features(features=self.features, entity_rows=request)
        return found.to_arrow() if self.arrow else found.to_dict()

    def typed(self, reply, ids):
        columns = reply if isinstance(reply, dict) else {name: reply[name].to_pylist() for name in self.schema.names}
        return pa.RecordBatch.from_arrays(
            [pa.array(columns[field.name], field.type) for field in self.schema], schema=self.schema
        )


class FeastServe:
    """`feast serve` over HTTP with a kept-alive connection; replies parsed from JSON."""

    PREPARED_KEYS = 10_000

    def __init__(self, port, features, schema):
        import http.client

        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        self.features = [f"profile:{name}" for name in features]
        self.schema = pa.schema([tuple(field) for field in schema])

    def requests(self, arrays):
        return [json.dumps({"features": self.features, "entities": {"id": ids.tolist()}}) for ids in arrays]

    def ask(self, request):
        self.connection.request(
            "POST", "/get-online-features", body=request, headers={"Content-Type": "application/json"}
        )
        reply = self.connection.getresponse()
        body = reply.read()
        if reply.status != 200:
            raise RuntimeError(f"feast serve answered {reply.status}: {body[:500]}")
        return json.loads(body)

    def typed(self, reply, ids):
        names = reply["metadata"]["feature_names"]
        columns = {name: found["values"] for name, found in zip(names, reply["results"])}
        return pa.RecordBatch.from_arrays(
            [pa.array(columns[field.name], field.type) for field in self.schema], schema=self.schema
        )


KINDS = {
    "scan": Scan,
    "table-flight": FlightTable,
    "table-mapped": MappedTable,
    "flight": Flight,
    "lane": Lane,
    "redis": Redis,
    "redis-packed": RedisPacked,
    "feast": FeastSdk,
    "feast-serve": FeastServe,
}
