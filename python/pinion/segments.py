"""Files of a pin that is lent: a table's own segments, mapped, as chunks of columns.

Nothing is copied to map them. What is read out of them is: rows that are taken, and columns that are wanted as one
array although they lie in several batches, hold nulls, or are bools (which are bits in a file). A column that was made
one array is kept for as long as the files are, so that it is made once.

Elsewhere: views of them (`lent`), who is told when they are unmapped (`leases`).
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pinion.columns import typestr_of
from pinion.errors import ProtocolError
from pinion.mapped import open_part

Mask = "np.ndarray[Any, Any] | None"
"""True where there is a value; None is true everywhere."""


class Ending:
    """Calls `ended` once everything that was added is gone. Finalizers call `drop`: it takes no lock."""

    def __init__(self, ended: Callable[[], None]):
        self._ended = ended
        self._pid = os.getpid()
        self._left: list[None] = []

    def add(self, part: Any) -> None:
        self._left.append(None)
        weakref.finalize(part, self.drop).atexit = False

    def drop(self) -> None:
        self._left.pop()
        # A forked child has copies of the mappings; the pin is its parent's.
        if not self._left and os.getpid() == self._pid:
            self._ended()


class Rows(NamedTuple):
    """Row numbers, and where they lie."""

    missing: np.ndarray[Any, Any]
    # The batch of each row, counted through all files, and its place in it.
    chunk: np.ndarray[Any, Any]
    local: np.ndarray[Any, Any]
    # Which of them lie in which file: a slice for all, or places.
    by_file: list[tuple[int, Any]]


class Files:
    """The mapped files, and their rows one after the other."""

    def __init__(self, descriptors: list[int], parts: list[dict[str, Any]], stored: pa.Schema, ended: Callable[[], None]):
        """`ended` is called once nothing refers to these files any more, also if this raises."""
        ending = Ending(ended)
        ending.add(self)
        self._maps: list[mmap.mmap] = []
        tables = []
        for part in parts:
            number = part["descriptor"]
            if part["kind"] != "mapped" or part["dirty"] != 0 or not 0 <= number < len(descriptors):
                raise ProtocolError(f"part {part} is no whole file among {len(descriptors)} descriptors")
            file = mmap.mmap(descriptors[number], part["bytes"], mmap.MAP_SHARED, mmap.PROT_READ)
            ending.add(file)
            self._maps.append(file)
            table = open_part(pa.py_buffer(file), part, None, stored)[0]
            if table.num_rows != part["rows"]:
                raise ProtocolError(f"a file of {table.num_rows} rows where the server says {part['rows']}")
            tables.append(table)
        # Of each batch: its file, its first row, and its rows.
        self.chunks = [(file, batch) for file, table in enumerate(tables) for batch in table.to_batches()]
        self.lengths = np.array([batch.num_rows for _, batch in self.chunks], np.int64)
        ends = np.cumsum(self.lengths)
        self.starts = ends - self.lengths
        self.file_of = np.array([file for file, _ in self.chunks], np.int64)
        self.rows = int(ends[-1]) if len(ends) else 0
        # Its chunks are the batches.
        self.table: pa.Table = pa.Table.from_batches([batch for _, batch in self.chunks], stored)
        self._arrays: dict[tuple[int, str], np.ndarray[Any, Any]] = {}
        self._addresses = [pa.py_buffer(file).address for file in self._maps]
        self._columns: dict[str, Source] = {}
        self._matrices: dict[tuple[str, ...], np.ndarray[Any, Any]] = {}
        self._located: tuple[Any, Rows] | None = None

    def bytes_of(self, part: int) -> np.ndarray[Any, Any]:
        """All bytes of a file."""
        return self.array(part, "|u1")

    @property
    def count(self) -> int:
        return len(self._maps)

    def array(self, file: int, typestr: str) -> np.ndarray[Any, Any]:
        """A whole file as items of one type: what lies at a multiple of their width is one of them."""
        found = self._arrays.get((file, typestr))
        if found is None:
            size = len(self._maps[file])
            found = np.frombuffer(self._maps[file], typestr, size // int(typestr[2:]))
            self._arrays[file, typestr] = found
        return found

    def place(self, file: int, buffer: pa.Buffer, width: int) -> int:
        """Where in a file a buffer starts, in items of `width` bytes."""
        offset = buffer.address - self._addresses[file]
        if offset % width or not 0 <= offset <= len(self._maps[file]) - buffer.size:
            raise ProtocolError(f"a buffer at byte {offset} of a file, for items of {width} bytes")
        return offset // width

    def column(self, name: str) -> Source:
        """A column that is an array."""
        found = self._columns.get(name)
        if found is None:
            found = self._columns.setdefault(name, Source(self, name))
        return found

    def matrix(self, names: list[str]) -> np.ndarray[Any, Any]:
        """Columns of one type as one array `[rows, columns]`, each side by side. Made once."""
        key = tuple(names)
        found = self._matrices.get(key)
        if found is None:
            sources = [self.column(name) for name in names]
            made = np.empty((len(names), self.rows), sources[0].typestr)
            for source, out in zip(sources, made):
                source.fill(out)
            made.flags.writeable = False
            found = self._matrices.setdefault(key, made.T)
        return found

    def locate(self, rows: np.ndarray[Any, Any]) -> Rows:
        """Where rows lie; of missing ones anything, if there are rows at all."""
        # One array of numbers is asked for column by column.
        known = self._located
        if known is not None and known[0] is rows:
            return known[1]
        missing = (rows < 0) | (rows >= self.rows)
        numbers = np.where(missing, 0, rows) if missing.any() else rows
        chunk = np.searchsorted(self.starts, numbers, side="right") - 1
        files = self.file_of[chunk]
        present = np.unique(files)
        by_file: list[tuple[int, Any]] = [(int(file), np.flatnonzero(files == file)) for file in present]
        if len(by_file) == 1:
            by_file = [(by_file[0][0], slice(None))]
        found = Rows(missing, chunk, numbers - self.starts[chunk], by_file)
        self._located = (rows, found)
        return found


class _Level(NamedTuple):
    """Validity of rows, or of the items within them."""

    # Items of a row here.
    items: int
    shape: tuple[int, ...]
    nullable: bool
    # The bit of the first row in its file, for each chunk; -1 where all are valid.
    first: np.ndarray[Any, Any]


class Source:
    """One column over all chunks, as items of one type: numbers, bools, times, and fixed sizes of these."""

    def __init__(self, files: Files, name: str):
        # Whoever has a column has its files; a circle would keep them mapped until it is collected.
        self._files: Files = weakref.proxy(files)
        field = files.table.schema.field(name)
        sizes, nullable, leaf = _dig(field)
        typestr = "|u1" if pa.types.is_fixed_size_binary(leaf) else typestr_of(leaf)
        assert typestr is not None, "whoever asks has looked"
        self.typestr: str = typestr
        self._is_bool = pa.types.is_boolean(leaf)
        width = leaf.byte_width if pa.types.is_fixed_size_binary(leaf) else 1
        tail = (width,) if pa.types.is_fixed_size_binary(leaf) else ()
        self.shape: tuple[int, ...] = (*sizes, *tail)
        self._items = math.prod(self.shape)
        firsts: list[list[int]] = [[] for _ in nullable]
        base: list[int] = []
        self.null_count = [0] * len(nullable)
        for (file, batch), chunk in zip(files.chunks, files.table.column(name).chunks):
            array, at = chunk, chunk.offset
            for level, size in enumerate((*sizes, None)):
                bitmap = array.buffers()[0]
                nulls = array.null_count
                self.null_count[level] += nulls
                bits = -1 if bitmap is None or not nulls else 8 * files.place(file, bitmap, 1) + at
                firsts[level].append(bits)
                if size is not None:
                    array = array.values
                    at = array.offset + at * size
            base.append(self._first_item(file, array.buffers()[1], at, width))
            assert batch.num_rows == len(chunk)
        self._base = np.array(base, np.int64)
        self._levels = [
            _Level(math.prod(sizes[:level]), tuple(sizes[:level]), nullable[level], np.array(first, np.int64))
            for level, first in enumerate(firsts)
        ]
        self._joined: np.ndarray[Any, Any] | None = None
        self._valid: np.ndarray[Any, Any] | None = None

    def _first_item(self, file: int, values: pa.Buffer | None, at: int, width: int) -> int:
        if values is None:
            return 0
        if self._is_bool:
            return 8 * self._files.place(file, values, 1) + at
        return self._files.place(file, values, int(self.typestr[2:])) + at * width

    @property
    def has_nulls(self) -> bool:
        """Whether a row is null."""
        return self.null_count[0] > 0

    @property
    def has_nulls_within(self) -> bool:
        """Whether an item that may be null is, by itself or with its row."""
        nulls = 0
        for level, count in zip(self._levels, self.null_count):
            nulls += count
            if level.items != 1 or level.shape:
                if level.nullable and nulls:
                    return True
        return False

    # -- whole

    def joined(self) -> np.ndarray[Any, Any]:
        """All rows as one read-only array: where they lie if they do so side by side without nulls, else a copy."""
        if self._joined is None:
            plain = not self._is_bool and not any(self.null_count)
            if plain and len(self._base) == 1:
                self._joined = self._chunk(0)
            else:
                made = np.empty((self._files.rows, *self.shape), self.typestr)
                self.fill(made)
                made.flags.writeable = False
                self._joined = made
        return self._joined

    def valid(self) -> np.ndarray[Any, Any]:
        """One bool per row. Made once."""
        if self._valid is None:
            made = np.ones(self._files.rows, np.bool_)
            if self.has_nulls:
                for chunk, rows in self._ranges():
                    mask = self._chunk_mask(chunk, self._levels[:1])
                    if mask is not None:
                        made[rows] = mask
            made.flags.writeable = False
            self._valid = made
        return self._valid

    def fill(self, out: np.ndarray[Any, Any]) -> None:
        """Writes all rows."""
        for chunk, rows in self._ranges():
            part = out[rows]
            part[...] = self._chunk(chunk)
            self._blank(part, self._chunk_mask(chunk, self._levels))

    def _ranges(self) -> list[tuple[int, slice]]:
        bounds = zip(self._files.starts.tolist(), self._files.lengths.tolist())
        return [(chunk, slice(start, start + length)) for chunk, (start, length) in enumerate(bounds)]

    def _chunk(self, chunk: int) -> np.ndarray[Any, Any]:
        """The values of a batch: of numbers where they lie."""
        rows, first = int(self._files.lengths[chunk]), int(self._base[chunk])
        file = int(self._files.file_of[chunk])
        if self._is_bool:
            values = _bits(self._files.bytes_of(file), first, rows * self._items)
        else:
            values = self._files.array(file, self.typestr)[first : first + rows * self._items]
        return values.reshape(rows, *self.shape)

    def _chunk_mask(self, chunk: int, levels: list[_Level]) -> Any:
        rows, file = int(self._files.lengths[chunk]), int(self._files.file_of[chunk])
        found = None
        for level in levels:
            first = int(level.first[chunk])
            mask = None
            if first >= 0:
                mask = _bits(self._files.bytes_of(file), first, rows * level.items).reshape(rows, *level.shape)
            found = _both(found, mask, level.shape)
        return found

    # -- by row

    def take_into(self, rows: Rows, out: np.ndarray[Any, Any]) -> None:
        """Writes rows; of missing ones anything."""
        plain = not self._is_bool and not any(self.null_count)
        for file, which in rows.by_file:
            chunk, local = rows.chunk[which], rows.local[which]
            items = _within(self._base[chunk], local, self._items, self.shape)
            if plain and isinstance(which, slice):
                np.take(self._files.array(file, self.typestr), items, out=out, mode="clip")
                continue
            if self._is_bool:
                values = _bits_at(self._files.bytes_of(file), items)
            else:
                values = self._files.array(file, self.typestr)[items]
            self._blank(values, self._mask_at(file, chunk, local, self._levels))
            out[which] = values

    def take_valid_into(self, rows: Rows, out: np.ndarray[Any, Any]) -> None:
        """Writes whether rows are not null; of missing ones anything."""
        out[...] = True
        if self.has_nulls:
            for file, which in rows.by_file:
                mask = self._mask_at(file, rows.chunk[which], rows.local[which], self._levels[:1])
                if mask is not None:
                    out[which] = mask

    def _mask_at(self, file: int, chunk: Any, local: Any, levels: list[_Level]) -> Any:
        found = None
        for level in levels:
            first = level.first[chunk]
            has = first >= 0
            mask = None
            if has.any():
                bits = _within(np.where(has, first, 0), np.where(has, local, 0), level.items, level.shape)
                mask = _bits_at(self._files.bytes_of(file), bits)
                mask[~has] = True
            found = _both(found, mask, level.shape)
        return found

    def _blank(self, values: np.ndarray[Any, Any], mask: Any) -> None:
        """What stands under a null: NaN in floats, 0 in others."""
        if mask is not None:
            values[~mask] = np.nan if self.typestr[1] == "f" else 0


def _dig(field: pa.Field) -> tuple[list[int], list[bool], pa.DataType]:
    """Through fixed-size lists: their sizes, whether rows and items at each depth may be null, and the items' type."""
    sizes, nullable = [], [field.nullable]
    type = field.type
    while pa.types.is_fixed_size_list(type):
        sizes.append(type.list_size)
        nullable.append(type.value_field.nullable)
        type = type.value_type
    return sizes, nullable, type


def _within(first: Any, local: Any, items: int, shape: tuple[int, ...]) -> Any:
    """The numbers of the items of some rows, which have `items` each."""
    if not shape:
        return first + local
    start = first + local * items
    return (start[:, None] + np.arange(items)).reshape(len(start), *shape)


def _bits(data: np.ndarray[Any, Any], first: int, count: int) -> np.ndarray[Any, Any]:
    bits = np.unpackbits(data[first >> 3 : (first + count + 7) >> 3], bitorder="little")
    return bits[first & 7 : (first & 7) + count].view(np.bool_)


def _bits_at(data: np.ndarray[Any, Any], bits: Any) -> np.ndarray[Any, Any]:
    return ((data[bits >> 3] >> (bits & 7).astype(np.uint8)) & 1).astype(np.bool_)


def _both(outer: Any, inner: Any, shape: tuple[int, ...]) -> Any:
    """Valid in both, at the depth of the inner one."""
    if outer is None:
        return inner
    while outer.ndim < 1 + len(shape):
        outer = outer[..., None]
    outer = np.broadcast_to(outer, (outer.shape[0], *shape))
    return outer if inner is None else outer & inner
