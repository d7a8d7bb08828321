"""The local lane: one Unix socket, frames out and in (docs/local-lane.md).

A `Lane` may be shared by threads: requests take turns. It must not be shared by processes: a forked
child finds its parent's connection closed and connects anew. A connection that broke (the server was
restarted) is made again with the next request, and prepared lookups are prepared again.

Elsewhere: a lane on which pins are held, which does not hang up so easily (`held`).
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import threading
import weakref
from collections import deque
from time import perf_counter_ns
from typing import Any

import pyarrow as pa

from pinion import errors
from pinion.errors import ConnectionLost, ProtocolError

VERSION = 1
MAGIC = b"PINLANE\0"

HELLO, PREPARE, LOOKUP, RELEASE, MAP, RENEW, ACTION, PING, PIN, LATEST, ROW_IDS, CHECKSUM = range(1, 13)
WELCOME, PREPARED, ROWS, RELEASED, MAPPED, RENEWED, RESULT, PONG = range(129, 137)
PINNED, GENERATION, ROWS_FOUND, CHECKSUM_IS = range(137, 141)
BATCH, END, ERROR = 144, 145, 255

WANT_JSON = 1
RELEASE_HANDLE, RELEASE_LEASE, RELEASE_PIN_LEASE, RELEASE_MAPPING = range(4)
MAX_DESCRIPTORS = 253
CONTROL_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
TOO_FEW_DESCRIPTORS = "not all descriptors came: raise the limit of open files (ulimit -n)"

# payload_bytes, kind, flags, reserved, request_id, detail
HEADER = struct.Struct("<IBBHII")
HEADER_BYTES = HEADER.size
_unpack = HEADER.unpack_from
_read_batch = pa.ipc.read_record_batch
_allocate = pa.allocate_buffer

# Leases that one connection may have, each of which may be overdue.
MAX_RENEWALS = 1024

# Replies of which nothing is known yet: enough for a few rows of a wide table.
FIRST_BYTES = 16 << 10

_lanes: "weakref.WeakSet[Lane]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for lane in list(_lanes):
        lane._forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


def padded_json(value: Any) -> bytes:
    """JSON with blanks up to a multiple of 8."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def descriptors_of(control: list[tuple[int, int, bytes]]) -> array.array[int]:
    """The descriptors that `recvmsg` received beside bytes."""
    numbers = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return numbers


class Prepared:
    """A lookup settled on one connection. `generation` is that connection's."""

    __slots__ = (
        "__weakref__", "command", "end", "generation", "handle", "info", "key_schema", "result", "sizes", "stored",
    )  # fmt: skip

    def __init__(self, command: bytes, key_schema: pa.Schema):
        self.command = command
        self.key_schema = key_schema
        self.generation = -1
        self.handle = 0
        self.info: dict[str, Any] = {}
        self.stored: pa.Schema | None = None
        # None where it is the stored schema: nothing to do to a reply.
        self.result: pa.Schema | None = None
        # Keys in a request -> bytes of its reply, so that one read gets all of it.
        self.sizes: dict[int, int] = {}
        # Gives the handle back when nobody has this any more.
        self.end: weakref.finalize[..., Prepared] | None = None


