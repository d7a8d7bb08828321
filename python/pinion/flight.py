"""Arrow Flight (docs/protocol.md), with the server's error details as typed exceptions."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import pyarrow as pa
from pyarrow import flight

from pinion import errors
from pinion.lane import marked

_CODES = {
    "cancelled": 1,
    "invalid argument": 3,
    "timed out": 4,
    "deadline exceeded": 4,
    "not found": 5,
    "permission denied": 7,
    "unauthorized": 7,
    "resource exhausted": 8,
    "failed precondition": 9,
    "precondition failed": 9,
    "aborted": 10,
    "unimplemented": 12,
    "internal": 13,
    "unavailable": 14,
    "data loss": 15,
}

# About how much of a put goes into one message.
MESSAGE_BYTES = 2 << 20

# What a scan that is read at once may send in one message. pyarrow takes any, and glibc's allocator gives memory back to the system all the
# time beside smaller ones (docs/protocol.md).
SCAN_MESSAGE_BYTES = (32 << 20) - (64 << 10)

_details = threading.local()

# The process that gRPC's threads run in, once there are any.
_process: int | None = None


def _check_process() -> None:
    """gRPC in a child that was forked beside its threads waits for ever: that is said instead."""
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise errors.FailedPrecondition(
            "Flight (gRPC) cannot be used in a process forked from one that used it: use the local lane, or"
            " start processes by 'spawn'",
            "FORKED",
        )


class _Details(flight.ClientMiddlewareFactory):
    """Keeps the details that come with an error: pyarrow shows its message only."""

    def start_call(self, info):
        _details.last = None
        return _Listener()


class _Listener(flight.ClientMiddleware):
    def received_headers(self, headers):
        for name in ("pinion-error-bin", b"pinion-error-bin"):
            values = headers.get(name)
            if values:
                _details.last = values[0]


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raises pyarrow's errors as `PinionError`s."""
    try:
        yield
    except errors.PinionError:
        raise
    except (flight.FlightError, pa.ArrowException) as error:
        raise of_flight(error) from error


def of_flight(error: Exception) -> errors.PinionError:
    """The exception for one of pyarrow's."""
    raw, _details.last = getattr(_details, "last", None), None
    details: dict[str, Any] = {}
    if raw:
        with contextlib.suppress(ValueError):
            details = json.loads(raw)
    text = str(error)
    # "Flight returned not found error, with message: ...": the code, then the server's words.
    head, _, rest = text.partition(", with message: ")
    code = 2
    if rest:
        head = head.lower()
        code = next((number for name, number in _CODES.items() if name in head), 2)
        text = rest.split(". gRPC client debug context:")[0].split(". Client context:")[0]
    if code == 2:
        code = _code_of_class(error)
    if code == 14 and not details:
        return errors.ConnectionLost(text)
    return errors.of_code(code, text, details)


def _code_of_class(error: Exception) -> int:
    for kind, code in (
        (flight.FlightTimedOutError, 4),
        (flight.FlightUnavailableError, 14),
        (flight.FlightUnauthorizedError, 7),
        (flight.FlightCancelledError, 1),
        (flight.FlightInternalError, 13),
        (pa.ArrowKeyError, 5),
        (pa.ArrowNotImplementedError, 12),
        (pa.ArrowCancelled, 1),
        (pa.ArrowInvalid, 3),
    ):
        if isinstance(error, kind):
            return code
    return 2


