"""Columns of a leased slot: as arrays without a copy, and as Arrow.

What lies where in a slot is said in docs/local-lane.md ("What lies in a slot"). An `Array` is values of one
type at a constant distance; it speaks DLPack, `__cuda_array_interface__` and `__array__`, so that torch, CuPy and
NumPy take it as it lies there.

Elsewhere: views that hand these out (`view`), when what was exported lets the lease go (`leases`).
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pinion import errors
from pinion.cuda import DLPACK_CUDA
from pinion.leases import Export

if TYPE_CHECKING:
    from pinion.view import View

# Where the device stands in a DLManagedTensor and in a DLManagedTensorVersioned.
_DEVICE_AT = {b"dltensor": 8, b"dltensor_versioned": 40}

_TYPESTRS = {
    "int8": "|i1", "int16": "<i2", "int32": "<i4", "int64": "<i8",
    "uint8": "|u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
    "halffloat": "<f2", "float": "<f4", "double": "<f8", "bool": "|b1",
    "date32[day]": "<i4", "date64[ms]": "<i8",
}  # fmt: skip


def typestr_of(type: pa.DataType) -> str | None:
    """The array-interface spelling of a type's values; times are integers. None if no array has them."""
    if pa.types.is_timestamp(type) or pa.types.is_duration(type) or pa.types.is_time64(type):
        return "<i8"
    if pa.types.is_time32(type):
        return "<i4"
    return _TYPESTRS.get(str(type))


class Array:
    """Values in a leased slot: `shape`, `strides` in bytes, and `typestr` as the array interface spells it.

    To be used while its view is open. What is made of it without a copy (DLPack, NumPy on the host, torch) may
    outlive the view and keeps the lease. The memory is not this process's to write: on the host a write is
    refused by NumPy and is a segmentation fault from elsewhere; on a GPU it is an error where the driver maps
    read-only, and otherwise damages the pin for everybody.
    """

    def __init__(self, view: View, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str):
        self._view = view
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.typestr = typestr
        # Whoever takes `__cuda_array_interface__` keeps this object, not the dictionary.
        self._export: Export | None = None
        last = sum((n - 1) * step for n, step in zip(shape, strides)) + int(typestr[2:]) if 0 not in shape else 0
        view.mapping.check_range(offset, last)

    @property
    def _address(self) -> int:
        return self._view.address + self.offset

    # -- protocols

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.mapping.dlpack_device

    def __dlpack__(
        self, *, stream: int | None = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """A DLPack capsule. `stream` is the consumer's, and is waited for before the lease ends.

        Without one (None, or -1) the whole context is. The capsule's deleter is NumPy's: it runs no Python once
        the interpreter has ended.
        """
        device = self.__dlpack_device__()
        if copy or (dl_device is not None and tuple(dl_device) != device):
            raise BufferError("a pin is exported where it lies, and without a copy")
        if device[0] != DLPACK_CUDA:
            options = {} if max_version is None or not _knows_versions() else {"max_version": max_version}
            # Consumers of the older form know no read-only memory.
            return self._ndarray(read_only=bool(options) and max_version >= (1, 0)).__dlpack__(**options)
        if stream == 0:
            raise BufferError("stream 0 is ambiguous: 1 is the legacy default stream, 2 that of the thread")
        self._view.reads_on(None if stream in (None, -1) else stream)
        return capsule(Export(self._view.hold()), self._interface(read_only=False), device, max_version)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self._view.mapping.device is None:
            raise AttributeError("__cuda_array_interface__: this pin lies on the host")
        if self._export is None:
            self._export = Export(self._view.hold())
        self._view.reads_on(None)
        return self._interface(read_only=False) | {"version": 3, "stream": None}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.array(self.to_numpy(), dtype=dtype, copy=copy)

    # -- copies and views

    def to_numpy(self) -> Any:
        """A NumPy array: read-only and without a copy on the host, a copy of what lies on a GPU."""
        if self._view.mapping.device is None:
            return self._ndarray(read_only=True)
        import numpy as np

        if len(self.shape) == 2 and self.strides[0] < self.strides[1]:
            # A matrix of columns: one copy each, without what lies between.
            columns = [self.column(i).to_numpy() for i in range(self.shape[1])]
            return np.stack(columns).T if columns else np.empty(self.shape, self.typestr)
        size = math.prod(self.shape) * int(self.typestr[2:])
        data = self._view.buffer(self.offset, size)
        return np.frombuffer(data, self.typestr).reshape(self.shape)

    def take_into(self, rows: Any, out: Any) -> None:
        """Writes rows by number to an array on the host; of numbers that are none anything."""
        import numpy as np

        np.take(self.to_numpy(), rows, axis=0, out=out, mode="clip")

    def column(self, number: int) -> Array:
        """A column of a matrix."""
        return Array(
            self._view, self.offset + number * self.strides[1], self.shape[:1], self.strides[:1], self.typestr
        )

    def _interface(self, read_only: bool) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.typestr,
            "strides": self.strides,
            "data": (self._address, read_only),
        }

    def _ndarray(self, read_only: bool) -> Any:
        """A NumPy array of this memory: on a GPU only to be handed on, never to be read."""
        return _ndarray(Export(self._view.hold()), self._interface(read_only))