class Lane:
    """A connection to the server's local lane.

    `timeout` bounds, in seconds, how long a reply may take; None waits as long as the server does.
    With `spin_micros` a lookup looks for its reply that long before it sleeps, which answers sooner
    and keeps a core busy meanwhile.
    """

    def __init__(self, path: str, timeout: float | None = None, spin_micros: int = 0):
        self.path = path
        self.timeout = timeout
        self.spin_micros = spin_micros
        self.info: dict[str, Any] = {}
        self.generation = 0
        self._socket: socket.socket | None = None
        # Not re-entrant on purpose: a finalizer in the middle of a request must not get it.
        self._lock = threading.Lock()
        self._request = 0
        self._closed = False
        # What is to be released: process, generation, and `detail` and `flags` of RELEASE.
        self._ended: deque[tuple[int, int, int, int]] = deque()
        self._header = bytearray(HEADER_BYTES)
        _lanes.add(self)
        with self._lock:
            self._connect()

    # -- the connection

    def _connect(self) -> None:
        if self._closed:
            raise ConnectionLost("this client was closed")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout)
            connection.connect(self.path)
        except OSError as error:
            connection.close()
            raise ConnectionLost(f"no server answers on the local lane {self.path}: {error}") from error
        self._socket = connection
        self.generation += 1
        about = json.dumps({"client": "pinion-python/0.1.0"}).encode()
        payload = MAGIC + struct.pack("<HH", VERSION, VERSION) + about
        try:
            kind, _, size, reply = self._ask(HELLO, payload)
            if kind != WELCOME:
                raise ProtocolError(f"HELLO was answered by a frame of kind {kind}")
            self.info = json.loads(reply.slice(HEADER_BYTES, size).to_pybytes())
        except BaseException:
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _forked(self) -> None:
        # The parent goes on using the socket: only this process's descriptor is closed. The lock
        # may have been held by a thread that does not exist here.
        self._lock = threading.Lock()
        self._ended = deque()
        self.generation += 1
        self._hang_up()

    def close(self) -> None:
        """Hangs up. The server ends this connection's leases; tables still mapped stay readable."""
        with self._lock:
            self._closed = True
            self._hang_up()

    # -- frames

    def _send(self, kind: int, payload: Any = b"", detail: int = 0, flags: int = 0) -> None:
        self._request = request = (self._request + 1) & 0xFFFFFFFF
        size = len(payload)
        HEADER.pack_into(self._header, 0, size, kind, flags, 0, request, detail)
        connection = self._socket
        if size < 65536:
            connection.sendall(b"".join((self._header, payload)))
        else:
            connection.sendall(self._header)
            connection.sendall(payload)

    def _receive(self, expected: int, descriptors: list[int] | None = None) -> tuple[int, int, int, pa.Buffer]:
        """One frame: kind, detail, payload bytes, and a buffer that starts with its header."""
        connection = self._socket
        buffer = _allocate(expected)
        if descriptors is not None:
            got = self._receive_with(buffer, descriptors)
        elif self.spin_micros:
            got = self._spin(buffer)
        else:
            got = connection.recv_into(buffer)
        if got < HEADER_BYTES:
            got = self._fill(buffer, got, HEADER_BYTES)
        size, kind, _, _, request, detail = _unpack(buffer)
        total = size + HEADER_BYTES
        if got != total:
            if got > total:
                raise ProtocolError(f"{got - total} bytes that nobody asked for")
            if total > expected:
                whole = _allocate(total)
                memoryview(whole)[:got] = memoryview(buffer)[:got]
                buffer = whole
            self._fill(buffer, got, total)
        if request != self._request:
            # An ERROR before any request was understood (refused at the door) has no id.
            if not (kind == ERROR and request == 0):
                raise ProtocolError(f"a reply to request {request}, while {self._request} is under way")
        if kind == ERROR:
            raise errors.of_lane(detail, buffer.slice(HEADER_BYTES, size).to_pybytes())
        return kind, detail, size, buffer

    def _fill(self, buffer: pa.Buffer, got: int, total: int) -> int:
        view = memoryview(buffer)
        while got < total:
            more = self._socket.recv_into(view[got:total])
            if more == 0:
                raise ConnectionResetError("the server closed the connection")
            got += more
        return got

    def _spin(self, buffer: pa.Buffer) -> int:
        connection = self._socket
        until = perf_counter_ns() + self.spin_micros * 1000
        # With a timeout Python's socket sleeps until there is something, whatever the flags say.
        descriptor = None if self.timeout is None else connection.fileno()
        while perf_counter_ns() < until:
            try:
                if descriptor is None:
                    return connection.recv_into(buffer, 0, socket.MSG_DONTWAIT)
                return os.readv(descriptor, (buffer,))
            except BlockingIOError:
                pass
        return connection.recv_into(buffer)

    def _receive_with(self, buffer: pa.Buffer, descriptors: list[int]) -> int:
        """As `recv_into`, of a frame's header only, with the descriptors that come with it."""
        view = memoryview(buffer)[:HEADER_BYTES]
        got, control, flags, _ = self._socket.recvmsg_into([view], CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC)
        descriptors.extend(descriptors_of(control))
        if flags & socket.MSG_CTRUNC:
            raise OSError(TOO_FEW_DESCRIPTORS)
        return got

    def _ask(
        self,
        kind: int,
        payload: Any = b"",
        detail: int = 0,
        flags: int = 0,
        expected: int = 4096,
        descriptors: list[int] | None = None,
    ) -> tuple[int, int, int, pa.Buffer]:
        """One request and its reply, on the connection as it is. Breaks it when it fails."""
        try:
            try:
                self._send(kind, payload, detail, flags)
            except (BrokenPipeError, ConnectionResetError):
                # The server closed it, and may have said why before.
                return self._receive(expected)
            return self._receive(expected, descriptors)
        except errors.PinionError as error:
            if isinstance(error, ProtocolError):
                self._hang_up()
            raise
        except OSError as error:
            self._hang_up()
            if isinstance(error, TimeoutError):
                raise errors.DeadlineExceeded(f"no reply within {self.timeout} s", "CLIENT_TIMEOUT") from error
            raise ConnectionLost(f"the connection to {self.path} broke: {error}") from error
        except BaseException:
            # A reply that nobody read would be taken for the next one (Ctrl-C, say).
            self._hang_up()
            raise

    def request(self, kind: int, payload: Any = b"", detail: int = 0, flags: int = 0) -> tuple[int, int, int, pa.Buffer]:
        """One request and its reply: kind, detail, payload bytes, buffer (header included).

        A connection that was found broken is made anew and asked once more: what is asked over the
        lane may be asked twice.
        """
        with self._lock:
            self._release_some()
            return self._ask_again(kind, payload, detail, flags)

    def _ask_again(self, kind: int, payload: Any, detail: int, flags: int) -> tuple[int, int, int, pa.Buffer]:
        if self._socket is None:
            self._connect()
        try:
            return self._ask(kind, payload, detail, flags)
        except ConnectionLost:
            self._connect()
            return self._ask(kind, payload, detail, flags)

    # -- lookups

    def prepare(self, prepared: Prepared) -> None:
        """Settles a lookup on the connection as it is now."""
        with self._lock:
            self._prepare(prepared)

    def release(self, prepared: Prepared) -> None:
        """Ends a prepared lookup. Does nothing if its connection is gone."""
        with self._lock:
            if self._socket is not None and prepared.generation == self.generation:
                prepared.generation = -1
                prepared.end.detach()
                self._ask(RELEASE, b"", prepared.handle)

    def _prepare(self, prepared: Prepared) -> None:
        self._release_some()
        payload = prepared.command + memoryview(prepared.key_schema.serialize())
        kind, detail, size, buffer = self._ask_again(PREPARE, payload, len(prepared.command), 0)
        if kind != PREPARED:
            raise ProtocolError(f"PREPARE was answered by a frame of kind {kind}")
        prepared.info = json.loads(buffer.slice(HEADER_BYTES, detail).to_pybytes())
        stored, result = read_schemas(buffer, HEADER_BYTES + detail, size - detail)[:2]
        prepared.handle = prepared.info["handle"]
        prepared.stored = stored
        prepared.result = None if result.equals(stored) else result
        if prepared.end is not None:
            prepared.end.detach()
        prepared.end = weakref.finalize(prepared, self.ended, self.generation, prepared.handle, RELEASE_HANDLE)
        prepared.end.atexit = False
        prepared.generation = self.generation

    def lookup(self, prepared: Prepared, keys: pa.RecordBatch) -> pa.RecordBatch:
        """Looks keys up; the reply's buffers are its own."""
        payload = keys.serialize()
        rows = keys.num_rows
        with self._lock:
            if self._socket is None:
                self._connect()
            if prepared.generation != self.generation:
                self._prepare(prepared)
            expected = prepared.sizes.get(rows, FIRST_BYTES)
            try:
                kind, detail, size, buffer = self._ask(LOOKUP, payload, prepared.handle, 0, expected)
            except ConnectionLost:
                self._connect()
                self._prepare(prepared)
                kind, detail, size, buffer = self._ask(LOOKUP, payload, prepared.handle, 0, expected)
            # Another thread may prepare it anew, for another schema, once the lock is free.
            stored, result = prepared.stored, prepared.result
            self._release_some()
        if kind != ROWS:
            raise ProtocolError(f"LOOKUP was answered by a frame of kind {kind}")
        if size + HEADER_BYTES != expected:
            note_size(prepared.sizes, rows, size + HEADER_BYTES)
        batch = _read_batch(buffer.slice(HEADER_BYTES, detail), stored)
        if result is not None:
            batch = to_schema(batch, result)
        if detail < size:
            batch = marked(batch, json.loads(buffer.slice(HEADER_BYTES + detail, size - detail).to_pybytes()))
        return batch

    # -- leases

    def map(
        self, command: dict[str, Any]
    ) -> tuple[dict[str, Any], pa.Buffer, int, list[int], dict[int, list[pa.RecordBatch]], int]:
        """Asks for a snapshot's files.

        Leases of this connection that are overdue are renewed. Returns MAPPED's JSON, its frame, where its schemas start, the descriptors (the caller closes
        them), the batches sent, by part, and the generation of the connection that holds the lease.
        """
        payload = padded_json({"map": command})
        with self._lock:
            self._release_some()
            for _ in range(MAX_RENEWALS):
                try:
                    return self._map_again(payload)
                except errors.LeaseOverdue as overdue:
                    # Whoever asks for more still uses what there is.
                    self._renew_overdue(overdue)
            return self._map_again(payload)

    def _map_again(self, payload: bytes):
        if self._socket is None:
            self._connect()
        try:
            return self._map(payload)
        except ConnectionLost:
            self._connect()
            return self._map(payload)

    def _renew_overdue(self, overdue: errors.LeaseOverdue) -> None:
        """Renews the lease that the server named."""
        lease = overdue.details.get("lease")
        if not isinstance(lease, int):
            raise overdue
        # Released meanwhile, or ended with its connection.
        with contextlib.suppress(errors.InvalidArgument, ConnectionLost):
            self._ask(RENEW, b"", lease)

    def _map(self, payload: bytes):
        descriptors: list[int] = []
        try:
            self._send(MAP, payload)
            kind, detail, size, frame = self._receive(4096, descriptors)
            if kind != MAPPED:
                raise ProtocolError(f"MAP was answered by a frame of kind {kind}")
            info = json.loads(frame.slice(HEADER_BYTES, detail).to_pybytes())
            schemas_at = HEADER_BYTES + detail
            stored = read_schemas(frame, schemas_at, size - detail)[0]
            sent: dict[int, list[pa.RecordBatch]] = {}
            while True:
                # Only the header may be read ahead: the next frame follows without being asked for.
                kind, detail, size, buffer = self._receive(HEADER_BYTES)
                if kind == END:
                    return info, frame, schemas_at, descriptors, sent, self.generation
                if kind != BATCH:
                    raise ProtocolError(f"a frame of kind {kind} within the reply to MAP")
                batch = _read_batch(buffer.slice(HEADER_BYTES, size), stored)
                sent.setdefault(detail, []).append(batch)
        except BaseException as error:
            for number in descriptors:
                os.close(number)
            if isinstance(error, errors.PinionError) and not isinstance(error, ProtocolError):
                raise  # an ERROR frame: the connection goes on
            self._hang_up()
            if isinstance(error, TimeoutError):
                raise errors.DeadlineExceeded(f"no reply within {self.timeout} s", "CLIENT_TIMEOUT") from error
            if isinstance(error, OSError):
                raise ConnectionLost(f"the connection to {self.path} broke: {error}") from error
            raise

    def ended(self, generation: int, number: int, what: int) -> None:
        """Tells the server, now or with the next request, that a handle or a lease is not used any more.

        Called by finalizers, so at any time and on any thread: it never waits for the lock.
        """
        self._ended.append((os.getpid(), generation, number, what))
        if self._lock.acquire(blocking=False):
            try:
                self._release_ended()
            except errors.PinionError:
                pass  # the connection is gone, and the lease with it
            finally:
                self._lock.release()

    def _release_some(self) -> None:
        """Releases what ended meanwhile. If the connection breaks at that, what was asked before still holds."""
        if self._ended:
            with contextlib.suppress(errors.PinionError):
                self._release_ended()

    def _release_ended(self) -> None:
        while self._ended:
            pid, generation, number, what = self._ended.popleft()
            if pid == os.getpid() and generation == self.generation and self._socket is not None:
                try:
                    self._ask(RELEASE, b"", number, what)
                except errors.InvalidArgument:
                    pass

    def renew(self, generation: int, lease: int) -> dict[str, Any]:
        """Starts a lease's term anew."""
        with self._lock:
            if generation != self.generation or self._socket is None:
                raise errors.FailedPrecondition("the connection that held this lease is gone", "LEASE_GONE")
            _, _, size, buffer = self._ask(RENEW, b"", lease)
            return json.loads(buffer.slice(HEADER_BYTES, size).to_pybytes())["lease"]

    # -- pins

    def pin(self, pin: str) -> tuple[dict[str, Any], pa.Schema, pa.Schema, list[int], int]:
        """A pin's slots, lent by descriptor: PIN.

        Returns PINNED's JSON, the stored and the result schema, the descriptors (the caller closes them), and
        the generation of the connection, which holds the mapping.
        """
        payload = padded_json({"pin": {"pin": pin}})
        with self._lock:
            if self._socket is None:
                self._connect()
            try:
                return self._pin(payload)
            except ConnectionLost:
                self._connect()
                return self._pin(payload)

    def _pin(self, payload: bytes) -> tuple[dict[str, Any], pa.Schema, pa.Schema, list[int], int]:
        descriptors: list[int] = []
        try:
            kind, detail, size, frame = self._ask(PIN, payload, descriptors=descriptors)
            if kind != PINNED:
                raise ProtocolError(f"PIN was answered by a frame of kind {kind}")
            info = json.loads(frame.slice(HEADER_BYTES, detail).to_pybytes())
            stored, result = read_schemas(frame, HEADER_BYTES + detail, size - detail)
            return info, stored, result, descriptors, self.generation
        except BaseException:
            for number in descriptors:
                os.close(number)
            raise

    def ask_on(
        self, generation: int, kind: int, payload: Any = b"", detail: int = 0, flags: int = 0
    ) -> tuple[int, int, int, pa.Buffer]:
        """One request on the very connection that holds what it names; raises `LeaseGone` if that is gone."""
        with self._lock:
            return self._ask_on(generation, kind, payload, detail, flags)

    def _ask_on(
        self, generation: int, kind: int, payload: Any, detail: int, flags: int
    ) -> tuple[int, int, int, pa.Buffer]:
        if generation != self.generation or self._socket is None:
            raise errors.LeaseGone("the connection that held this pin is gone", "LEASE_GONE")
        try:
            return self._ask(kind, payload, detail, flags)
        except ConnectionLost as error:
            raise errors.LeaseGone(error.message, "LEASE_GONE") from error

    def action(self, name: str, body: dict[str, Any]) -> Any:
        """Flight's DoAction."""
        kind, _, size, buffer = self.request(ACTION, padded_json({"action": name, "body": body}))
        if kind != RESULT:
            raise ProtocolError(f"ACTION was answered by a frame of kind {kind}")
        return json.loads(buffer.slice(HEADER_BYTES, size).to_pybytes())


