"""Rows of a leased slot by their numbers: this package's own gather, for `View.take` without torch.

On a GPU a kernel (`kernels/gather.cu`, shipped as the PTX text that it compiles to) writes every array in one launch, a
matrix too; on the host NumPy does. A number that is none of a row, -1 or any other, is missing: NaN in floats, 0 in
others, false in masks; nothing is read for it.

The kernel has not run on a GPU yet: its tests run on a model of it (gds/fake-driver/src/kernels/gather.rs).

Elsewhere: torch's gather (`torch`), memory of results without torch (`owned`), calls of the driver (`cuda`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pinion import cuda, errors, owned
from pinion.columns import Array, Column, contiguous

if TYPE_CHECKING:
    from pinion.view import View

PTX = Path(__file__).parent / "kernels" / "gather.ptx"

WIDTHS = (16, 8, 4, 2, 1)
FOUND = "pinion_found"
KERNELS = (*(f"pinion_gather_{width}" for width in WIDTHS), FOUND)

BLOCK_THREADS = 256
# Larger grids are no faster: a kernel comes back for what its grid does not cover.
MAX_BLOCKS_X, MAX_BLOCKS_Y = 1 << 16, 1 << 12


class Target(NamedTuple):
    """Memory to write: the caller's, torch's or our own. Strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    typestr: str
    # What is returned, and keeps the memory.
    owner: Any


Part = tuple["Array | list[Array | None] | None", tuple[int, ...], str]
"""What one result is gathered from, and its form: an array; the masks of a matrix's columns, or of one column; the
columns of a matrix that does not lie as one. None is the mask of a column that cannot have nulls."""


def take(
    view: View,
    rows: Any,
    features: Iterable[str] | None,
    *,
    matrix: bool,
    mask: bool,
    out: Any,
    stream: Any,
    torch: Any,
) -> Any:
    """See `View.take`. `torch` is this package's module where results are to be tensors, or None."""
    parts = _parts(view, features, matrix=matrix, mask=mask)
    if view.mapping.device is None:
        on: _OnHost | _OnDevice = _OnHost(rows, torch)
    else:
        on = _OnDevice(view, view.mapping.device, rows, stream, torch)
    count = len(on)
    leaves = _leaves(parts)
    given = [None] * len(leaves) if out is None else _leaves(_match(parts, out))
    targets = on.targets([((count, *shape), typestr) for _, shape, typestr in leaves], given)
    on.write(view.rows, [source for source, _, _ in leaves], targets)
    results = iter(target.owner for target in targets)
    return _map(parts, lambda _: next(results))


# -- what is asked for


def _parts(view: View, features: Iterable[str] | None, *, matrix: bool, mask: bool) -> Any:
    """The form of the answer, with a `Part` for each array."""
    columns = view._matrix_columns(features) if matrix else view._columns(features)
    for column in columns:
        column.check_nulls(masked=mask)
    if matrix:
        source, form = view._matrix_source(columns), (len(columns),)
        values: Any = (source, form, columns[0].typestr)
        masks: Any = ([column.valid for column in columns], (len(columns),), "|b1")
    else:
        values = {column.name: _part(column) for column in columns}
        masks = {column.name: _mask(column) for column in columns}
    return [values, masks] if mask else values


def _part(array: Array) -> Part:
    return array, array.shape[1:], array.typestr


def _mask(column: Column) -> Part:
    return column.valid, (), "|b1"


def _leaves(form: Any) -> list[Any]:
    found: list[Any] = []
    _map(form, found.append)
    return found


def _map(form: Any, each: Callable[[Any], Any]) -> Any:
    """The same form with every part replaced; [values, masks] become a tuple."""
    if isinstance(form, list):
        return tuple(_map(part, each) for part in form)
    if isinstance(form, dict):
        return {name: _map(part, each) for name, part in form.items()}
    return each(form)


def _match(form: Any, given: Any) -> Any:
    """What the caller gave to be written, in the order of the form."""
    if isinstance(form, list):
        if not isinstance(given, (tuple, list)) or len(given) != len(form):
            raise errors.InvalidArgument("with mask=True `out` is a pair: values and masks", "OUT")
        return [_match(part, inner) for part, inner in zip(form, given)]
    if isinstance(form, dict):
        missing = [name for name in form if not hasattr(given, "keys") or name not in given]
        if missing:
            raise errors.InvalidArgument(f"`out` has nothing for {', '.join(missing)}", "OUT")
        return {name: _match(part, given[name]) for name, part in form.items()}
    return given


def _check_form(target: Target, shape: tuple[int, ...], typestr: str) -> Target:
    if target.shape != shape or target.typestr != typestr:
        raise errors.InvalidArgument(
            f"`out` is {target.shape} of {target.typestr}, what is taken is {shape} of {typestr}", "OUT"
        )
    return target


