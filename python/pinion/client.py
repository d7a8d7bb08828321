"""One client for both ways to a server."""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import pyarrow as pa

from pinion import barrier, errors
from pinion.barrier import Wait
from pinion.flight import Exchange, Flight, StreamEnded
from pinion.lane import Lane, Prepared, padded_json
from pinion.mapped import MappedTable, map_table
from pinion.pin import Pin, PinLane

Keys = pa.RecordBatch | pa.Table | Mapping[str, Any]
"""Key columns by name: a batch, a table, or `{"origin": ["EWR", "JFK"]}` (lists or Arrow arrays)."""

Local = Literal["auto"] | bool

_NO_SCHEMA = pa.schema([])

# Lookups that a client keeps prepared for calls of `lookup`.
MAX_KEPT = 128

# How long `lookup` goes on with the version of a service that was the newest.
SERVICE_SECONDS = 5.0

_locked: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # A thread that held one of these does not exist here.
    for owner in list(_locked):
        owner._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def connect(
    url: str | None = None,
    *,
    flight: str | None = None,
    lane: str | None = None,
    timeout: float | None = None,
    spin_micros: int = 0,
) -> Client:
    """Connects to a server.

    `url` is `grpc://HOST:PORT`, `grpc+unix:///PATH` or `lane:///PATH`; `flight` and `lane` say the same by
    name. With both, each call takes the faster. `timeout` bounds each reply, in seconds, the server's waiting
    for `wait` included. `spin_micros`: how long a lane lookup looks for its reply before it sleeps; it answers sooner and keeps a core busy.

    Raises `ConnectionLost` if no lane answers, `PeerRefused` if it is not open to this user. A Flight
    connection is made by the first call that needs it.
    """
    return Client(url, flight=flight, lane=lane, timeout=timeout, spin_micros=spin_micros)


def is_partial(reply: pa.RecordBatch) -> bool:
    """Whether a lookup's deadline passed before all keys were looked for."""
    return (reply.schema.metadata or {}).get(b"pinion.partial") == b"true"