def marked(batch: pa.RecordBatch, about: dict[str, Any]) -> pa.RecordBatch:
    """A reply with what the server said of it."""
    if not about.get("partial"):
        return batch
    metadata = {**(batch.schema.metadata or {}), b"pinion.partial": b"true"}
    return batch.replace_schema_metadata(metadata)


def note_size(sizes: dict[int, int], rows: int, total: int) -> None:
    """Remembers about how long a reply to so many keys is. Strings vary: some room on top."""
    if len(sizes) > 4096:
        sizes.clear()
    # Read once: other threads clear it.
    known = sizes.get(rows, 0)
    if known < total or known > 2 * total + 4096:
        sizes[rows] = (total + total // 16 + 63) // 64 * 64


def read_schemas(buffer: pa.Buffer, start: int, size: int) -> list[pa.Schema]:
    """The two IPC schema messages at an offset: stored schema, result schema."""
    reader = pa.BufferReader(buffer.slice(start, size))
    return [pa.ipc.read_schema(reader), pa.ipc.read_schema(reader)]


def to_schema(rows: Any, schema: pa.Schema) -> Any:
    """A batch or table in the result schema: dictionaries encoded, all else as it is."""
    columns = [
        column if column.type == field.type else encode_dictionaries(column, field.type)
        for column, field in zip(rows.columns, schema)
    ]
    kind = pa.RecordBatch if isinstance(rows, pa.RecordBatch) else pa.Table
    return kind.from_arrays(columns, schema=schema)


def encode_dictionaries(column: Any, wanted: pa.DataType) -> Any:
    """A column whose plain values are to be dictionaries, at whatever depth."""
    if isinstance(column, pa.ChunkedArray):
        chunks = [encode_dictionaries(chunk, wanted) for chunk in column.chunks]
        return pa.chunked_array(chunks, type=wanted)
    if column.type == wanted:
        return column
    if pa.types.is_dictionary(wanted):
        encoded = column.dictionary_encode()
        return pa.DictionaryArray.from_arrays(
            encoded.indices.cast(wanted.index_type),
            encode_dictionaries(encoded.dictionary, wanted.value_type),
            ordered=wanted.ordered,
        )
    if pa.types.is_struct(wanted):
        children = [encode_dictionaries(column.field(i), wanted.field(i).type) for i in range(wanted.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(wanted), mask=_nulls(column))
    if pa.types.is_list(wanted) or pa.types.is_large_list(wanted):
        kind = pa.LargeListArray if pa.types.is_large_list(wanted) else pa.ListArray
        if column.offset:
            # pyarrow refuses nulls beside offsets that do not start at the beginning.
            column = pa.concat_arrays([column, column.slice(0, 0)])
        items = encode_dictionaries(column.values, wanted.value_type)
        return kind.from_arrays(column.offsets, items, type=wanted, mask=_nulls(column))
    if pa.types.is_fixed_size_list(wanted):
        length = wanted.list_size
        values = column.values.slice(column.offset * length, len(column) * length)
        items = encode_dictionaries(values, wanted.value_type)
        return pa.FixedSizeListArray.from_arrays(items, type=wanted, mask=_nulls(column))
    return column.cast(wanted)


def _nulls(column: pa.Array) -> pa.Array | None:
    return column.is_null() if column.null_count else None
