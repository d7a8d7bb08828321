"""A GPU for tests: the fake driver (gds/fake-driver), loaded into this process, and slots in its memory.

Loaded by its path before anything asks for `libcuda.so.1`, so that every later load of that name in this process is
answered with it. Programs of their own find it through LD_LIBRARY_PATH (`environment`).
"""

import ctypes
import os
import tempfile
import time
from ctypes import byref, c_char, c_char_p, c_int, c_size_t, c_ulonglong, c_void_p
from pathlib import Path

from support.process import binary


def library():
    """$PINION_TEST_FAKE_DRIVER, or the one beside the binary."""
    chosen = os.environ.get("PINION_TEST_FAKE_DRIVER")
    return Path(chosen) if chosen else binary().parent / "libpinion_gds_fake_driver.so"


def environment():
    """For programs that are to find the fake driver."""
    folder = Path(tempfile.mkdtemp(prefix="pinion-fake-"))
    for name in ("libcuda.so", "libcuda.so.1"):
        (folder / name).symlink_to(library())
    return {"LD_LIBRARY_PATH": str(folder)}


class _Prop(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location_type", c_int),
        ("location_id", c_int),
        ("win32", c_void_p),
        ("flags", c_char * 8),
    ]


class _Access(ctypes.Structure):
    _fields_ = [("location_type", c_int), ("location_id", c_int), ("flags", c_int)]


class Gpu:
    """The driver as a producer uses it, and the fake's own controls."""

    def __init__(self):
        self.driver = ctypes.CDLL(str(library()))
        self.call("cuInit", 0)
        self.context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(self.context), 0)
        raw = (c_char * 16)()
        self.call("cuDeviceGetUuid_v2", byref(raw), 0)
        digits = raw.raw.hex()
        self.uuid = f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
        self.device = {"kind": "cuda", "uuid": self.uuid, "ordinal": 0}

    def call(self, name, *arguments):
        if name.startswith(("cuMem", "cuStream", "cuCtxSync")):
            self.call("cuCtxSetCurrent", self.context)
        code = getattr(self.driver, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def text(self, function):
        """What a control function of the fake has to say."""
        room = ctypes.create_string_buffer(1 << 16)
        getattr(self.driver, function)(room, c_size_t(len(room)))
        return room.value.decode()

    def left(self, before):
        """What is there that was not. Streams are the tests' own, and kernels are loaded once for a process."""
        new = [line for line in self.text("fake_live").splitlines() if line not in before]
        return [line for line in new if "stream" not in line and "modules" not in line]

    def calls(self, name):
        self.driver.fake_calls.restype = c_ulonglong
        return self.driver.fake_calls(c_char_p(name.encode()))

    def fail(self, rules):
        assert self.driver.fake_rules(c_char_p(rules.encode())) == 0

    def late(self, seconds):
        """What is queued from now on starts so much later."""
        micros = c_ulonglong(int(seconds * 1e6))
        self.driver.fake_delay(micros, micros, c_ulonglong(1))

    def stream(self):
        made = c_ulonglong()
        self.call("cuStreamCreate", byref(made), 1)
        return made.value

    def memory(self, size):
        return GpuMemory(self, size)


class GpuMemory:
    """One slot in exportable device memory."""

    def __init__(self, gpu, size):
        self.gpu = gpu
        self.size = size
        self.handle, self.address = c_ulonglong(), c_ulonglong()
        gpu.call("cuMemCreate", byref(self.handle), c_size_t(size), byref(_Prop(1, 1, 1, 0, None, b"")), c_ulonglong(0))
        none = c_ulonglong(0)
        gpu.call("cuMemAddressReserve", byref(self.address), c_size_t(size), c_size_t(0), none, none)
        gpu.call("cuMemMap", self.address, c_size_t(size), c_size_t(0), self.handle, c_ulonglong(0))
        gpu.call("cuMemSetAccess", self.address, c_size_t(size), byref(_Access(1, 0, 3)), c_size_t(1))

    def write(self, data):
        source = (c_char * self.size).from_buffer(data)
        self.gpu.call("cuMemcpyHtoD_v2", self.address, source, c_size_t(self.size))

    def read(self, offset, size):
        out = ctypes.create_string_buffer(max(size, 1))
        if size:
            self.gpu.call("cuMemcpyDtoH_v2", out, c_ulonglong(self.address.value + offset), c_size_t(size))
        return out.raw[:size]

    def export(self):
        descriptor = c_int()
        self.gpu.call("cuMemExportToShareableHandle", byref(descriptor), self.handle, 1, c_ulonglong(0))
        return descriptor.value

    def close(self):
        self.gpu.call("cuMemUnmap", self.address, c_size_t(self.size))
        self.gpu.call("cuMemAddressFree", self.address, c_size_t(self.size))
        self.gpu.call("cuMemRelease", self.handle)


class QueuedRead:
    """A copy of device memory to page-locked host memory, queued on a stream and begun only after `seconds`."""

    def __init__(self, gpu, stream, address, size, seconds=1.0):
        self.gpu = gpu
        self.size = size
        self.stream = c_ulonglong(stream)
        self.out = c_void_p()
        gpu.call("cuMemHostAlloc", byref(self.out), c_size_t(size), 0)
        # The delay is drawn when the stream comes to the copy; what others do meanwhile is not delayed.
        gpu.late(seconds)
        gpu.call("cuMemcpyDtoHAsync_v2", self.out, c_ulonglong(address), c_size_t(size), self.stream)
        time.sleep(0.05)
        gpu.late(0)

    def is_done(self):
        return self.gpu.driver.cuStreamQuery(self.stream) == 0

    def bytes(self):
        """What it read, once it has."""
        self.gpu.call("cuStreamSynchronize", self.stream)
        data = ctypes.string_at(self.out, self.size)
        self.gpu.call("cuMemFreeHost", self.out)
        return data
