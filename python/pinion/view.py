"""Views of pins: one leased generation, as arrays, tensors and Arrow tables, and by key.

Elsewhere: who hands views out (`pin`), what keeps their lease (`leases`), arrays (`columns`), Arrow (`arrow`), torch
(`torch`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pinion import cuda, errors
from pinion import lane as wire
from pinion.columns import Array, Column, has_tensor
from pinion.leases import Hold
from pinion.mapping import Mapping

if TYPE_CHECKING:
    from pinion.client import Keys
    from pinion.pin import Pin


class View:
    """One generation of a pin, leased until the block is left and everything given out without a copy is gone."""

    # Whether the table's own files lie behind it: see `lent`.
    is_lent = False

    def __init__(self, pin: Pin, mapping: Mapping, info: dict[str, Any], hold: Hold):
        self._pin = pin
        self._hold: Hold | None = hold
        self._checked: dict[int, bool] = {}
        self.mapping = mapping
        self.slot: int = info["slot"]
        self.generation: int = info["number"]
        self.rows: int = info["rows"]
        self._locate(info)
        self.snapshot: str = info["snapshot"]
        self.positions: dict[str, Any] = info["positions"]
        # As the server said it: `age_ms`, `stalled_by_lease`, `bytes_written`, …
        self.info = info

    def _locate(self, info: dict[str, Any]) -> None:
        """Finds what is leased in what is mapped."""
        mapping = self.mapping
        if info["layout"] != mapping.layout["layout"] or not 0 <= self.slot < len(mapping.slots):
            raise errors.ProtocolError(f"generation {info['number']} lies in no slot that this client has mapped")
        self.address: int = mapping.slots[self.slot].address
        if not 0 <= self.rows <= mapping.layout["capacity_rows"]:
            raise errors.ProtocolError(f"{self.rows} rows in a layout of {mapping.layout['capacity_rows']}")
        self._nodes = {column["name"]: column["node"] for column in mapping.layout["columns"]}

    def __enter__(self) -> View:
        self.hold()
        self._pin._open.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        if self in self._pin._open:
            self._pin._open.remove(self)
        self.close()

    def close(self) -> None:
        """Leaves the view: never waits. What it gave out stays good, and keeps the lease while it lives."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.lease.note()

    def __len__(self) -> int:
        return self.rows

    @property
    def columns(self) -> list[str]:
        """The pinned columns, in the table's order."""
        return self.mapping.stored.names

    def __getitem__(self, name: str) -> Column:
        """A column as an array on the device (DLPack, `__cuda_array_interface__`).

        Raises `NoTensor` for strings and the like.
        """
        return Column(self, name, self._field(name).type, self._nodes[name])

    # -- Arrow and NumPy

    def to_arrow(self, features: Iterable[str] | None = None, *, declared: bool = False) -> pa.Table:
        """The rows as a table. On the host without a copy, validity and bools apart; from a GPU copied.

        Strings are `string_view` and lists `large_list_view`, as they lie there; with `declared=True` all
        columns have the table's types, which copies those.
        """
        from pinion import arrow

        columns = {}
        for name in self._names(features):
            field = self._field(name)
            column = arrow.to_arrow(self._nodes[name], field.type, self.rows, self.buffer)
            columns[field] = arrow.restore(column, field.type) if declared else column
        fields = [field.with_type(column.type) for field, column in columns.items()]
        table = pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))
        if declared:
            table = wire.to_schema(table, pa.schema([self.mapping.result.field(name) for name in table.column_names]))
        return table

    def to_numpy(self, features: Iterable[str] | None = None) -> dict[str, Any]:
        """Arrays by name: read-only and without a copy on the host, copies from a GPU. Nulls as in `to_torch`."""
        columns = self._columns(features)
        for column in columns:
            column.check_nulls(masked=False)
        return {column.name: column.to_numpy() for column in columns}

    # -- tensors

    def to_torch(self, features: Iterable[str] | None = None, *, matrix: bool = False, mask: bool = False) -> Any:
        """Tensors on the pin's device, without a copy: `{feature: tensor}`; with `matrix=True` one `[rows, features]`.

        Without `features`: all columns that have a tensor type, for a matrix all but keys. Times are integers.
        A matrix's columns have one type, its strides are not contiguous. Null floats are NaN; other nulls read as
        0, and raise `HasNulls` unless `mask=True`, which returns (values, masks): bool tensors of the same form,
        true where there is a value.
        """
        from pinion import torch

        return torch.tensors(self, features, matrix=matrix, mask=mask)

    def to_cupy(self, features: Iterable[str] | None = None) -> dict[str, Any]:
        """CuPy arrays by name, without a copy. Their streams are not known: the lease waits for the whole context."""
        import cupy

        if self.mapping.device is None:
            raise errors.FailedPrecondition("this pin lies on the host: use to_numpy", "ON_HOST")
        columns = self._columns(features)
        for column in columns:
            column.check_nulls(masked=False)
        return {column.name: cupy.asarray(column) for column in columns}

    def matrix(self, features: Iterable[str] | None = None) -> Array:
        """Equal-typed columns as one array `[rows, features]`, strided, without a copy: see `to_torch`.

        Raises `NoTensor` if their types differ, or their distances (any order but the layout's).
        """
        columns = self._matrix_columns(features)
        first = columns[0]
        steps = {b.offset - a.offset for a, b in zip(columns, columns[1:])} or {0}
        check_one_type(columns)
        if len(steps) > 1 or min(steps) < 0:
            order = [column.name for column in sorted(columns, key=lambda column: column.offset)]
            raise errors.NoTensor(f"these columns do not lie at one distance; their order is {order}", "NO_MATRIX")
        return Array(self, first.offset, (self.rows, len(columns)), (*first.strides, steps.pop()), first.typestr)

    def _matrix_source(self, columns: list[Column]) -> Array | list[Column]:
        """What the values of a matrix are gathered from."""
        return self.matrix([column.name for column in columns])

    def matrix_columns(self, features: Iterable[str] | None = None) -> list[str]:
        """The names of a matrix's columns, in order."""
        return [column.name for column in self._matrix_columns(features)]

    def use(self, stream: Any) -> None:
        """Says that work on a stream reads this view: the lease waits for it.

        `stream` is torch's or CuPy's, anything with `__cuda_stream__`, or a handle. It must live as long as
        what was exported. torch's current stream is known without being said.

        Work that is captured into a CUDA graph reads whenever the graph runs: a lease that ends on a stream
        under capture is kept until the process ends. Gather what a graph needs (`take`) before.
        """
        self.reads_on(cuda.stream_handle(stream))

    # -- by key

    def row_ids(self, keys: Keys | Any) -> Any:
        """The rows of keys in this generation: int64 on the pin's device, in the order of the keys, -1 for none.

        `keys` as for `Client.lookup`; a table with one key column also takes a tensor, an array or a list of
        it (one on a device is brought to the host, where the index is). A torch tensor if torch is installed and
        can use the device, else NumPy's on the host.
        """
        batch = _keys(keys, self.mapping.info["key"])
        lease = self.hold().lease
        ids = self.mapping.row_ids(lease.id, batch)
        torch = self._torch()
        if torch is not None:
            return torch.row_ids(ids, self.mapping.dlpack_device)
        import numpy as np

        return np.frombuffer(ids, np.int64)

    def take(
        self,
        rows: Any,
        features: Iterable[str] | None = None,
        *,
        matrix: bool = False,
        mask: bool = False,
        out: Any = None,
        stream: Any = None,
        kernel: bool = False,
    ) -> Any:
        """Rows by number, as arrays of their own on the pin's device: what `to_torch` would give, at `rows`.

        A number that is none of a row, -1 or any other, is missing: NaN in floats, 0 in others, false in masks. `out`
        are arrays to fill, of the same form; `stream` is where it runs, by default torch's current stream or the
        legacy default one. Waits for nothing that it queued. The lease, `rows` and `out` are kept until it is done,
        also when the view is left before.

        Tensors gathered by torch, where torch is installed and can use the device. Else, and with `kernel=True`,
        this package's own kernel gathers, or NumPy on the host: into tensors where torch is there, else into NumPy
        arrays, or on a GPU `DeviceArray`s (`out` is anything with `__cuda_array_interface__`). Memory that is allocated
        here costs a cuMemAlloc for each call: give `out` where that matters. The kernel has not run on a GPU yet.
        """
        from pinion import gather

        torch = self._torch()
        if torch is not None and not kernel:
            return torch.take(self, rows, features, matrix=matrix, mask=mask, out=out, stream=stream)
        return gather.take(self, rows, features, matrix=matrix, mask=mask, out=out, stream=stream, torch=torch)

    def _torch(self) -> Any:
        """This package's module for torch. None if torch is not installed, or cannot use the device."""
        try:
            from pinion import torch
        except ImportError:
            return None
        return torch if torch.can_use(self.mapping.dlpack_device) else None

    # -- checks

    def check(self) -> None:
        """Raises `LeaseGone` if the lease ended before its time, because the connection broke.

        A server that ended leaves the bytes as they are; one that cut this client off may have written since.
        """
        self.hold()
        self.mapping.check()

    def verify(self) -> dict[str, int]:
        """See `Pin.verify`."""
        said = self.mapping.checksums(self.hold().lease.id)
        columns = self.mapping.layout["columns"]
        wanted = [place for column in columns for place in _buffers(column["name"], column["node"])]
        if sorted((c["column"], c["buffer"], c["offset"]) for c in said) != sorted(wanted):
            raise errors.ProtocolError("the server's checksums are not those of this layout's buffers")
        for buffer in said:
            crc = self.mapping.crc32(self.slot, buffer["offset"], buffer["bytes"])
            if crc != buffer["crc32"]:
                raise errors.DataLoss(
                    f"{buffer['column']!r}, {buffer['buffer']}: {buffer['bytes']} bytes at {buffer['offset']} of slot"
                    f" {self.slot} have checksum {crc}, the server reads {buffer['crc32']}",
                    "CHECKSUM",
                    buffer,
                )
        return {
            "number": self.generation,
            "buffers": len(said),
            "bytes": sum(buffer["bytes"] for buffer in said),
        }

    # -- for arrays

    def hold(self) -> Hold:
        """What keeps the lease. Raises once the view was left."""
        if os.getpid() != self._pin._room.pid:
            self._pin._mapped()
        if self._hold is None:
            raise errors.FailedPrecondition("this view was left: its bytes may change now", "LEFT")
        return self._hold

    def reads_on(self, stream: int | None) -> None:
        """Notes a stream that reads; None is any."""
        lease = self.hold().lease
        lease.exported = True
        if stream is None:
            lease.unknown = True
        else:
            lease.named.add(stream)

    def buffer(self, offset: int, size: int) -> pa.Buffer:
        """Bytes of the slot: see `Mapping.buffer`."""
        return self.mapping.buffer(self.slot, offset, size, self.hold())

    def all_set(self, mask: Array) -> bool:
        """Whether a mask is true everywhere. Read once."""
        if mask.offset not in self._checked:
            self._checked[mask.offset] = bool(mask.to_numpy().all())
        return self._checked[mask.offset]

    def _field(self, name: str) -> pa.Field:
        if name not in self._nodes:
            raise errors.UnknownFeature(
                f"pin {self.mapping.info['name']!r} has no column {name!r}; it has {', '.join(self.columns)}",
                "UNKNOWN_FEATURE",
                {"feature": name},
            )
        return self.mapping.stored.field(name)

    def _names(self, features: Iterable[str] | None) -> list[str]:
        if features is None:
            return self.columns
        return [features] if isinstance(features, str) else list(features)

    def _columns(self, features: Iterable[str] | None) -> list[Column]:
        names = self._names(features)
        if features is None:
            names = [name for name in names if has_tensor(self._field(name).type)]
        return [self[name] for name in names]

    def _matrix_columns(self, features: Iterable[str] | None) -> list[Column]:
        columns = self._columns(features)
        if features is None:
            keys = self.mapping.info["key"]
            columns = sorted((c for c in columns if c.name not in keys), key=lambda column: column.offset)
        if not columns:
            raise errors.NoTensor("a matrix has at least one column", "NO_MATRIX")
        return columns


