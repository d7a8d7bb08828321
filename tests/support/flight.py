"""Flight calls as any client would make them: pyarrow and JSON, nothing generated."""

import json

import pyarrow as pa
from pyarrow import flight


def connect(server, uds=False):
    """A client over TCP, or over the Unix socket."""
    if uds:
        return flight.connect(f"grpc+unix://{server.uds}")
    return flight.connect(server.flight)


def command(**member):
    """The descriptor of one JSON command, such as command(scan={"table": "t"})."""
    return flight.FlightDescriptor.for_command(json.dumps(member).encode())


def ticket(**member):
    """A hand-written ticket."""
    return flight.Ticket(json.dumps(member).encode())


def read(reader):
    """Everything of a stream: the table, and the app_metadata of its messages, parsed, in order."""
    batches, metadata = [], []
    while True:
        try:
            chunk = reader.read_chunk()
        except StopIteration:
            break
        if chunk.data is not None:
            batches.append(chunk.data)
        if chunk.app_metadata is not None and chunk.app_metadata.size:
            metadata.append(json.loads(chunk.app_metadata.to_pybytes()))
    return pa.Table.from_batches(batches, reader.schema), metadata


def scan(client, table, **request):
    """The rows of a scan by a hand-written ticket."""
    return read(client.do_get(ticket(scan={"table": table, **request})))[0]


def scan_with_positions(client, table, **request):
    """The rows and, of the same snapshot, {topic: {partition: next offset}}."""
    rows, metadata = read(client.do_get(ticket(scan={"table": table, **request})))
    assert metadata, "no app_metadata in the reply"
    return rows, positions(metadata[0], table)


def positions(metadata, table):
    """{topic: {partition: next offset}} of one table, from a reply's first app_metadata."""
    found = metadata.get("positions") or {}
    if table in found and all(isinstance(inner, dict) for inner in found[table].values()):
        found = found[table]
    return {topic: {int(p): offset for p, offset in inner.items()} for topic, inner in found.items()}


def whole(client, table):
    """The rows that the versioned ticket of GetFlightInfo on path [table] names."""
    info = client.get_flight_info(flight.FlightDescriptor.for_path(table))
    assert len(info.endpoints) == 1
    return read(client.do_get(info.endpoints[0].ticket))[0]


def lookup(client, features, keys, **request):
    """One DoExchange with one batch of keys ({column: values} or a RecordBatch)."""
    return lookups(client, features, [keys], **request)[0]


def lookups(client, features, batches, **request):
    """One DoExchange stream; the reply to each batch of keys, as tables."""
    batches = [b if isinstance(b, pa.RecordBatch) else pa.RecordBatch.from_pydict(b) for b in batches]
    writer, reader = client.do_exchange(command(lookup={"features": features, **request}))
    replies = []
    with writer:
        writer.begin(batches[0].schema)
        for batch in batches:
            writer.write_batch(batch)
            chunk = reader.read_chunk()
            while chunk.data is None:
                chunk = reader.read_chunk()
            replies.append(pa.Table.from_batches([chunk.data]))
        writer.done_writing()
        for _ in reader:
            pass
    return replies


def put(client, table, rows, mode=None, id=None):
    """One DoPut of a table or batches; returns the JSON of every PutResult."""
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    if mode is None and id is None:
        descriptor = flight.FlightDescriptor.for_path(table)
    else:
        request = {"table": table}
        request.update({k: v for k, v in (("mode", mode), ("id", id)) if v is not None})
        descriptor = command(put=request)
    writer, results = client.do_put(descriptor, rows.schema)
    replies = []
    with writer:
        for batch in rows.to_batches():
            writer.write_batch(batch)
        writer.done_writing()
        while (result := results.read()) is not None:
            replies.append(json.loads(result.to_pybytes()))
    return replies


def action(client, name, **body):
    """The parsed bodies of an action's results."""
    results = client.do_action(flight.Action(name, json.dumps(body).encode()))
    return [json.loads(result.body.to_pybytes()) for result in results]
