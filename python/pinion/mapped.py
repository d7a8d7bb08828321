"""Mapped tables: a snapshot's files as a `pyarrow.Table`, without a copy.

Batches that are whole are used as they are mapped; those that hold replaced rows are cut at them, or the
kept rows copied out when they are many; what the server sent (rows of the log) comes behind. The result equals a Flight scan of the
same snapshot. The lease that comes with the files ends when nothing refers to them any more.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pinion import lane as wire

if TYPE_CHECKING:
    from pinion.lane import Lane

# A batch of which so few rows are left out is cut at them: slices cost microseconds, copying what is kept
# of 4 MiB milliseconds.
MAX_CUTS = 32

_ENTRY = struct.Struct("<IIII")


class MappedTable:
    """A snapshot of a table, mapped from the server's files.

    `table` is a `pyarrow.Table` whose rows, order and schema are those of a Flight scan of `snapshot`.
    Its buffers keep the files mapped: they, or anything computed from them without a copy, may outlive
    this object, the client and the server. The lease, which tells the server that the disk is in use,
    ends with the last of them.
    """

    def __init__(self, table: pa.Table, info: dict[str, Any], lease: _Lease, copied_bytes: int):
        self.table = table
        self.snapshot: str = info["snapshot"]
        self.positions: dict[str, Any] = info["positions"]
        self.definition_version: int = info["definition_version"]
        self.lease_id: int = info["lease"]["id"]
        self.leased_bytes: int = info["lease"]["bytes"]
        # Bytes that were filtered or received: nothing is mapped where they are.
        self.copied_bytes = copied_bytes
        self._lease = lease

    def renew(self) -> None:
        """Starts the lease's term anew: call it within the term when a table is used for longer.

        Mapping another table does it too, for leases that are past their term.
        """
        self._lease.renew()


class _Lease:
    """Ends the server's lease once every mapping of it is gone."""

    def __init__(self, lane: Lane, generation: int, lease: int):
        # Also for whoever keeps a table and no client: the lease ends with its connection.
        self._lane = lane
        self._pid = os.getpid()
        self._generation = generation
        self._id = lease
        # One for the time in which the table is made.
        self._left = 1
        self._lock = threading.Lock()

    def add(self, mapping: mmap.mmap) -> None:
        self._left += 1
        weakref.finalize(mapping, self.drop).atexit = False

    def drop(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        # A forked child has a copy of the mappings, and of this count; the lease is its parent's.
        if last and os.getpid() == self._pid:
            self._lane.ended(self._generation, self._id, wire.RELEASE_LEASE)

    def renew(self) -> None:
        if os.getpid() != self._pid:
            raise wire.errors.FailedPrecondition("the connection that held this lease is gone", "LEASE_GONE")
        self._lane.renew(self._generation, self._id)


def map_table(lane: Lane, command: dict[str, Any]) -> MappedTable:
    """Maps a table over the lane; `command` is the body of MAP."""
    info, frame, schemas_at, descriptors, sent, generation = lane.map(command)
    lease = _Lease(lane, generation, info["lease"]["id"])
    try:
        stored, result = wire.read_schemas(frame, schemas_at, frame.size - schemas_at)
        tables: list[pa.Table] = []
        copied_bytes = 0
        for number, part in enumerate(info["parts"]):
            if part["kind"] == "mapped":
                mapping = mmap.mmap(descriptors[part["descriptor"]], part["bytes"], mmap.MAP_SHARED, mmap.PROT_READ)
                lease.add(mapping)
                table, copied = open_part(pa.py_buffer(mapping), part, frame, stored)
                copied_bytes += copied
            else:
                batches = sent.get(number, ())
                copied_bytes += sum(batch.nbytes for batch in batches)
                table = pa.Table.from_batches(batches, stored)
            if table.num_rows:
                tables.append(table)
        table = pa.concat_tables(tables) if len(tables) > 1 else (tables or [stored.empty_table()])[0]
        if not result.equals(stored, check_metadata=True):
            table = wire.to_schema(table, result)
    finally:
        # mmap keeps descriptors of its own.
        for number in descriptors:
            os.close(number)
        lease.drop()
    return MappedTable(table, info, lease, copied_bytes)


def open_part(
    file: pa.Buffer, part: dict[str, Any], frame: pa.Buffer | None, stored: pa.Schema
) -> tuple[pa.Table, int]:
    """A part's kept rows in the stored schema, and how many bytes of them were copied.

    `frame` has the masks of dirty batches; a part without any needs none.
    """
    # All columns, whatever was asked: with `included_fields` pyarrow copies those it reads.
    reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False))
    select = None if reader.schema.names == stored.names else stored.names
    copied = 0
    if part["dirty"] == 0:
        table = reader.read_all()
    else:
        batches = []
        masks = _masks(part, frame)
        for number in range(reader.num_record_batches):
            mask = masks.get(number)
            if mask is None:
                batch = reader.get_batch(number)
                batches.append(batch if select is None else batch.select(select))
            elif mask[0]:
                batch = reader.get_batch(number)
                batch = batch if select is None else batch.select(select)
                if batch.num_rows - mask[0] <= MAX_CUTS:
                    batches.extend(_cut(batch, mask[1]))
                else:
                    batches.append(batch.filter(mask[1]))
                    copied += batches[-1].nbytes
        table = pa.Table.from_batches(batches, batches[0].schema) if batches else stored.empty_table()
    if table.schema.equals(stored, check_metadata=True):
        return table, copied
    # The same types; names in another order, or other notes on the fields.
    columns = [table.column(name) for name in stored.names]
    return pa.Table.from_arrays(columns, schema=stored), copied


def _cut(batch: pa.RecordBatch, mask: pa.BooleanArray) -> Iterator[pa.RecordBatch]:
    """The kept rows of a batch as slices of it."""
    start = 0
    for row in pc.indices_nonzero(pc.invert(mask)).to_pylist():
        if row > start:
            yield batch.slice(start, row - start)
        start = row + 1
    if start < batch.num_rows:
        yield batch.slice(start)


def _masks(part: dict[str, Any], frame: pa.Buffer) -> dict[int, tuple[int, pa.BooleanArray | None]]:
    """Batch number -> rows kept, and the mask that keeps them."""
    masks: dict[int, tuple[int, pa.BooleanArray | None]] = {}
    start = part["masks_offset"]
    for entry in range(part["dirty"]):
        number, rows, kept, place = _ENTRY.unpack_from(frame, start + entry * _ENTRY.size)
        mask = None
        if kept:
            bits = frame.slice(place * 64, (rows + 7) // 8)
            mask = pa.Array.from_buffers(pa.bool_(), rows, [None, bits])
        masks[number] = (kept, mask)
    return masks