def check_one_type(columns: list[Column]) -> None:
    """Raises `NoTensor` for columns that are no matrix."""
    if len({column.typestr for column in columns}) > 1 or any(len(column.shape) > 1 for column in columns):
        types = ", ".join(f"{column.name}: {column.type}" for column in columns)
        raise errors.NoTensor(f"a matrix has columns of one type, name them: {types}", "NO_MATRIX")


def _keys(keys: Any, names: list[str]) -> pa.RecordBatch:
    from pinion.client import _key_batch

    if isinstance(keys, (pa.RecordBatch, pa.Table, dict)):
        return _key_batch(keys)
    if len(names) != 1:
        raise TypeError(f"the key has {len(names)} columns: give {{column: values}} with {', '.join(names)}")
    if hasattr(keys, "detach"):
        keys = keys.detach().cpu().numpy()
    column = keys if isinstance(keys, pa.Array) else pa.array(keys)
    return pa.record_batch({names[0]: column})


def _buffers(column: str, node: dict[str, Any], path: str = "") -> list[tuple[str, str, int]]:
    """Column, name and offset of each buffer of a node."""
    own = ("values", "views", "heap", "offsets", "sizes", "validity")
    found = [(column, path + name, node[name]) for name in own if node.get(name) is not None]
    if "child" in node:
        found += _buffers(column, node["child"], f"{path}child.")
    for number, child in enumerate(node.get("children", ())):
        found += _buffers(column, child["node"], f"{path}children.{number}.")
    return found