class Client:
    """A server's tables. Threads may share a client; requests over the lane take turns.

    After a fork the child's lane connects anew by itself; its Flight refuses to be used, because gRPC would
    hang there. Use it as a context manager, or `close` it.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        flight: str | None = None,
        lane: str | None = None,
        timeout: float | None = None,
        spin_micros: int = 0,
    ):
        if url is not None:
            if url.startswith("lane:"):
                lane = lane or url
            else:
                flight = flight or url
        if flight is None and lane is None:
            raise ValueError("give a server: grpc://HOST:PORT, grpc+unix:///PATH or lane:///PATH")
        self._lane = None if lane is None else Lane(_lane_path(lane), timeout, spin_micros)
        self._flight = None if flight is None else Flight(_flight_url(flight), timeout)
        self._lookups: dict[bytes, Lookup] = {}
        self._pin_lane: PinLane | None = None
        self._pins: weakref.WeakSet[Pin] = weakref.WeakSet()
        self._lock = threading.Lock()
        _locked.add(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up. Mapped tables stay readable; their leases end.

        Pins lease nothing more. What their views gave out keeps its lease, and the connection for it, to its end.
        """
        for lookup in self._lookups.values():
            lookup.close()
        self._lookups.clear()
        for pin in list(self._pins):
            pin.close()
        if self._pin_lane is not None:
            self._pin_lane.releaser.close()
        if self._lane is not None:
            self._lane.close()
        if self._flight is not None:
            self._flight.close()

    # -- lookups

    def lookup(
        self,
        features: Iterable[str] | None = None,
        keys: Keys | None = None,
        *,
        service: str | None = None,
        as_of: Any = None,
        status: bool = False,
        event_time: bool = False,
        full_feature_names: bool = False,
        keep_expired: bool = False,
        defaults: bool = False,
        deadline_ms: int | None = None,
        max_message_bytes: int | None = None,
        wait: Wait | None = None,
        wait_timeout: float | None = None,
    ) -> pa.RecordBatch:
        """The values of `features` (`"table:feature"`), or of a feature `service`, for each key.

        Returns as many rows as keys, in their order: the key columns, the features in the order asked, then
        `<feature>__status` (`PRESENT`, `NULL_VALUE`, `NOT_FOUND`, `OUTSIDE_MAX_AGE`) and
        `<feature>__event_time` columns if wanted. A key that is not there is a row of nulls. `as_of` is a
        time (RFC 3339, or a datetime). Every call reads the newest rows.

        `defaults` reads the defaults of features where a value would be null. With `deadline_ms`, keys that
        were not looked for by then are `NOT_READ`, and `pinion.is_partial` of the reply is true.

        `max_message_bytes` is the largest reply, 65,536 to 2 GiB - 1: one over it raises `ResourceExhausted`
        with both sizes. When None it is 4 MiB - 64 KiB over Flight, 2 GiB - 1 over the lane, unless the server
        is configured otherwise.

        `wait` names records or puts that the answer must have seen (`pinion.Offsets`, a topic's offsets, what
        `put` returned, or a list of these): the server answers as soon as it has, or raises
        `DeadlineExceeded` after `wait_timeout` seconds (5 when None, 60 at most), with the positions reached
        in its details. `FailedPrecondition` says that a topic feeds none of the tables, or is not being read.

        The lookup is prepared once per set of arguments, and kept: `prepare` saves finding it again. A `service`
        without a version is its newest, which is looked for anew every five seconds.
        """
        command = _lookup_command(
            features,
            service,
            as_of,
            status=status,
            event_time=event_time,
            full_feature_names=full_feature_names,
            keep_expired=keep_expired,
            defaults=defaults,
            deadline_ms=deadline_ms,
            max_message_bytes=max_message_bytes,
        )
        lookup = self._lookups.get(command) or self._kept(command)
        if service is not None and "@" not in service and time.monotonic() - lookup.settled_at > SERVICE_SECONDS:
            lookup.close()
        keys = _key_batch(keys)
        try:
            return lookup.lookup(keys, wait=wait, wait_timeout=wait_timeout)
        except errors.DefinitionChanged:
            # Nobody holds this lookup but us: the new definition is as good.
            lookup.close()
            return lookup.lookup(keys, wait=wait, wait_timeout=wait_timeout)

    def _kept(self, command: bytes) -> Lookup:
        """A new lookup, kept for the next call with the same arguments."""
        with self._lock:
            if len(self._lookups) >= MAX_KEPT:
                self._lookups.pop(next(iter(self._lookups))).close()
            return self._lookups.setdefault(command, Lookup(self._lane, self._flight, command))

    def prepare(
        self,
        features: Iterable[str] | None = None,
        *,
        service: str | None = None,
        as_of: Any = None,
        status: bool = False,
        event_time: bool = False,
        full_feature_names: bool = False,
        keep_expired: bool = False,
        defaults: bool = False,
        deadline_ms: int | None = None,
        max_message_bytes: int | None = None,
        wait: Wait | None = None,
        wait_timeout: float | None = None,
    ) -> Lookup:
        """A lookup to run many times; arguments as for `lookup`. It is settled by its first keys.

        With `wait` every run of it waits for that; to wait for something else each time, say it to the run.
        """
        command = _lookup_command(
            features,
            service,
            as_of,
            status=status,
            event_time=event_time,
            full_feature_names=full_feature_names,
            keep_expired=keep_expired,
            defaults=defaults,
            deadline_ms=deadline_ms,
            max_message_bytes=max_message_bytes,
            **barrier.members(wait, wait_timeout),
        )
        return Lookup(self._lane, self._flight, command)

    # -- scans

    def scan(
        self,
        table: str,
        features: Iterable[str] | None = None,
        *,
        filter: str | None = None,
        limit: int | None = None,
        view: Literal["latest", "history"] | None = None,
        snapshot: str | None = None,
        wait: Wait | None = None,
        wait_timeout: float | None = None,
        local: Local = "auto",
    ) -> pa.Table:
        """The rows of a table: `features` (all columns when None) of those that pass `filter` (SQL).

        `view="latest"` is one row per key, `"history"` every version kept; None the whole table as it is
        kept. `snapshot` reads one named by an earlier reply. `wait` and `wait_timeout`: see `lookup`.

        `local=True` maps the server's files instead of receiving rows (`map`), `False` reads over Flight,
        `"auto"` maps when there is a lane, the whole table is asked for, and mapped files may hold that much more
        disk (`LeasedMaxBytes`). The rows are the same.
        """
        command = _scan_command(table, features, filter, limit, view, snapshot, wait, wait_timeout)
        mapped = self._mapped(local, command)
        return self._over_flight().scan(command) if mapped is None else mapped.table

    def scan_batches(
        self,
        table: str,
        features: Iterable[str] | None = None,
        *,
        filter: str | None = None,
        limit: int | None = None,
        view: Literal["latest", "history"] | None = None,
        snapshot: str | None = None,
        wait: Wait | None = None,
        wait_timeout: float | None = None,
        local: Local = "auto",
    ) -> pa.RecordBatchReader:
        """As `scan`, batch by batch: a table over Flight need not fit in memory."""
        command = _scan_command(table, features, filter, limit, view, snapshot, wait, wait_timeout)
        mapped = self._mapped(local, command)
        if mapped is not None:
            return mapped.table.to_reader()
        schema, batches = self._over_flight().scan_batches(command)
        return pa.RecordBatchReader.from_batches(schema, batches)

    def map(
        self,
        table: str,
        features: Iterable[str] | None = None,
        *,
        snapshot: str | None = None,
        wait: Wait | None = None,
        wait_timeout: float | None = None,
    ) -> MappedTable:
        """A snapshot of a table, mapped from the server's files over the local lane.

        Time and memory do not depend on the table's size, but for rows of the log and batches that hold
        replaced rows. Raises `LeasedMaxBytes` when mapped files hold too much disk already.
        """
        command = _scan_command(table, features, None, None, None, snapshot, wait, wait_timeout)
        return map_table(self._over_lane(), command)

    # -- pins

    def pin(
        self,
        table: str,
        features: Iterable[str] | None = None,
        *,
        device: int | str | None = None,
        mode: Literal["fresh", "frozen"] = "fresh",
        layout: Literal["auto", "segments", "columns"] = "auto",
        slots: int | None = None,
        max_slots: int | None = None,
        name: str | None = None,
    ) -> Pin:
        """Pins a table, or `features` of it, in the memory of a device, and imports it here: over the local lane.

        `device` is the server's number of a GPU, a UUID (`"GPU-…"`), or `"host"`: shared memory, which needs no GPU;
        None is the server's choice. A `fresh` pin follows the table, in `slots` copies (2) that the server may let
        grow to `max_slots`; a `frozen` one stays as it is. A pin of this `name` (the table's) that is there already
        and is the same is used; one that differs is `FailedPrecondition`.

        A frozen pin on the host of a table that lies in segments as it is (after a load or a merge, with nothing written
        since) is lent: its `layout` is `segments`, the table's own files, and nothing is copied; `Pin.form` says which it
        became. `columns` asks for a copy in any case; `segments` raises `FailedPrecondition`, with what is in the way,
        where there would be one.

        Returns when the pin is loaded. It stays until `unpin`, also when this client ends. Raises
        `ResourceExhausted` when the device's budget is spent, `DeviceUnavailable` when this process cannot use
        the device.
        """
        body = _named(
            table=table,
            features=[features] if isinstance(features, str) else None if features is None else list(features),
            device=device,
            mode=mode,
            layout=None if layout == "auto" else layout,
            slots=slots,
            max_slots=max_slots,
            name=name,
        )
        self._over_lane()

        def again() -> str:
            return self.action("pin", body)["pin"]

        room = self._pin_room()
        pin = Pin(room, again(), again)
        self._pins.add(pin)
        return pin

    def unpin(self, pin: Pin | str) -> None:
        """Ends a pin (by object, id or name) for everybody. Views that are leased stay good until they end."""
        named = pin
        if isinstance(pin, Pin):
            named = pin.id
            pin.close()
        self.action("unpin", {"pin": named})

    def pins(self) -> list[dict[str, Any]]:
        """Every pin of the server: where it lies, its generation, its bytes, and who holds leases."""
        return self.action("pins")["pins"]

    def _pin_room(self) -> PinLane:
        """The connection that holds this process's pins."""
        with self._lock:
            if self._pin_lane is None or self._pin_lane.pid != os.getpid():
                lane = self._over_lane()
                self._pin_lane = PinLane(lane.path, lane.timeout)
            return self._pin_lane

    # -- writing

    def put(self, table: str, rows: Any, *, id: str | None = None) -> dict[str, Any]:
        """Writes whole rows: one commit, all or nothing.

        `rows` is a Table or RecordBatch, sent as it is, or `{column: values}`, whose values take the types of
        the table's columns.

        Returns once they are visible and on disk: `rows`, `applied` (False when a put of this `id` was
        applied before), and `token`, which a reader may wait for.
        """
        flight = self._over_flight()
        return flight.put(_named(table=table, id=id), _rows(rows, flight, table))

    def delete(self, table: str, keys: Any, *, id: str | None = None) -> dict[str, Any]:
        """Deletes keys (key columns, and optionally the event time of the delete). As `put`."""
        flight = self._over_flight()
        return flight.put(_named(table=table, id=id, mode="delete"), _rows(keys, flight, table))

    # -- administration

    def tables(self) -> list[dict[str, Any]]:
        """Every table: its name, definition (TOML), positions and figures."""
        return self.action("describe")["tables"]

    def leases(self) -> list[dict[str, Any]]:
        """Who holds mapped files: `pid`, `uid`, `table`, `snapshot`, `bytes`, `age_seconds`, `overdue`."""
        return self.action("leases")["leases"]

    def action(self, name: str, body: Mapping[str, Any] | None = None) -> Any:
        """An action of docs/protocol.md, such as `action("stats", {"table": "weather"})`."""
        way = self._flight if self._lane is None else self._lane
        return way.action(name, dict(body or {}))

    # -- which way

    def _mapped(self, local: Local, command: dict[str, Any]) -> MappedTable | None:
        """The table of a scan, mapped. None if it is to be read over Flight."""
        if local is False:
            return None
        whole = not command.keys() & {"filter", "limit", "view"}
        if local is True:
            if not whole:
                raise ValueError("a mapped table is whole: leave filter, limit and view out, or read over Flight")
            return map_table(self._over_lane(), command)
        if self._flight is None and not whole:
            raise ValueError("filters, limits and views are answered over Flight: connect with flight=... too")
        if not whole or self._lane is None:
            return None
        try:
            return map_table(self._lane, command)
        except (errors.LeaseOverdue, errors.ResourceExhausted):
            # There is room in this process for what may not be kept on disk.
            if self._flight is None:
                raise
            return None

    def _over_flight(self) -> Flight:
        if self._flight is None:
            raise ValueError("this is answered over Flight: connect with flight='grpc://HOST:PORT' too")
        return self._flight

    def _over_lane(self) -> Lane:
        if self._lane is None:
            raise ValueError("this is answered over the local lane: connect with lane='lane:///PATH' too")
        return self._lane