def _ndarray(export: Export, interface: dict[str, Any]) -> Any:
    import numpy as np

    return np.asarray(_Exported(export, interface | {"version": 3}))


def capsule(export: Export, interface: dict[str, Any], device: tuple[int, int], max_version: Any) -> Any:
    """A DLPack capsule of memory on a GPU. Its deleter is NumPy's: it runs no Python once the interpreter has ended."""
    options = {} if max_version is None or not _knows_versions() else {"max_version": max_version}
    made = _ndarray(export, interface).__dlpack__(**options)
    _set_device(made, device)
    return made


def contiguous(shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Strides in bytes, the last dimension closest together."""
    strides = [width]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return tuple(strides[: len(shape)])


class _Exported:
    """What a NumPy array refers to as its base."""

    __slots__ = ("__array_interface__", "export")

    def __init__(self, export: Export, interface: dict[str, Any]):
        self.export = export
        self.__array_interface__ = interface


def _knows_versions() -> bool:
    """NumPy before 2.1 makes capsules of the older form only, which consumers of the newer one take too."""
    import numpy as np

    return tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 1)


def _set_device(capsule: Any, device: tuple[int, int]) -> None:
    """Writes into a capsule that its memory lies on a GPU: NumPy makes capsules of the host only."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    name = api.PyCapsule_GetName(capsule)
    tensor = api.PyCapsule_GetPointer(capsule, name)
    (ctypes.c_int32 * 2).from_address(tensor + _DEVICE_AT[name])[:] = device


class Column(Array):
    """A column of a view: an `Array` with a name, an Arrow type, and which rows are valid."""

    def __init__(self, view: View, name: str, type: pa.DataType, node: dict[str, Any]):
        self.name = name
        self.type = type
        self._node = node
        self._inner: list[Array] = []
        values, shape, typestr = _values(view, name, type, node, (view.rows,), self._inner)
        super().__init__(view, values, shape, contiguous(shape, int(typestr[2:])), typestr)

    @property
    def valid(self) -> Array | None:
        """One bool per row, true where there is a value; None if the column cannot have nulls."""
        return _valid(self._view, self._node, self._view.rows)

    @property
    def is_float(self) -> bool:
        """Nulls of floats are NaN."""
        return self.typestr[1] == "f"

    def check_nulls(self, masked: bool) -> None:
        """Raises `HasNulls` where a null would be taken for a value. Reads the validity once for each view."""
        if self.is_float:
            return
        if not masked and self.valid is not None and not self._view.all_set(self.valid):
            raise self._has_nulls("has nulls, which read as 0: ask for mask=True")
        if not all(self._view.all_set(items) for items in self._inner):
            raise self._has_nulls("has nulls within its rows, which no mask shows: read it by to_arrow")

    def _has_nulls(self, problem: str) -> errors.HasNulls:
        return errors.HasNulls(f"{self.name!r} ({self.type}) {problem}", "HAS_NULLS", {"column": self.name})


def has_tensor(type: pa.DataType) -> bool:
    """Whether a column of this type is an array: numbers, bools, times, fixed sizes of these."""
    if pa.types.is_fixed_size_list(type):
        return has_tensor(type.value_type)
    return pa.types.is_fixed_size_binary(type) or typestr_of(type) is not None


def _values(
    view: View, name: str, type: pa.DataType, node: dict[str, Any], shape: tuple[int, ...], inner: list[Array]
) -> tuple[int, tuple[int, ...], str]:
    """Offset, shape and type of a column's values; `inner` gets the validity of items."""
    if node["kind"] == "fixed_size_list":
        child = node["child"]
        mask = _valid(view, child, math.prod(shape) * type.list_size)
        if mask is not None:
            inner.append(mask)
        return _values(view, name, type.value_type, child, (*shape, type.list_size), inner)
    if node["kind"] == "fixed" and pa.types.is_fixed_size_binary(type):
        return node["values"], (*shape, type.byte_width), "|u1"
    typestr = typestr_of(type) if node["kind"] in ("fixed", "bool") else None
    if typestr is None:
        raise errors.NoTensor(
            f"{name!r} is {type}: no array has that type, read it by to_arrow", "NO_TENSOR", {"column": name}
        )
    return node["values"], shape, typestr


def _valid(view: View, node: dict[str, Any], rows: int) -> Array | None:
    if node["validity"] is None:
        return None
    return Array(view, node["validity"], (rows,), (1,), "|b1")
