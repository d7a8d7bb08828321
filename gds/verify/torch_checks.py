"""What torch and CuPy make of device memory that is not theirs, checked and measured.

    python3 torch_checks.py --out FILE.json [--device cuda|cpu] [--folder FOLDER] [--mib N] [--seconds N]

Memory is made, exported as a descriptor, imported and mapped through the driver with ctypes, as a client of a pin
does it; torch and CuPy then take it by `__cuda_array_interface__` and by DLPack. `--device cpu` runs what can be run
without a GPU, on plain memory: a test of this script, whose figures mean nothing.

Prints a table, writes JSON, and exits with 0 also when a check differs. Each check that cannot be made says why.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import sys
import time
import weakref
from pathlib import Path

GRANULE = 2 << 20
HERE = Path(__file__).resolve().parent


class Report:
    """Checks, figures and what is missing, printed as they come."""

    def __init__(self):
        self.checks, self.figures, self.missing, self.facts = [], [], [], {}

    def check(self, name, holds, saw):
        self.checks.append({"name": name, "verdict": "holds" if holds else "differs", "saw": str(saw)})
        print(f"{'ok' if holds else '!!'} {name}\n       {saw}", flush=True)

    def figure(self, name, given, value, unit, beside=None, beside_value=None):
        self.figures.append(
            {"name": name, "with": given, "value": value, "unit": unit, "beside": beside, "beside_value": beside_value}
        )
        ratio = f"  {value / beside_value:.2f} x {beside} ({beside_value:.4g})" if beside_value else ""
        print(f"   {name:<46} {given:<34} {value:>10.4g} {unit}{ratio}", flush=True)

    def lacks(self, name, why):
        self.missing.append({"name": name, "why": str(why)})
        print(f"-- {name}: {why}", flush=True)

    def json(self):
        return {"torch_checks": 1, "facts": self.facts, "checks": self.checks, "figures": self.figures,
                "not_measured": self.missing}  # fmt: skip


# -- memory of the device


class Prop(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("handle_types", ctypes.c_int), ("location_kind", ctypes.c_int),
                ("location_id", ctypes.c_int), ("win32", ctypes.c_void_p), ("flags", ctypes.c_ubyte * 8)]  # fmt: skip


class Access(ctypes.Structure):
    _fields_ = [("location_kind", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int)]


class Driver:
    """Calls of the driver by name; integers are passed as 64 bits, an answer other than 0 is an exception."""

    def __init__(self, library="libcuda.so.1"):
        self.library = ctypes.CDLL(library)
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *arguments):
        wide = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
        code = getattr(self.library, name)(*wide)
        if code != 0:
            raise RuntimeError(f"{name} answered {code}")


class DeviceMemory:
    """Memory made, exported, imported and mapped anew, as in the process of a trainer."""

    def __init__(self, driver, size):
        self.driver, self.size = driver, -(-size // GRANULE) * GRANULE
        prop = Prop(1, 1, 1, 0)
        made, descriptor = ctypes.c_uint64(), ctypes.c_int(-1)
        driver.call("cuMemCreate", ctypes.byref(made), self.size, ctypes.byref(prop), 0)
        driver.call("cuMemExportToShareableHandle", ctypes.byref(descriptor), made, 1, 0)
        start = time.perf_counter()
        self.handle, self.address = ctypes.c_uint64(), ctypes.c_uint64()
        driver.call("cuMemImportFromShareableHandle", ctypes.byref(self.handle), descriptor.value, 1)
        driver.call("cuMemAddressReserve", ctypes.byref(self.address), self.size, 0, 0, 0)
        driver.call("cuMemMap", self.address, self.size, 0, self.handle, 0)
        access = Access(1, 0, 3)
        driver.call("cuMemSetAccess", self.address, self.size, ctypes.byref(access), 1)
        self.import_seconds = time.perf_counter() - start
        os.close(descriptor.value)
        driver.call("cuMemRelease", made)
        self.pointer = self.address.value

    def close(self):
        self.driver.call("cuMemUnmap", self.address, self.size)
        self.driver.call("cuMemAddressFree", self.address, self.size)
        self.driver.call("cuMemRelease", self.handle)


class HostMemory:
    """The same for a run without a GPU."""

    import_seconds = 0.0

    def __init__(self, size):
        self.size = size
        self.buffer = ctypes.create_string_buffer(size + 4096)
        self.pointer = -(-ctypes.addressof(self.buffer) // 4096) * 4096

    def close(self):
        self.buffer = None


# -- two ways to hand it over


class ByInterface:
    """`__cuda_array_interface__` version 3 of float32 at byte strides."""

    def __init__(self, pointer, shape, strides, read_only=False):
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "<f4", "data": (pointer, read_only), "strides": strides, "version": 3,
        }  # fmt: skip


class DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
                ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64)]  # fmt: skip


class Managed(ctypes.Structure):
    pass


DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class ByDlpack:
    """DLPack of float32 at strides in elements; counts how often its deleter ran."""

    def __init__(self, pointer, shape, strides, device):
        self.device, self.deleted = device, 0
        dims = ctypes.c_int64 * len(shape)
        self.shape, self.strides = dims(*shape), dims(*strides)
        tensor = DLTensor(pointer, *device, len(shape), 2, 32, 1, self.shape, self.strides, 0)
        self.managed = Managed(tensor, None, DELETER(self._delete))

    def _delete(self, _):
        self.deleted += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


# -- checks


class Scene:
    """A matrix of float32, column by column at one pitch, whose values are their row plus 1000 times their column."""

    def __init__(self, torch, on, rows, columns):
        self.torch, self.cuda, self.rows, self.columns = torch, on == "cuda", rows, columns
        self.pitch = -(-rows // 1024) * 1024
        size = self.pitch * columns * 4
        self.driver = Driver() if self.cuda else None
        self.memory = DeviceMemory(self.driver, size) if self.cuda else HostMemory(size)
        self.pointer = self.memory.pointer
        self.device = (2, 0) if self.cuda else (1, 0)
        whole = self.torch.from_dlpack(self.dlpack((columns, self.pitch), (self.pitch, 1)))
        row = self.torch.arange(self.pitch, device=whole.device, dtype=torch.float32)
        for column in range(columns):
            whole[column] = row + 1000 * column
        self.synchronize()

    def synchronize(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def dlpack(self, shape, strides):
        self.last = ByDlpack(self.pointer, shape, strides, self.device)
        self.kept = [*getattr(self, "kept", []), self.last]  # a deleter is called after the tensor's end
        return self.last

    def matrix(self):
        """Rows by columns, without a copy."""
        return self.torch.from_dlpack(self.dlpack((self.rows, self.columns), (1, self.pitch)))


def attempt(report, name, check, *arguments):
    """Runs a check; one that raises is reported, and the rest goes on."""
    try:
        check(report, *arguments)
    except Exception as error:
        report.check(name, False, f"{type(error).__name__}: {error}")


def interface(report, scene):
    torch = scene.torch
    strides = (4, 4 * scene.pitch)
    array = ByInterface(scene.pointer, (scene.rows, scene.columns), strides)
    tensor = torch.as_tensor(array, device="cuda")
    same = tensor.data_ptr() == scene.pointer and tensor.stride() == (1, scene.pitch)
    right = bool((tensor[7] == 7 + 1000 * torch.arange(scene.columns, device="cuda")).all())
    report.check("torch: array interface without a copy, strides kept", same and right,
                 f"pointer and strides kept: {same}, values right: {right}")  # fmt: skip
    alive, keeper = weakref.ref(array), tensor[3:]
    del array, tensor
    gc.collect()
    kept = alive() is not None
    del keeper
    gc.collect()
    report.check("torch: a view keeps the exporter, and lets it go at last", kept and alive() is None,
                 f"alive while a view lives: {kept}, gone after: {alive() is None}")  # fmt: skip
    try:
        torch.as_tensor(ByInterface(scene.pointer, (16,), (4,), read_only=True), device="cuda")
        report.check("torch: read_only is refused", False, "it was taken: pins could say read_only")
    except Exception as error:
        report.check("torch: read_only is refused", True, f"{type(error).__name__}: {error}")


def dlpack(report, scene):
    torch = scene.torch
    tensor = scene.matrix()
    owner = scene.last
    same = tensor.data_ptr() == scene.pointer and tensor.stride() == (1, scene.pitch)
    column = tensor[:, 2]
    right = bool((column[:100] == torch.arange(100, device=tensor.device) + 2000).all())
    report.check("torch: DLPack without a copy, strides kept", same and right,
                 f"pointer and strides kept: {same}, values right: {right}")  # fmt: skip
    before = owner.deleted
    del tensor
    gc.collect()
    during = owner.deleted
    del column
    gc.collect()
    report.check("torch: the deleter runs once, when the last view is gone", (before, during, owner.deleted) == (0, 0, 1),
                 f"{before} before, {during} while a view lived, {owner.deleted} after")  # fmt: skip


def by_cupy(report, scene):
    cupy = importlib.import_module("cupy")
    report.facts["cupy"] = cupy.__version__
    strides = (4, 4 * scene.pitch)
    array = cupy.asarray(ByInterface(scene.pointer, (scene.rows, scene.columns), strides))
    taken = cupy.from_dlpack(scene.dlpack((scene.rows, scene.columns), (1, scene.pitch)))
    owner = scene.last
    same = array.data.ptr == taken.data.ptr == scene.pointer and array.strides == taken.strides == strides
    right = float(taken[5, 1]) == 1005.0 and float(array[5, 1]) == 1005.0
    report.check("cupy: both without a copy, strides kept", same and right, f"kept: {same}, values right: {right}")
    del taken, array
    gc.collect()
    report.check("cupy: the deleter runs once", owner.deleted == 1, f"{owner.deleted} times")


def first_tensor(report, scene):
    """From a descriptor to a value on the host that a tensor over it gave."""
    torch = scene.torch
    for mib in (64, 1024) if scene.cuda else (4,):
        memory = DeviceMemory(scene.driver, mib << 20) if scene.cuda else HostMemory(mib << 20)
        start = time.perf_counter()
        owner = ByDlpack(memory.pointer, (mib << 18,), (1,), scene.device)
        tensor = torch.from_dlpack(owner)
        tensor[:16].zero_()
        float(tensor[3])
        seconds = memory.import_seconds + time.perf_counter() - start
        report.figure("import to the first value of a tensor", f"{mib} MiB", seconds * 1e3, "ms")
        del tensor
        scene.synchronize()
        memory.close()


def rate(scene, seconds, moved, work):
    """GB/s of `moved` bytes a call."""
    work()
    scene.synchronize()
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        for _ in range(10):
            work()
        calls += 10
        scene.synchronize()
    return moved * calls / 1e9 / (time.perf_counter() - start)


def gather(report, scene, seconds):
    """Shuffled rows, column by column and row by row, beside a copy on the device: bytes read and written."""
    torch = scene.torch
    matrix = scene.matrix()
    source = torch.empty(scene.pitch * scene.columns, dtype=torch.float32, device=matrix.device)
    target = torch.empty_like(source)
    copy = rate(scene, seconds, 2 * source.nbytes, lambda: target.copy_(source))
    report.figure("device copy, read and written", f"{source.nbytes >> 20} MiB", copy, "GB/s")
    del source, target
    count = min(65_536, scene.rows)
    rows = torch.randperm(scene.rows, device=matrix.device)[:count]
    moved, given = 2 * count * scene.columns * 4, f"{count} x {scene.columns} of {scene.rows} rows"
    by_columns = torch.empty((scene.columns, count), dtype=torch.float32, device=matrix.device).t()
    by_rows = torch.empty((count, scene.columns), dtype=torch.float32, device=matrix.device)
    contiguous = matrix.contiguous()
    for name, work in (
        ("gather: column-major, index_select", lambda: matrix.index_select(0, rows)),
        ("gather: column-major, out by columns", lambda: torch.index_select(matrix.t(), 1, rows, out=by_columns.t())),
        ("gather: row-major, index_select", lambda: torch.index_select(contiguous, 0, rows, out=by_rows)),
    ):
        report.figure(name, given, rate(scene, seconds, moved, work), "GB/s", "device copy", copy)
    right = torch.equal(matrix.index_select(0, rows), contiguous.index_select(0, rows))
    report.check("torch: a gather from strided memory is right", right, f"equal: {right}")
    attempt(report, "kernel: pinion_gather", own_kernel, scene, matrix, rows, seconds, copy)


def own_kernel(report, scene, matrix, rows, seconds, copy):
    """The package's own gather, from the PTX text that it ships."""
    ptx = next((p for p in HERE.parents[1].glob("python/pinion/kernels/gather.ptx")), None)
    if ptx is None or not scene.cuda:
        report.lacks("kernel: pinion_gather", "no gather.ptx in python/pinion/kernels" if ptx is None else "no GPU")
        return
    torch, driver = scene.torch, scene.driver
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    driver.call("cuModuleLoadData", ctypes.byref(module), ptx.read_bytes() + b"\0")
    driver.call("cuModuleGetFunction", ctypes.byref(function), module, b"pinion_gather_4")
    count = len(rows)
    for layout in ("rows", "columns"):
        shape = (count, scene.columns) if layout == "rows" else (scene.columns, count)
        out = torch.full(shape, -1.0, device="cuda")
        steps = (4 * scene.columns, 4) if layout == "rows" else (4, 4 * count)
        values = [rows.data_ptr(), count, scene.pointer, scene.rows, 4, scene.columns, 4 * scene.pitch,
                  out.data_ptr(), *steps, 0, 0]  # fmt: skip
        held = [ctypes.c_uint64(value) for value in values]
        pointers = (ctypes.c_void_p * len(held))(*[ctypes.addressof(one) for one in held])
        inner, outer = (scene.columns, count) if layout == "rows" else (count, scene.columns)
        grid = (min(-(-inner // 256), 1 << 16), min(outer, 1 << 12), 1)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

        def launch(grid=grid, stream=stream, pointers=pointers):
            driver.call("cuLaunchKernel", function, *grid, 256, 1, 1, 0, stream, pointers, None)

        launch()
        scene.synchronize()
        expected = matrix.index_select(0, rows)
        right = torch.equal(out if layout == "rows" else out.t(), expected)
        report.check(f"kernel: pinion_gather, out by {layout}", right, f"equal to index_select: {right}")
        speed = rate(scene, seconds, 2 * count * scene.columns * 4, launch)
        given = f"{count} x {scene.columns}, out by {layout}"
        report.figure("gather: pinion_gather", given, speed, "GB/s", "device copy", copy)


def kvikio(report, folder):
    """NVIDIA's reader, where it is installed."""
    try:
        module = importlib.import_module("kvikio")
        cupy = importlib.import_module("cupy")
    except Exception as error:
        report.lacks("KvikIO", f"{type(error).__name__}: {error}")
        return
    if not folder:
        report.lacks("KvikIO", "no folder was given (--folder)")
        return
    report.facts["kvikio"] = module.__version__
    path = Path(folder) / "gds-verify-kvikio.bin"
    try:
        block = os.urandom(16 << 20)
        with path.open("wb") as file:
            for _ in range(64):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        buffer = cupy.empty(64 * len(block), dtype=cupy.uint8)
        for threads in (1, 4, 8, 16):
            read_by_kvikio(report, module, path, buffer, threads)
    finally:
        path.unlink(missing_ok=True)


def read_by_kvikio(report, module, path, buffer, threads):
    try:
        module.defaults.set("num_threads", threads)
    except AttributeError:
        module.defaults.num_threads_reset(threads)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    start = time.perf_counter()
    with module.CuFile(path, "r") as file:
        came = file.read(buffer)
    elapsed = time.perf_counter() - start
    if came != buffer.nbytes:
        report.check("KvikIO reads the whole file", False, f"{came} of {buffer.nbytes} bytes")
    report.figure("KvikIO: read, cold", f"{threads} threads", came / 1e9 / elapsed, "GB/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", help="where KvikIO's file is written, on the disk to measure")
    parser.add_argument("--mib", type=int, default=1024, help="device memory of the matrix")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each figure")
    options = parser.parse_args()
    report = Report()
    try:
        run(report, options)
    finally:
        Path(options.out).write_text(json.dumps(report.json(), indent=1) + "\n")
    return 0


def run(report, options):
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        report.lacks("torch and everything over it", f"{type(error).__name__}: {error}")
        return
    report.facts["torch"] = torch.__version__
    if options.device == "cuda" and not torch.cuda.is_available():
        report.lacks("torch and everything over it", "torch sees no GPU")
        return
    if options.device == "cuda":
        report.facts["device"] = torch.cuda.get_device_name(0)
        torch.zeros(1, device="cuda")
    columns = 256
    rows = max(1024, (options.mib << 20) // (4 * columns) // 1024 * 1024)
    scene = Scene(torch, options.device, rows, columns)
    attempt(report, "torch: DLPack", dlpack, scene)
    if scene.cuda:
        attempt(report, "torch: array interface", interface, scene)
        attempt(report, "cupy", by_cupy, scene)
        attempt(report, "KvikIO", kvikio, options.folder)
    else:
        report.lacks("the array interface, cupy, KvikIO", "no GPU (--device cpu)")
    attempt(report, "first tensor", first_tensor, scene)
    attempt(report, "gather", gather, scene, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