class Lookup:
    """A lookup that is settled once and run many times: by `Client.prepare`.

    Threads may share it. Over the lane it survives a restart of the server and a fork; over Flight it
    holds one open stream, which it opens again when it broke.
    """

    def __init__(self, lane: Lane | None, flight: Flight | None, command: bytes):
        self._lane = lane
        self._flight = flight
        self._command = command
        # The one used last, nearly always the next. Set and read as one: threads may differ in schema.
        self._last: tuple[pa.Schema, Any] = (_NO_SCHEMA, None)
        self._ways: list[tuple[pa.Schema, Any]] = []
        self._lock = threading.Lock()
        # When it was last settled after it was closed or made.
        self.settled_at = time.monotonic()
        _locked.add(self)

    def lookup(
        self, keys: Keys, *, wait: Wait | None = None, wait_timeout: float | None = None
    ) -> pa.RecordBatch:
        """Looks keys up: see `Client.lookup`.

        Fastest with a RecordBatch whose schema does not change between calls. Raises `DefinitionChanged`
        when a feature changed its type, or its table was dropped, since it was prepared: prepare anew.
        With `wait` it is settled on the server for this one run: a few tens of microseconds over the lane, a
        stream of its own over Flight.
        """
        if not isinstance(keys, pa.RecordBatch):
            keys = _key_batch(keys)
        if wait is not None:
            return self._once(keys, wait, wait_timeout)
        schema = keys.schema
        known, way = self._last
        if schema is not known and not schema.equals(known) or way is None:
            way = self._settle(schema)
        if self._lane is not None:
            return self._lane.lookup(way, keys)
        return self._exchange(way, keys)

    __call__ = lookup

    def _once(self, keys: pa.RecordBatch, wait: Wait, wait_timeout: float | None) -> pa.RecordBatch:
        """One run of this lookup that also waits for `wait`."""
        command = json.loads(self._command)
        prepared = command["lookup"]
        prepared.update(barrier.members([prepared.get("at_least"), prepared.get("token"), wait], wait_timeout))
        way = Lookup(self._lane, self._flight, padded_json(command))
        try:
            return way.lookup(keys)
        finally:
            way.close()

    def info(self) -> dict[str, Any]:
        """The snapshots that were current when it was prepared (over the lane; else empty)."""
        return dict(getattr(self._last[1], "info", {}))

    def close(self) -> None:
        """Ends it on the server too. It may still be used: that prepares it again."""
        with self._lock:
            ways, self._ways, self._last = self._ways, [], (_NO_SCHEMA, None)
        for _, way in ways:
            try:
                if self._lane is not None:
                    self._lane.release(way)
                else:
                    way.close()
            except errors.PinionError:
                pass  # what is gone has ended

    def _settle(self, schema: pa.Schema) -> Any:
        with self._lock:
            way = next((way for known, way in self._ways if known.equals(schema)), None)
            if way is None:
                if not self._ways:
                    self.settled_at = time.monotonic()
                if self._lane is not None:
                    way = Prepared(self._command, schema)
                    self._lane.prepare(way)
                else:
                    way = self._over_flight(schema)
                self._ways.append((schema, way))
            self._last = (schema, way)
        return way

    def _over_flight(self, schema: pa.Schema) -> Exchange:
        return self._flight.exchange(self._command.rstrip(), schema)

    def _exchange(self, way: Exchange, keys: pa.RecordBatch) -> pa.RecordBatch:
        failed = False
        while True:
            if way.broken:
                # An error ends a Flight stream, not the lookup.
                way = self._replace(way, keys.schema)
            try:
                return way.lookup(keys)
            except StreamEnded:
                pass  # nothing was asked: it broke, or was closed, in another thread
            except errors.Unavailable:
                if failed:
                    raise
                failed = True

    def _replace(self, broken: Exchange, schema: pa.Schema) -> Exchange:
        with self._lock:
            self._ways = [(known, way) for known, way in self._ways if way is not broken]
            self._last = (_NO_SCHEMA, None)
        broken.close()
        return self._settle(schema)


