"""Memory of a GPU that this process owns: what was taken from a pin where torch is not there to own it.

It is freed by the rule of leases: once nothing refers to it any more and all work that could read it is done.

Elsewhere: the rule (`leases`), what is written here (`gather`).
"""

from __future__ import annotations

import math
import os
import threading
from typing import Any

from pinion import columns, cuda
from pinion.leases import Export, Hold, Releaser, Work

# Arrays in one allocation begin at multiples of this: what cuMemAlloc itself promises.
ALIGNMENT = 256

_lock = threading.Lock()
_releaser: Releaser | None = None


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _ender() -> Releaser:
    """The thread that frees: one for the process."""
    global _releaser
    with _lock:
        if _releaser is None:
            _releaser = Releaser(None)
        return _releaser


class Allocation(Work):
    """Memory of a GPU, freed after all work on it."""

    def __init__(self, device: cuda.Device, size: int):
        """Raises `DeviceError` if there is not so much."""
        super().__init__(_ender(), device)
        self.size = size
        self.address = device.allocate(max(size, ALIGNMENT))
        self.releaser.took()

    def __str__(self) -> str:
        return f"an allocation of {self.size} bytes"

    def finish(self) -> None:
        self.device.free(self.address)


class Queued(Work):
    """Work that was queued on a stream: keeps what it touches until it is done."""

    def __init__(self, device: cuda.Device, stream: int):
        super().__init__(_ender(), device)
        self.stream = stream
        self.touched: list[Any] = []

    def __str__(self) -> str:
        return "what a queued gather touches"

    def __enter__(self) -> list[Any]:
        """Queue within the block, after appending what is touched to this list."""
        self.releaser.took()
        return self.touched

    def __exit__(self, *_: Any) -> None:
        # Also when a launch failed: those before it are queued.
        self.record(self.stream)
        self.releaser.put(self)

    def finish(self) -> None:
        self.touched.clear()


class DeviceArray:
    """Contiguous values on a GPU, of this process's own: DLPack and `__cuda_array_interface__`, without a copy.

    They are there once `stream` has come to them, which consumers of both protocols wait for; the stream lives as
    long as the array. Arrays of one `View.take` share an allocation.
    """

    def __init__(self, hold: Hold, address: int, shape: tuple[int, ...], typestr: str, stream: int):
        self._hold = hold
        self._device: cuda.Device = hold.lease.device
        self.address = address
        self.shape = shape
        self.typestr = typestr
        self.stream = stream
        # Whoever takes `__cuda_array_interface__` keeps this object, not the dictionary.
        self._export: Export | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """In bytes."""
        return columns.contiguous(self.shape, int(self.typestr[2:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.typestr!r}, {self._device.uuid})"

    def __dlpack_device__(self) -> tuple[int, int]:
        return columns.DLPACK_CUDA, self._device.ordinal

    def __dlpack__(
        self, *, stream: int | None = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """A DLPack capsule. The consumer's `stream` waits for the values, and the memory for what is queued there.

        None is the legacy default stream, as the protocol says; with -1 nothing waits for the values.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("an array on a GPU is exported where it lies, and without a copy")
        if stream == 0:
            raise BufferError("stream 0 is ambiguous: 1 is the legacy default stream, 2 that of the thread")
        if stream != -1:
            self._device.order(self.stream, cuda.LEGACY_STREAM if stream is None else stream)
        self._read_on(None if stream in (None, -1) else stream)
        return columns.capsule(Export(self._hold), self.interface(), self.__dlpack_device__(), max_version)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self._export is None:
            self._export = Export(self._hold)
        self._read_on(None)
        return self.interface()

    def to_numpy(self) -> Any:
        """A copy on the host. Waits for the values."""
        import numpy as np

        array = np.empty(self.shape, self.typestr)
        if array.nbytes:
            self._device.finish(self.stream)
            self._device.read(self.address, array.ctypes.data, array.nbytes)
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("an array on a GPU is copied to the host")
        array = self.to_numpy()
        return array if dtype is None else array.astype(dtype)

    def _read_on(self, stream: int | None) -> None:
        work = self._hold.lease
        work.exported = True
        if stream is None:
            work.unknown = True
        else:
            work.named.add(stream)

    def interface(self) -> dict[str, Any]:
        """`__cuda_array_interface__` for work that is known: whoever asks keeps this object until it is done."""
        return {
            "shape": self.shape,
            "typestr": self.typestr,
            "strides": self.strides,
            "data": (self.address, False),
            "version": 3,
            "stream": self.stream or cuda.LEGACY_STREAM,
        }


def arrays(device: cuda.Device, forms: list[tuple[tuple[int, ...], str]], stream: int) -> list[DeviceArray]:
    """New arrays of these shapes and types, in one allocation, to be written on a stream."""
    offsets, end = [], 0
    for shape, typestr in forms:
        offsets.append(end)
        size = math.prod(shape) * int(typestr[2:])
        end += -(-size // ALIGNMENT) * ALIGNMENT
    memory = Allocation(device, end)
    hold = memory.hold()
    made = zip(forms, offsets)
    return [DeviceArray(hold, memory.address + offset, shape, typestr, stream) for (shape, typestr), offset in made]
