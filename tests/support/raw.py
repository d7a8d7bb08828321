"""Flight on the wire without a Flight library: for messages that a well-behaved client never sends."""

import threading

import grpc
import pyarrow as pa

SERVICE = "/arrow.flight.protocol.FlightService/"


def varint(number):
    out = bytearray()
    while True:
        low, number = number & 0x7F, number >> 7
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def member(field, payload):
    """One length-delimited protobuf member."""
    return varint(field << 3 | 2) + varint(len(payload)) + payload


def path_descriptor(*path):
    """A FlightDescriptor of type PATH."""
    return varint(1 << 3) + varint(1) + b"".join(member(3, part.encode()) for part in path)


def command_descriptor(command):
    """A FlightDescriptor of type CMD."""
    return varint(1 << 3) + varint(2) + member(2, command)


def flight_data(header=b"", body=b"", descriptor=None):
    """A FlightData message."""
    out = b"" if descriptor is None else member(1, descriptor)
    return out + member(2, header) + member(1000, body)


def split(encapsulated):
    """(flatbuffer, body) of one encapsulated IPC message."""
    encapsulated = bytes(encapsulated)
    assert encapsulated[:4] == b"\xff\xff\xff\xff"
    length = int.from_bytes(encapsulated[4:8], "little")
    return encapsulated[8 : 8 + length], encapsulated[8 + length :]


def schema_header(schema):
    """The flatbuffer of a schema message."""
    return split(schema.serialize())[0]


def serialize_compressed(batch, compression):
    """The encapsulated message of a batch with compressed buffers, cut out of a stream."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    stream = sink.getvalue().to_pybytes()
    schema_length = 8 + int.from_bytes(stream[4:8], "little")
    return stream[schema_length:-8]  # without the end-of-stream marker


def stream(address, method, messages, timeout=20):
    """Sends messages on a bidirectional method; returns the replies' bytes. Raises grpc.RpcError."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(
            SERVICE + method, request_serializer=lambda raw: raw, response_deserializer=lambda raw: raw
        )
        return list(call(iter(messages), timeout=timeout))


def stream_then_cancel(address, method, messages):
    """Sends messages, waits for one reply to show that they arrived, and cancels. Returns the replies seen."""
    cancelled = threading.Event()

    def requests():
        yield from messages
        cancelled.wait(20)  # never half-closes: the call ends by the cancel

    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(
            SERVICE + method, request_serializer=lambda raw: raw, response_deserializer=lambda raw: raw
        )(requests(), timeout=20)
        seen = 0 if next(iter(call), None) is None else 1
        call.cancel()
        cancelled.set()
    return seen
