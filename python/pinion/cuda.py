"""The CUDA driver through ctypes: what a client of pins needs of it, and nothing else.

Loads `libcuda.so.1` when it is first used; importing this module touches no driver. Every call is made with
the device's primary context current, the one that torch and CuPy use, and leaves the thread's own current
context as it was. A call that the driver refuses is a `DeviceError` with the driver's name of the code.

Elsewhere: the slots that are imported here (`mapping`), what is recorded when tensors die (`leases`), the kernels
(`gather`).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

from pinion.errors import DeviceError, DeviceUnavailable

LIBRARY = "libcuda.so.1"

SUCCESS, NOT_READY = 0, 600
HANDLE_POSIX_DESCRIPTOR = 1
LOCATION_DEVICE = 1
ACCESS_READ, ACCESS_READ_WRITE = 1, 3
EVENT_DISABLE_TIMING = 2
CAPTURE_MODE_RELAXED = 2

# As DLPack numbers kinds of devices.
DLPACK_CPU, DLPACK_CUDA = 1, 2

# Handles that stand for a thread's default streams.
LEGACY_STREAM = 1

_UUID = c_char * 16


class _AccessDesc(ctypes.Structure):
    _fields_ = [("location_type", c_int), ("location_id", c_int), ("flags", c_int)]


# Name: argument types. All of them return a code.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetUuid_v2": (POINTER(_UUID), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxSynchronize": (),
    "cuMemImportFromShareableHandle": (POINTER(c_ulonglong), c_void_p, c_int),
    "cuMemAddressReserve": (POINTER(c_ulonglong), c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemAddressFree": (c_ulonglong, c_size_t),
    "cuMemMap": (c_ulonglong, c_size_t, c_size_t, c_ulonglong, c_ulonglong),
    "cuMemUnmap": (c_ulonglong, c_size_t),
    "cuMemSetAccess": (c_ulonglong, c_size_t, POINTER(_AccessDesc), c_size_t),
    "cuMemRelease": (c_ulonglong,),
    "cuMemcpyDtoH_v2": (c_void_p, c_ulonglong, c_size_t),
    "cuMemcpyHtoDAsync_v2": (c_ulonglong, c_void_p, c_size_t, c_void_p),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
}
# Absent in old drivers.
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
}


class Driver:
    """The driver's functions, initialised in this process."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise DeviceUnavailable(f"no NVIDIA driver here: {error}", "NO_DRIVER") from error
        self._functions: dict[str, Any] = {}
        for name, types in (_FUNCTIONS | _OPTIONAL).items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                if name in _OPTIONAL:
                    continue
                raise DeviceUnavailable(f"{LIBRARY} is too old: it has no {name}", "OLD_DRIVER") from error
            function.restype = c_int
            function.argtypes = types
            self._functions[name] = function
        self.call("cuInit", 0)

    def code(self, name: str, *arguments: Any) -> int:
        """Calls a function, returns its code."""
        return self._functions[name](*arguments)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function; anything but success raises `DeviceError`."""
        code = self._functions[name](*arguments)
        if code != SUCCESS:
            raise self.error(name, code)

    def error(self, name: str, code: int) -> DeviceError:
        """The exception for a code of a function."""
        text = c_char_p()
        known = self._functions["cuGetErrorName"](code, byref(text)) == SUCCESS and text.value
        said = text.value.decode(errors="replace") if known else "unknown"
        return DeviceError(
            f"{name} failed with {code} ({said})", "DEVICE", {"call": name, "code": code, "name": said}
        )

    def has(self, name: str) -> bool:
        """Whether this driver has an optional function."""
        return name in self._functions


_driver: Driver | None = None
_process: int | None = None
_lock = threading.Lock()
_devices: dict[int, Device] = {}


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def driver() -> Driver:
    """The driver, loaded and initialised once.

    Raises `DeviceUnavailable` when there is none, or in a child forked from a process that had it: CUDA
    does not survive a fork.
    """
    global _driver, _process
    if _driver is None or _process != os.getpid():
        with _lock:
            if _process is not None and _process != os.getpid():
                raise DeviceUnavailable(
                    "CUDA cannot be used in a process forked from one that used it: start processes by 'spawn'"
                    " (torch: DataLoader(..., multiprocessing_context='spawn')), or read pins in the parent",
                    "FORKED",
                )
            if _driver is None:
                _driver = Driver()
                _process = os.getpid()
    return _driver


def format_uuid(raw: bytes) -> str:
    """As NVIDIA prints it: `GPU-` and 8-4-4-4-12 digits."""
    digits = raw.hex()
    ends = (8, 12, 16, 20, 32)
    return "GPU-" + "-".join(digits[start:end] for start, end in zip((0, *ends), ends))


def device_of(uuid: str) -> Device:
    """The device with a UUID, whatever number it has in this process.

    Raises `DeviceUnavailable` if this process does not see it.
    """
    table = driver()
    wanted = uuid.partition("-")[2].lower()
    count = c_int()
    table.call("cuDeviceGetCount", byref(count))
    seen = []
    for ordinal in range(count.value):
        handle, raw = c_int(), _UUID()
        table.call("cuDeviceGet", byref(handle), ordinal)
        table.call("cuDeviceGetUuid_v2", byref(raw), handle)
        seen.append(format_uuid(raw.raw))
        if seen[-1].partition("-")[2] == wanted:
            with _lock:
                known = _devices.get(ordinal)
                if known is None:
                    known = _devices[ordinal] = Device(table, handle.value, ordinal, uuid)
            return known
    raise DeviceUnavailable(
        f"the pin lies on {uuid}, which this process does not see (it sees {', '.join(seen) or 'no device'}):"
        " check CUDA_VISIBLE_DEVICES",
        "OTHER_DEVICE",
        {"uuid": uuid, "seen": seen},
    )


def stream_handle(stream: Any) -> int:
    """The handle of a stream: torch's, CuPy's, anything with `__cuda_stream__`, or a handle."""
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return handle
    if hasattr(stream, "__cuda_stream__"):
        return stream.__cuda_stream__()[1]
    if isinstance(stream, int):
        return stream
    raise TypeError(f"a stream is torch's, CuPy's or a handle, not {type(stream).__name__}")


class Device:
    """A device and its primary context, retained for the life of the process."""

    def __init__(self, table: Driver, handle: int, ordinal: int, uuid: str):
        self.driver = table
        self.handle = handle
        self.ordinal = ordinal
        self.uuid = uuid
        # Kernels that were loaded into the context, by name.
        self._kernels: dict[str, int] = {}
        self._context = c_void_p()
        table.call("cuDevicePrimaryCtxRetain", byref(self._context), handle)

    def __enter__(self) -> Device:
        """Makes the context current for this thread until the block ends."""
        self.driver.call("cuCtxPushCurrent_v2", self._context)
        return self

    def __exit__(self, *_: Any) -> None:
        self.driver.code("cuCtxPopCurrent_v2", byref(c_void_p()))

    def synchronize(self) -> None:
        """Waits for all work of the context that was queued before."""
        with self:
            self.driver.call("cuCtxSynchronize")

    def relax_capture(self) -> None:
        """Lets this thread call the driver while other threads capture graphs."""
        if self.driver.has("cuThreadExchangeStreamCaptureMode"):
            self.driver.code("cuThreadExchangeStreamCaptureMode", byref(c_int(CAPTURE_MODE_RELAXED)))

    def event(self) -> int:
        """A new event."""
        made = c_void_p()
        with self:
            self.driver.call("cuEventCreate", byref(made), EVENT_DISABLE_TIMING)
        return made.value

    def record(self, event: int, stream: int) -> None:
        """Lets an event stand behind all that was queued on a stream until now, instead of where it stood."""
        with self:
            self.driver.call("cuEventRecord", c_void_p(event), c_void_p(stream))

    def is_done(self, event: int) -> bool:
        """Whether all work before an event is done."""
        with self:
            code = self.driver.code("cuEventQuery", c_void_p(event))
        if code not in (SUCCESS, NOT_READY):
            raise self.driver.error("cuEventQuery", code)
        return code == SUCCESS

    def forget(self, event: int) -> None:
        """Destroys an event."""
        with self:
            self.driver.code("cuEventDestroy_v2", c_void_p(event))

    def read(self, address: int, into: int, size: int) -> None:
        """Copies device memory to host memory at `into`; waits for it."""
        with self:
            self.driver.call("cuMemcpyDtoH_v2", c_void_p(into), address, size)

    def write(self, address: int, source: int, size: int, stream: int) -> None:
        """Copies host memory to device memory in the order of a stream. Pageable memory has been read on return."""
        with self:
            self.driver.call("cuMemcpyHtoDAsync_v2", address, c_void_p(source), size, c_void_p(stream))

    def allocate(self, size: int) -> int:
        """The address of new memory with anything in it."""
        made = c_ulonglong()
        with self:
            self.driver.call("cuMemAlloc_v2", byref(made), size)
        return made.value

    def free(self, address: int) -> None:
        """Frees what was allocated: only once all work on it is done."""
        with self:
            self.driver.call("cuMemFree_v2", address)

    def finish(self, stream: int) -> None:
        """Waits for what was queued on a stream until now."""
        with self:
            self.driver.call("cuStreamSynchronize", c_void_p(stream))

    def order(self, first: int, then: int) -> None:
        """Lets what is queued on `then` from now on wait for what was queued on `first` until now."""
        # 0 and 1 both are the legacy default stream.
        if (first or LEGACY_STREAM) == (then or LEGACY_STREAM):
            return
        event = self.event()
        try:
            self.record(event, first)
            with self:
                self.driver.call("cuStreamWaitEvent", c_void_p(then), c_void_p(event), 0)
        finally:
            self.forget(event)

    def load(self, ptx: Path, names: Iterable[str]) -> None:
        """Loads a module's kernels for the life of the process; does nothing if they are there."""
        if all(name in self._kernels for name in names):
            return
        with _lock, self:
            module, found = c_void_p(), {}
            self.driver.call("cuModuleLoadData", byref(module), ptx.read_bytes())
            try:
                for name in names:
                    kernel = c_void_p()
                    self.driver.call("cuModuleGetFunction", byref(kernel), module, name.encode())
                    found[name] = kernel.value
            except BaseException:
                self.driver.code("cuModuleUnload", module)
                raise
            self._kernels.update(found)

    def launch(self, name: str, grid: tuple[int, int], block: tuple[int, int], stream: int, values: list[int]) -> None:
        """Queues a loaded kernel whose parameters all are of 64 bits."""
        parameters = [c_ulonglong(value) for value in values]
        places = (c_void_p * len(parameters))(*(ctypes.addressof(value) for value in parameters))
        kernel = c_void_p(self._kernels[name])
        with self:
            self.driver.call("cuLaunchKernel", kernel, *grid, 1, *block, 1, 0, c_void_p(stream), places, None)


