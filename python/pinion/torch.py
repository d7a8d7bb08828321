"""Pins as torch tensors, and batches for training read from a pin on its device.

    loader = pinion.torch.batches(pin, batch_size=65536, shuffle=True)
    for features in loader:          # {feature: tensor of 65536 values}, gathered on the device
        ...

No byte of a row crosses the bus for a batch: the order is made on the device, and rows are gathered there.

Elsewhere: what a view is, and how nulls are read (`view`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from pinion import errors

if TYPE_CHECKING:
    import pyarrow as pa

    from pinion.columns import Array
    from pinion.pin import Pin
    from pinion.view import View

# torch gathers no unsigned integers wider than a byte: their bits are gathered instead.
_SAME_BITS = {
    getattr(torch, name): signed
    for name, signed in (("uint16", torch.int16), ("uint32", torch.int32), ("uint64", torch.int64))
    if hasattr(torch, name)
}


def tensor(array: Array) -> torch.Tensor:
    """An array of a view as a tensor where it lies. It keeps the lease while it, or a view of it, lives."""
    return torch.from_dlpack(array)


def tensors(view: View, features: Iterable[str] | None, *, matrix: bool, mask: bool) -> Any:
    """See `View.to_torch`."""
    columns = view._matrix_columns(features) if matrix else view._columns(features)
    for column in columns:
        column.check_nulls(masked=mask)
    if matrix:
        values: Any = tensor(view.matrix([column.name for column in columns]))
        return (values, torch.stack([_mask(view, c) for c in columns], dim=1)) if mask else values
    values = {column.name: tensor(column) for column in columns}
    return (values, {column.name: _mask(view, column) for column in columns}) if mask else values


def _mask(view: View, column: Any) -> torch.Tensor:
    if column.valid is not None:
        return tensor(column.valid)
    return torch.ones((), dtype=torch.bool, device=_device(view.mapping.dlpack_device)).expand(view.rows)


def _device(dlpack_device: tuple[int, int]) -> torch.device:
    return torch.device("cpu") if dlpack_device[0] == 1 else torch.device("cuda", dlpack_device[1])


def can_use(dlpack_device: tuple[int, int]) -> bool:
    """Whether this torch can use a device."""
    return dlpack_device[0] == 1 or torch.cuda.is_available()


def row_ids(ids: pa.Buffer, dlpack_device: tuple[int, int]) -> torch.Tensor:
    """Row numbers off the lane, on a device."""
    host = torch.frombuffer(bytearray(ids), dtype=torch.int64) if ids.size else torch.empty(0, dtype=torch.int64)
    return host.to(_device(dlpack_device))


def take(
    view: View, rows: Any, features: Iterable[str] | None, *, matrix: bool, mask: bool, out: Any, stream: Any
) -> Any:
    """See `View.take`."""
    if stream is not None:
        view.use(stream)
        # The row numbers may still be on their way.
        stream.wait_stream(torch.cuda.current_stream(_device(view.mapping.dlpack_device)))
        _work_on(stream, rows, out)
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        values = tensors(view, features, matrix=matrix, mask=mask)
        places = torch.as_tensor(rows, dtype=torch.int64, device=_device(view.mapping.dlpack_device))
        return _Gather(places, view.rows).all(values, out)


def _work_on(stream: torch.cuda.Stream, *given: Any) -> None:
    """Says that a stream works on the caller's tensors: let go of, their memory is nobody else's before it has."""
    for part in given:
        if isinstance(part, torch.Tensor):
            if part.is_cuda:
                part.record_stream(stream)
        elif isinstance(part, dict):
            _work_on(stream, *part.values())
        elif isinstance(part, (tuple, list)):
            _work_on(stream, *part)


def _current_stream(view: View) -> torch.cuda.Stream | None:
    """torch's current stream on the view's GPU; None on the host."""
    device = _device(view.mapping.dlpack_device)
    return None if device.type == "cpu" else torch.cuda.current_stream(device)


# -- for the gather of this package


_DTYPES = {
    "|i1": torch.int8, "<i2": torch.int16, "<i4": torch.int32, "<i8": torch.int64, "|u1": torch.uint8,
    "<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64, "|b1": torch.bool,
} | {f"<u{bits.itemsize}": unsigned for unsigned, bits in _SAME_BITS.items()}  # fmt: skip


def empty(shape: tuple[int, ...], typestr: str, stream: Any = None) -> torch.Tensor:
    """A new tensor with anything in it: on the host, or on a stream's GPU, where its memory is the stream's."""
    if stream is None:
        return torch.empty(shape, dtype=_DTYPES[typestr])
    with torch.cuda.stream(stream):
        return torch.empty(shape, dtype=_DTYPES[typestr], device=stream.device)


def place(tensor: Any, ordinal: int) -> tuple[int, tuple[int, ...], tuple[int, ...], str]:
    """Address, shape, strides in bytes and type of a tensor on a GPU."""
    if not isinstance(tensor, torch.Tensor) or tensor.device != torch.device("cuda", ordinal):
        raise errors.InvalidArgument(f"`out` is a tensor on the pin's device, cuda:{ordinal}", "OUT")
    strides = tuple(step * tensor.element_size() for step in tensor.stride())
    typestr = next((name for name, dtype in _DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype))
    return tensor.data_ptr(), tuple(tensor.shape), strides, typestr


def on_stream(rows: Any, stream: Any, ordinal: int) -> tuple[torch.Tensor, torch.cuda.Stream]:
    """Row numbers on a GPU, and the stream to go on with: the one given, or torch's current one."""
    current = torch.cuda.current_stream(ordinal)
    if stream is None:
        stream = current
    else:
        # The row numbers may still be on their way.
        stream.wait_stream(current)
        _work_on(stream, rows)
    with torch.cuda.stream(stream):
        places = torch.as_tensor(rows, dtype=torch.int64, device=torch.device("cuda", ordinal)).contiguous()
    if places.dim() != 1:
        raise errors.InvalidArgument(f"row numbers are one dimension, not {places.dim()}", "ROWS")
    return places, stream