def _lane_path(url: str) -> str:
    path = url.removeprefix("lane://") if url.startswith("lane://") else url
    if not path.startswith("/"):
        raise ValueError(f"{url!r} is no local lane: write lane:///PATH")
    return path


def _flight_url(url: str) -> str:
    return url if "://" in url else f"grpc://{url}"


def _named(**members: Any) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _time(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return value.isoformat()


def _lookup_command(features: Any, service: Any, as_of: Any, **members: Any) -> bytes:
    if isinstance(features, str):
        features = [features]
    command = _named(
        features=None if features is None else list(features),
        service=service,
        as_of=_time(as_of),
        # What is false is as if it was not said.
        **{name: None if value is False else value for name, value in members.items()},
    )
    return padded_json({"lookup": command})


def _scan_command(
    table: str,
    features: Any,
    filter: Any,
    limit: Any,
    view: Any,
    snapshot: Any,
    wait: Any,
    wait_timeout: Any,
) -> dict[str, Any]:
    if isinstance(features, str):
        features = [features]
    return _named(
        table=table,
        features=None if features is None else list(features),
        filter=filter,
        limit=limit,
        view=view,
        snapshot=snapshot,
        **barrier.members(wait, wait_timeout),
    )


def _key_batch(keys: Any) -> pa.RecordBatch:
    if isinstance(keys, pa.RecordBatch):
        return keys
    if isinstance(keys, pa.Table):
        batches = keys.combine_chunks().to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=keys.schema)
    if isinstance(keys, Mapping):
        return pa.RecordBatch.from_pydict(dict(keys))
    raise TypeError(f"keys are a RecordBatch, a Table or {{column: values}}, not {type(keys).__name__}")


def _rows(rows: Any, flight: Flight, table: str) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, pa.RecordBatch):
        return pa.Table.from_batches([rows])
    if isinstance(rows, Mapping):
        schema = flight.schema(table)
        types = {name: schema.field(name).type for name in schema.names}
        # A column that the table does not have is the server's to refuse.
        columns = {
            name: values if isinstance(values, (pa.Array, pa.ChunkedArray)) else _column(values, types.get(name))
            for name, values in rows.items()
        }
        return pa.table(columns)
    raise TypeError(f"rows are a Table, a RecordBatch or {{column: values}}, not {type(rows).__name__}")


def _column(values: Any, data_type: pa.DataType | None) -> pa.Array:
    if data_type is not None and pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    try:
        return pa.array(values, data_type)
    except pa.ArrowInvalid as error:
        raise errors.InvalidArgument(f"values that are no {data_type}: {error}", "SCHEMA") from error