class Imported:
    """An allocation of another process, mapped here: read-only where the driver accepts that."""

    def __init__(self, device: Device, descriptor: int, size: int):
        """Imports and maps `size` bytes. The descriptor stays the caller's, who may close it.

        Raises `DeviceError`; what was done before is undone.
        """
        self.device = device
        self.size = size
        self.address = 0
        self.read_only = False
        # Functions and arguments, in the order of what they undo.
        self._undo: list[tuple[Any, ...]] = []
        try:
            with device:
                self._map(descriptor)
        except BaseException:
            self.close()
            raise

    def _map(self, descriptor: int) -> None:
        table, size = self.device.driver, self.size
        handle, address = c_ulonglong(), c_ulonglong()
        table.call("cuMemImportFromShareableHandle", byref(handle), c_void_p(descriptor), HANDLE_POSIX_DESCRIPTOR)
        self._undo.append(("cuMemRelease", handle))
        table.call("cuMemAddressReserve", byref(address), size, 0, 0, 0)
        self._undo.append(("cuMemAddressFree", address, size))
        table.call("cuMemMap", address, size, 0, handle, 0)
        self._undo.append(("cuMemUnmap", address, size))
        access = _AccessDesc(LOCATION_DEVICE, self.device.ordinal, ACCESS_READ)
        self.read_only = table.code("cuMemSetAccess", address, size, byref(access), 1) == SUCCESS
        if not self.read_only:
            access.flags = ACCESS_READ_WRITE
            table.call("cuMemSetAccess", address, size, byref(access), 1)
        self.address = address.value

    def close(self) -> None:
        """Unmaps it: only once all work on it is done. Does nothing the second time.

        Raises `DeviceError` for the first step that failed, after the others were tried.
        """
        table = self.device.driver
        failed = []
        with self.device:
            while self._undo:
                name, *arguments = self._undo.pop()
                code = table.code(name, *arguments)
                if code != SUCCESS:
                    failed.append((name, code))
        self.address = 0
        if failed:
            raise table.error(*failed[0])
