"""Views of a pin that is lent: what `View` gives out, read from the table's own files.

What lies as it is wanted is given out where it lies: Arrow tables always; a column's array if the table is one batch and
the column has neither nulls nor bools. Everything else is copied into this process: `take` the rows it takes;
`to_numpy`, `to_torch` and DLPack the columns, joined once for as long as the pin is open.

The files never change. So what was given out keeps them mapped, and the pin from being evicted, but no lease.

Elsewhere: the files (`segments`), views of slots (`view`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pinion import columns, errors
from pinion import lane as wire
from pinion.columns import Array, Column, has_tensor
from pinion.view import View, check_one_type

if TYPE_CHECKING:
    import numpy as np

    from pinion.segments import Source

# Bytes of a file that a checksum reads at once.
CHUNK_BYTES = 16 << 20


class LentArray(Array):
    """An array that is made, or found in the files, when it is first read."""

    def __init__(self, view: View, shape: tuple[int, ...], typestr: str, made: Callable[[], np.ndarray[Any, Any]]):
        self._view = view
        self._made = made
        self._export = None
        self.shape = shape
        self.typestr = typestr

    @property
    def strides(self) -> tuple[int, ...]:  # type: ignore[override]
        return self._made().strides

    @property
    def offset(self) -> int:  # type: ignore[override]
        raise errors.FailedPrecondition("a pin that is lent has no slot", "NO_SLOT")

    @property
    def _address(self) -> int:
        return self._made().ctypes.data

    def _ndarray(self, read_only: bool) -> Any:
        self._view.hold()
        # Its base are the files, or a copy of its own.
        return columns._ndarray(self._made(), self._interface(read_only))

    def column(self, number: int) -> Array:
        column = self._made()[:, number]
        return LentArray(self._view, column.shape, self.typestr, lambda: column)

    def take_into(self, rows: Any, out: Any) -> None:
        import numpy as np

        np.take(self._made(), rows, axis=0, out=out, mode="clip")


class LentMask(LentArray):
    """Which rows of a column are not null."""

    def __init__(self, view: LentView, source: Source):
        super().__init__(view, (view.rows,), "|b1", source.valid)
        self._source = source

    def take_into(self, rows: Any, out: Any) -> None:
        self._source.take_valid_into(self._view.mapping.files.locate(rows), out)


class LentColumn(LentArray, Column):
    """A column of a view."""

    def __init__(self, view: LentView, name: str, field: pa.Field):
        self.name = name
        self.type = field.type
        self._nullable = field.nullable
        if not has_tensor(field.type):
            raise errors.NoTensor(
                f"{name!r} is {field.type}: no array has that type, read it by to_arrow", "NO_TENSOR", {"column": name}
            )
        self._source = view.mapping.files.column(name)
        LentArray.__init__(self, view, (view.rows, *self._source.shape), self._source.typestr, self._source.joined)

    @property
    def valid(self) -> Array | None:
        return LentMask(self._view, self._source) if self._nullable else None

    def check_nulls(self, masked: bool) -> None:
        if self.is_float:
            return
        if not masked and self._source.has_nulls:
            raise self._has_nulls("has nulls, which read as 0: ask for mask=True")
        if self._source.has_nulls_within:
            raise self._has_nulls("has nulls within its rows, which no mask shows: read it by to_arrow")

    def take_into(self, rows: Any, out: Any) -> None:
        self._source.take_into(self._view.mapping.files.locate(rows), out)


class LentView(View):
    """The one generation of a pin that is lent."""

    is_lent = True

    def _locate(self, info: dict[str, Any]) -> None:
        files = self.mapping.files
        if info["layout"] != self.mapping.layout["layout"]:
            raise errors.ProtocolError(f"generation {info['number']} is of no layout that this client has mapped")
        if info["rows"] != files.rows:
            raise errors.ProtocolError(f"{info['rows']} rows, of which the files have {files.rows}")
        self._nodes = dict.fromkeys(self.mapping.stored.names)

    def __getitem__(self, name: str) -> Column:
        return LentColumn(self, name, self._field(name))

    def to_arrow(self, features: Iterable[str] | None = None, *, declared: bool = False) -> pa.Table:
        """The rows as a table, without a copy: its chunks are the batches of the files.

        Types are the table's, dictionaries as plain values; with `declared=True` those are encoded, which copies them.
        """
        self.hold()
        names = self._names(features)
        for name in names:
            self._field(name)
        table = self.mapping.files.table.select(names)
        if declared:
            table = wire.to_schema(table, pa.schema([self.mapping.result.field(name) for name in names]))
        return table

    def matrix(self, features: Iterable[str] | None = None) -> Array:
        """Equal-typed columns as one array `[rows, features]`: a copy, made once for these features. Any order will do."""
        found = self._matrix_columns(features)
        check_one_type(found)
        names = [column.name for column in found]
        files = self.mapping.files
        return LentArray(self, (self.rows, len(names)), found[0].typestr, lambda: files.matrix(names))

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
        """As `View.take`: what is taken is read from the files, and no whole column is copied for it.

        NumPy gathers, also into tensors; for each column and file that rows lie in once.
        """
        from pinion import gather

        return gather.take(self, rows, features, matrix=matrix, mask=mask, out=out, stream=stream, torch=self._torch())

    def verify(self) -> dict[str, int]:
        """Compares every byte of the files with the checksums that were recorded when they were written."""
        said = self.mapping.checksums(self.hold().lease.id)
        files = self.mapping.files
        ends = [0] * files.count
        for stretch in said:
            part, size = stretch["part"], stretch["bytes"]
            if not 0 <= part < len(ends) or stretch["offset"] != ends[part] or size < 0:
                raise errors.ProtocolError(f"the server's checksums are not those of {len(ends)} whole files")
            data = files.bytes_of(part)[ends[part] : ends[part] + size]
            crc = 0
            for start in range(0, size, CHUNK_BYTES):
                crc = zlib.crc32(data[start : start + CHUNK_BYTES], crc)
            if crc != stretch["crc32"]:
                raise errors.DataLoss(
                    f"{size} bytes at {ends[part]} of file {part} have checksum {crc}, recorded is {stretch['crc32']}",
                    "CHECKSUM",
                    stretch,
                )
            ends[part] += size
        if ends != [len(files.bytes_of(part)) for part in range(files.count)]:
            raise errors.ProtocolError("the server's checksums leave out bytes of its files")
        return {"number": self.generation, "buffers": len(said), "bytes": sum(ends)}

    def buffer(self, offset: int, size: int) -> pa.Buffer:
        raise errors.FailedPrecondition("a pin that is lent has no slot", "NO_SLOT")

    def _matrix_columns(self, features: Iterable[str] | None = None) -> list[Column]:
        found = self._columns(features)
        if features is None:
            keys = self.mapping.info["key"]
            found = [column for column in found if column.name not in keys]
        if not found:
            raise errors.NoTensor("a matrix has at least one column", "NO_MATRIX")
        return found

    def _matrix_source(self, columns: list[Column]) -> list[Column]:
        check_one_type(columns)
        return columns