class Flight:
    """A connection over Flight. Threads may share it."""

    def __init__(self, url: str, timeout: float | None = None):
        _check_process()
        with translated():
            self._connected = flight.connect(url, middleware=[_Details()])
        self._timeout = timeout
        self._options = flight.FlightCallOptions(timeout=timeout) if timeout else flight.FlightCallOptions()

    @property
    def _client(self) -> flight.FlightClient:
        _check_process()
        return self._connected

    def close(self) -> None:
        if _process == os.getpid():
            self._connected.close()

    def schema(self, table: str) -> pa.Schema:
        """The columns of a table."""
        with translated():
            return self._client.get_schema(flight.FlightDescriptor.for_path(table), self._options).schema

    def scan(self, command: dict[str, Any]) -> pa.Table:
        """All rows of a scan."""
        with translated():
            return self._client.do_get(_scan_ticket(command), self._options).read_all()

    def scan_batches(self, command: dict[str, Any]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """The schema of a scan, and its batches as they come."""
        with translated():
            reader = self._client.do_get(_ticket("scan", command), self._options)
            schema = reader.schema

        def batches() -> Iterator[pa.RecordBatch]:
            while True:
                with translated():
                    try:
                        chunk = reader.read_chunk()
                    except StopIteration:
                        return
                if chunk.data is not None and chunk.data.num_rows:
                    yield chunk.data

        return schema, batches()

    def exchange(self, command: bytes, schema: pa.Schema) -> Exchange:
        """An open stream of lookups."""
        return Exchange(self._client, command, schema, self._timeout)

    def put(self, command: dict[str, Any], rows: pa.Table) -> dict[str, Any]:
        """One commit; returns its acknowledgement, which comes once the rows are on disk."""
        descriptor = _descriptor("put", command)
        last: dict[str, Any] = {}
        with translated():
            writer, results = self._client.do_put(descriptor, rows.schema, self._options)
            # The server takes messages of 64 MiB; a table may be one chunk of more.
            chunk_rows = max(1, rows.num_rows * MESSAGE_BYTES // max(rows.nbytes, 1))
            with writer:
                writer.write_table(rows, max_chunksize=chunk_rows)
                writer.done_writing()
                while (result := results.read()) is not None:
                    last = json.loads(result.to_pybytes())
        if not last.get("durable"):
            raise errors.Aborted("the put was not acknowledged: put it again with the same id", "NOT_ACKNOWLEDGED")
        return last

    def action(self, name: str, body: dict[str, Any]) -> Any:
        """DoAction: the JSON of its one result."""
        with translated():
            results = list(self._client.do_action(flight.Action(name, json.dumps(body).encode()), self._options))
        return json.loads(results[0].body.to_pybytes())


class StreamEnded(errors.ConnectionLost):
    """A stream that ended before a request was sent on it: another one can be opened."""


class Exchange:
    """One DoExchange stream: batches of keys in, batches of features out. Threads take turns."""

    def __init__(self, client: flight.FlightClient, command: bytes, schema: pa.Schema, timeout: float | None):
        self._lock = threading.Lock()
        self._ended = False
        # A request was sent whose reply nobody has read. Looked at under the lock: else it is another thread's turn.
        self._pending = False
        # gRPC's deadline is of the whole call, so a stream is replaced before its deadline comes near.
        self._stale_at = time.monotonic() + timeout if timeout else float("inf")
        options = flight.FlightCallOptions(timeout=2 * timeout) if timeout else flight.FlightCallOptions()
        with translated():
            self._writer, self._reader = client.do_exchange(flight.FlightDescriptor.for_command(command), options)
            try:
                self._writer.begin(schema)
            except Exception as error:
                self._fail(error)

    @property
    def broken(self) -> bool:
        """Whether a new stream must be opened. One that is in use is not."""
        return self._ended or time.monotonic() > self._stale_at

    def lookup(self, keys: pa.RecordBatch) -> pa.RecordBatch:
        """Looks keys up. Raises `StreamEnded`, also when the stream broke while other threads had their turns."""
        _check_process()
        with self._lock, translated():
            if self._pending:
                # Interrupted (Ctrl-C, say): its reply would be taken for this one's.
                self._ended = True
            if self.broken:
                raise StreamEnded("the stream of lookups ended")
            try:
                self._pending = True
                reply = self._exchange(keys)
                self._pending = False
            except BaseException:
                self._ended = True
                raise
            return reply

    def _exchange(self, keys: pa.RecordBatch) -> pa.RecordBatch:
        try:
            self._writer.write_batch(keys)
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            self._fail(error)
        while True:
            try:
                chunk = self._reader.read_chunk()
            except StopIteration:
                raise errors.ConnectionLost("the server ended the stream of lookups") from None
            if chunk.data is not None:
                about = chunk.app_metadata
                if about is not None and b'"partial"' in memoryview(about).tobytes():
                    return marked(chunk.data, json.loads(about.to_pybytes()))
                return chunk.data

    def _fail(self, error: Exception) -> NoReturn:
        """A write that failed says little: the reader knows why the stream ended."""
        self._ended = True
        try:
            self._reader.read_chunk()
        except StopIteration:
            raise errors.ConnectionLost("the server ended the stream of lookups") from error
        raise error

    def close(self) -> None:
        """Ends the stream, after the request under way."""
        with self._lock:
            self._ended = True
            with contextlib.suppress(Exception):
                self._writer.close()


def _scan_ticket(command: dict[str, Any]) -> flight.Ticket:
    return _ticket("scan", {"max_message_bytes": SCAN_MESSAGE_BYTES, **command})


def _ticket(verb: str, command: dict[str, Any]) -> flight.Ticket:
    return flight.Ticket(json.dumps({verb: command}).encode())


def _descriptor(verb: str, command: dict[str, Any]) -> flight.FlightDescriptor:
    return flight.FlightDescriptor.for_command(json.dumps({verb: command}).encode())