class _Gather:
    """Rows by number; those that are none of a row are missing."""

    def __init__(self, rows: torch.Tensor, count: int):
        self._missing = (rows < 0) | (rows >= count)
        self._places = rows.clamp(min=0, max=max(count - 1, 0))
        # With no rows at all every number is missing, and there is nothing to index.
        self._empty = count == 0

    def all(self, values: Any, out: Any) -> Any:
        if isinstance(values, tuple):
            return tuple(self.all(part, None if out is None else out[i]) for i, part in enumerate(values))
        if isinstance(values, dict):
            return {name: self.one(part, None if out is None else out[name]) for name, part in values.items()}
        return self.one(values, out)

    def one(self, values: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        bits = _SAME_BITS.get(values.dtype)
        if bits is not None:
            taken = self.one(values.view(bits), None if out is None else out.view(bits))
            return taken.view(values.dtype) if out is None else out
        if self._empty:
            shape = (len(self._places), *values.shape[1:])
            taken = torch.empty(shape, dtype=values.dtype, device=values.device) if out is None else out.resize_(shape)
        else:
            taken = torch.index_select(values, 0, self._places, **({} if out is None else {"out": out}))
        missing = self._missing.view(-1, *[1] * (values.dim() - 1))
        return taken.masked_fill_(missing, float("nan") if values.is_floating_point() else 0)


class Batches(torch.utils.data.IterableDataset):
    """Batches of a pin: see `batches`."""

    def __init__(
        self,
        pin: Pin,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        features: Iterable[str] | None,
        matrix: bool,
        mask: bool,
        global_rank: int,
        global_size: int,
    ):
        if batch_size < 1 or not 0 <= global_rank < global_size:
            raise errors.InvalidArgument("batch_size is at least 1, and global_rank below global_size", "BATCHES")
        self.pin = pin
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.features = None if features is None else list(features)
        self.matrix = matrix
        self.mask = mask
        self.global_rank = global_rank
        self.global_size = global_size
        # The epoch that the next iteration is; with the seed it settles the order.
        self.epoch = 0

    def __len__(self) -> int:
        """Batches of an epoch, by the rows of the generation seen last."""
        rows = self.pin.row_count // self.global_size
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        if torch.utils.data.get_worker_info() is not None:
            raise errors.Forked(
                "a pin is read in the process that trains, where its device is: use it without a DataLoader, or"
                " with num_workers=0 and batch_size=None",
                "FORKED",
            )
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._epoch(epoch)

    def _epoch(self, epoch: int) -> Iterator[Any]:
        with self.pin.latest() as view:
            taken = self._taker(view)
            order = self._order(view, epoch)
            whole = len(order) // self.batch_size * self.batch_size
            stop = whole if self.drop_last else len(order)
            for start in range(0, stop, self.batch_size):
                # It may be another one for each batch.
                if (stream := _current_stream(view)) is not None:
                    view.use(stream)
                yield taken(order[start : start + self.batch_size])

    def _taker(self, view: View) -> Callable[[torch.Tensor], Any]:
        """What gathers rows by their numbers."""
        form: dict[str, Any] = {"matrix": self.matrix, "mask": self.mask}
        if view.is_lent:
            # Whole columns would be copied for tensors of them.
            return lambda rows: view.take(rows, self.features, **form)
        values = tensors(view, self.features, **form)
        return lambda rows: _Gather(rows, view.rows).all(values, None)

    def _order(self, view: View, epoch: int) -> torch.Tensor:
        """The rows of this rank, in the order of this epoch, on the device."""
        device = _device(view.mapping.dlpack_device)
        if self.shuffle:
            generator = torch.Generator(device).manual_seed(self.seed + epoch)
            order = torch.randperm(view.rows, generator=generator, device=device)
        else:
            order = torch.arange(view.rows, device=device)
        each = view.rows // self.global_size
        return order[self.global_rank :: self.global_size][:each] if self.global_size > 1 else order


def batches(
    pin: Pin,
    batch_size: int,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
    seed: int = 0,
    features: Iterable[str] | None = None,
    matrix: bool = False,
    mask: bool = False,
    global_rank: int = 0,
    global_size: int = 1,
) -> Batches:
    """An iterable dataset of batches, gathered on the pin's device: what `View.to_torch` gives, `batch_size` rows each.

    Every iteration is an epoch over the generation that is newest when it starts, leased until it ends: each row
    once, in an order that `seed` and the number of the epoch (`.epoch`, settable) settle. Batches own their memory.
    The last one may be smaller, unless `drop_last`. A fresh pin needs two slots to go on meanwhile; the next epoch
    reads what is newest then.

    With `global_size` processes each takes its share of the rows by `global_rank`, all equally many (the rest is left
    out); pin frozen, or they may read different generations.
    """
    return Batches(
        pin,
        batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        features=features,
        matrix=matrix,
        mask=mask,
        global_rank=global_rank,
        global_size=global_size,
    )