def _numbers(rows: Any) -> np.ndarray[Any, Any]:
    """Row numbers of the caller on the host as a copy of our own, which nobody writes or unmaps while it is read."""
    given = np.asarray(rows.detach().cpu() if hasattr(rows, "detach") else rows)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise errors.InvalidArgument(
            f"row numbers are one dimension of integers, not {given.dtype} of shape {given.shape}", "ROWS"
        )
    if given.dtype == np.uint64 and given.size and given.max() > np.iinfo(np.int64).max:
        raise errors.InvalidArgument("row numbers are 64-bit integers with a sign", "ROWS")
    return np.array(given, np.int64, order="C", copy=True)


def fill_of(typestr: str) -> bytes:
    """What stands for a missing value, repeated to 16 bytes."""
    width = int(typestr[2:])
    return np.full(16 // width, np.nan if typestr[1] == "f" else 0, typestr).tobytes()


# -- on the host


class _OnHost:
    def __init__(self, rows: Any, torch: Any):
        self._rows = _numbers(rows)
        self._torch = torch

    def __len__(self) -> int:
        return len(self._rows)

    def targets(self, forms: list[tuple[tuple[int, ...], str]], given: list[Any]) -> list[Target]:
        made = []
        for (shape, typestr), out in zip(forms, given):
            if out is None:
                out = np.empty(shape, typestr) if self._torch is None else self._torch.empty(shape, typestr)
            array = np.asarray(out)
            place = Target(array.ctypes.data, array.shape, array.strides, array.dtype.str, out)
            if not array.flags.writeable:
                raise errors.InvalidArgument("`out` is read-only", "OUT")
            made.append(_check_form(place, shape, typestr))
        return made

    def write(self, row_count: int, sources: list[Any], targets: list[Target]) -> None:
        missing = (self._rows < 0) | (self._rows >= row_count)
        for source, target in zip(sources, targets):
            out = np.asarray(target.owner)
            if isinstance(source, list):
                for i, column in enumerate(source):
                    self._write(row_count, missing, column, out[:, i])
            else:
                self._write(row_count, missing, source, out)

    def _write(self, row_count: int, missing: Any, source: Array | None, out: Any) -> None:
        if source is None:
            out[...] = True
        elif row_count:
            source.take_into(self._rows, out)
        out[missing] = np.nan if out.dtype.kind == "f" else 0


# -- on a GPU


class _OnDevice:
    def __init__(self, view: View, device: cuda.Device, rows: Any, stream: Any, torch: Any):
        self._device = device
        self._torch = torch
        # All that the queued work touches; the view's lease among it.
        self._kept: list[Any] = [view.hold()]
        if torch is not None:
            rows, self._torch_stream = torch.on_stream(rows, stream, device.ordinal)
            self._stream = self._torch_stream.cuda_stream
            self._rows: Any = rows.data_ptr()
            self._count = len(rows)
            self._kept.append(rows)
            return
        self._stream = cuda.LEGACY_STREAM if stream is None else cuda.stream_handle(stream)
        given = _interface(rows)
        if given is None:
            self._rows = _numbers(rows)
            self._count = len(self._rows)
        else:
            self._rows, self._count = self._numbers_there(given), given["shape"][0]
            self._kept.append(rows)

    def __len__(self) -> int:
        return self._count

    def _numbers_there(self, given: dict[str, Any]) -> int:
        if len(given["shape"]) != 1 or given["typestr"] != "<i8" or given.get("strides") not in (None, (8,)):
            raise errors.InvalidArgument(
                f"row numbers on a GPU are contiguous int64 (<i8), not {given['typestr']} of shape {given['shape']}"
                f" with strides {given.get('strides')}",
                "ROWS",
            )
        return self._after(given)

    def _after(self, given: dict[str, Any]) -> int:
        """The address of another's array, once our stream waits for the one that it is written on."""
        if given.get("stream") is not None:
            self._device.order(given["stream"], self._stream)
        return given["data"][0]

    def targets(self, forms: list[tuple[tuple[int, ...], str]], given: list[Any]) -> list[Target]:
        if self._torch is not None:
            tensors = [
                self._torch.empty(shape, typestr, self._torch_stream) if out is None else out
                for (shape, typestr), out in zip(forms, given)
            ]
            places = [Target(*self._torch.place(tensor, self._device.ordinal), tensor) for tensor in tensors]
        elif any(out is not None for out in given):
            places = [self._given(out) for out in given]
        else:
            made = owned.arrays(self._device, forms, self._stream)
            places = [Target(array.address, array.shape, array.strides, array.typestr, array) for array in made]
        self._kept += [place.owner for place in places]
        return [_check_form(place, *form) for place, form in zip(places, forms)]

    def _given(self, out: Any) -> Target:
        interface = _interface(out)
        if interface is None:
            raise errors.InvalidArgument(f"`out` is on the pin's GPU: {type(out).__name__} is not", "OUT")
        address, read_only = interface["data"]
        if read_only:
            raise errors.InvalidArgument("`out` is read-only", "OUT")
        self._after(interface)
        shape, typestr = tuple(interface["shape"]), interface["typestr"]
        strides = interface.get("strides")
        strides = contiguous(shape, int(typestr[2:])) if strides is None else tuple(strides)
        if len(strides) != len(shape):
            raise errors.InvalidArgument(f"`out` has shape {shape} and strides {strides}", "OUT")
        return Target(address, shape, strides, typestr, out)

    def write(self, row_count: int, sources: list[Any], targets: list[Target]) -> None:
        """Queues one launch for each array; masks of a matrix take one for each column."""
        launches = []
        for source, target in zip(sources, targets):
            if isinstance(source, list):
                for i, column in enumerate(source):
                    mask = target._replace(
                        address=target.address + i * target.strides[1],
                        shape=target.shape[:1],
                        strides=target.strides[:1],
                    )
                    launches.append(_launch(column, mask, row_count))
            else:
                launches.append(_launch(source, target, row_count))
        launches = [launch for launch in launches if launch is not None]
        if not launches:
            return
        self._device.load(PTX, KERNELS)
        with owned.Queued(self._device, self._stream) as touched:
            touched += self._kept
            rows = self._upload(touched)
            for name, extent, parameters in launches:
                self._device.launch(name, *_grid(*extent), self._stream, [rows, self._count, *parameters])

    def _upload(self, touched: list[Any]) -> int:
        """The address of the row numbers on the device."""
        if isinstance(self._rows, int):
            return self._rows
        memory = owned.Allocation(self._device, self._rows.nbytes)
        touched.append(memory.hold())
        self._device.write(memory.address, self._rows.ctypes.data, self._rows.nbytes, self._stream)
        return memory.address


def _interface(array: Any) -> dict[str, Any] | None:
    """How an array on a GPU lies there; None for anything else."""
    if isinstance(array, owned.DeviceArray):
        return array.interface()
    return getattr(array, "__cuda_array_interface__", None)


Launch = tuple[str, tuple[int, int], list[int]]
"""A kernel, the extents along x and y, and its parameters after the row numbers and their count."""


def _launch(source: Array | None, target: Target, row_count: int) -> Launch | None:
    """How one array is gathered. None if it has no bytes."""
    if 0 in target.shape:
        return None
    count = target.shape[0]
    if source is None:
        return FOUND, (count, 1), [row_count, target.address, target.strides[0]]
    address = source._view.address + source.offset
    width = int(target.typestr[2:])
    row_bytes = math.prod(target.shape[1:]) * width
    if _has_whole_rows(source) and _has_whole_rows(target):
        steps = (address, target.address, source.strides[0], target.strides[0])
        unit = next(unit for unit in WIDTHS if row_bytes % unit == 0 and all(step % unit == 0 for step in steps))
        columns, column_step, out_column_step = row_bytes // unit, unit, unit
    elif len(target.shape) == 2:
        unit, columns = width, target.shape[1]
        column_step, out_column_step = source.strides[1], target.strides[1]
    else:
        raise errors.InvalidArgument(f"`out` of {target.shape} has rows that are not contiguous", "OUT")
    if target.address % width or any(step % width or step < 0 for step in (target.strides[0], out_column_step)):
        raise errors.InvalidArgument(f"`out` lies at no multiples of {width} bytes, or backwards", "OUT")
    fill = fill_of(target.typestr)
    halves = [int.from_bytes(fill[:8], "little"), int.from_bytes(fill[8:], "little")]
    # As the kernel itself chooses what x runs along.
    extent = (count, columns) if target.strides[0] < out_column_step else (columns, count)
    source_steps = [address, row_count, source.strides[0], columns, column_step]
    return f"pinion_gather_{unit}", extent, [*source_steps, target.address, target.strides[0], out_column_step, *halves]


def _has_whole_rows(array: Array | Target) -> bool:
    """Whether the values of a row lie side by side."""
    return tuple(array.strides[1:]) == contiguous(array.shape, int(array.typestr[2:]))[1:]


def _grid(x: int, y: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Blocks of a grid and threads of a block, for extents along x and y."""
    wide = min(BLOCK_THREADS, 1 << (x - 1).bit_length())
    high = BLOCK_THREADS // wide
    return (min(-(-x // wide), MAX_BLOCKS_X), min(-(-y // high), MAX_BLOCKS_Y)), (wide, high)
