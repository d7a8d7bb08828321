"""Rows taken from a pin by this package's own gather: the kernel over the fake driver, NumPy on the host.

The fears: a row number that reads beyond the slot; a value of the wrong width or row; a gather that is still queued
when its lease, its numbers or its result go; memory that stays; PTX that is not what its source says.

What is not tested here: that a GPU runs the PTX as the fake driver's model of it does.
"""

import gc
import os
import re
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pinion
import pinion.gather
import pyarrow as pa
import pytest
from support import gpu as fake
from support.pinned import ROWS, released, users
from support.pins import StubServer, TestPin
from support.process import REPOSITORY
from test_pins_gpu import client, double, gpu, pin, stub  # noqa: F401  (fixtures)

COMPILE = REPOSITORY / "python/compile_kernels.py"
MANY = [3, -1, 0, 19, 3, 3, ROWS, 10**6, 2**62, -(2**63), 2**63 - 1, 7]


# -- the text


def text():
    return pinion.gather.PTX.read_text()


def test_each_ptx_is_of_its_source_and_old_enough_for_old_drivers():
    headings = "import compile_kernels as c; [print(p.with_suffix('.ptx'), c.heading(p), sep='\\n', end='') for p in c.SOURCES]"
    done = subprocess.run(
        [sys.executable, "-c", headings], capture_output=True, text=True, cwd=COMPILE.parent, check=True
    )
    lines = done.stdout.splitlines(keepends=True)
    found = {Path(path.strip()): heading for path, heading in zip(lines[::2], lines[1::2], strict=True)}
    assert pinion.gather.PTX.resolve() in found and len(found) == 2
    for path, heading in found.items():
        ptx = path.read_text()
        assert ptx.startswith(heading), "run python/compile_kernels.py"
        version = re.search(r"^\.version (\d+)\.(\d+)$", ptx, re.MULTILINE)
        assert tuple(map(int, version.groups())) <= (9, 0), "driver 580 reads no newer"
        assert ".target sm_75" in ptx


def test_the_ptx_has_the_kernels_that_are_launched():
    entries = dict(re.findall(r"\.entry (\w+)\(\n(.*?)\n\)", text(), re.DOTALL))
    assert sorted(entries) == sorted(pinion.gather.KERNELS)
    for name, parameters in entries.items():
        assert parameters.count(".param .u64") == (5 if name == pinion.gather.FOUND else 12), name


def test_the_ptx_is_what_the_source_compiles_to():
    """By the NVRTC wheel of this Python, or the library that $PINION_TEST_NVRTC names."""
    chosen = ["--nvrtc", os.environ["PINION_TEST_NVRTC"]] if "PINION_TEST_NVRTC" in os.environ else []
    done = subprocess.run([sys.executable, COMPILE, "--check", *chosen], capture_output=True, text=True)
    if done.stderr.startswith(("no NVRTC", "NVRTC ")):
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stderr) == (0, "")


# -- values

TYPES = {
    "i1": pa.int8(), "i2": pa.int16(), "i4": pa.int32(), "i8": pa.int64(),
    "u1": pa.uint8(), "u2": pa.uint16(), "u4": pa.uint32(), "u8": pa.uint64(),
    "f2": pa.float16(), "f4": pa.float32(), "f8": pa.float64(), "b1": pa.bool_(),
    "at": pa.timestamp("ns"), "day": pa.date32(),
    "s3": pa.binary(3), "s12": pa.binary(12), "s16": pa.binary(16), "s20": pa.binary(20),
    "l3": pa.list_(pa.float32(), 3), "l4": pa.list_(pa.float32(), 4), "l1": pa.list_(pa.int8(), 1),
    "deep": pa.list_(pa.list_(pa.int16(), 2), 5),
}  # fmt: skip


def value(data_type, i):
    if pa.types.is_fixed_size_list(data_type):
        return [value(data_type.value_type, i * 7 + j) for j in range(data_type.list_size)]
    if pa.types.is_fixed_size_binary(data_type):
        return bytes((i * 5 + j) % 256 for j in range(data_type.byte_width))
    if pa.types.is_boolean(data_type):
        return i % 3 == 0
    if pa.types.is_floating(data_type):
        return np.float16(i / 4)
    return i % 100


def wide(rows=ROWS):
    """Every width, every second column with nulls."""
    columns = {"id": pa.array(range(rows), pa.int64())}
    for n, (name, data_type) in enumerate(TYPES.items()):
        # Lists of integers with nulls have no array.
        nullable = n % 2 and name not in ("l1", "deep")
        values = [None if nullable and i % 6 == 1 else value(data_type, i) for i in range(rows)]
        columns[name] = pa.array(values, data_type)
    columns["price"] = pa.array([Decimal(i) for i in range(rows)], pa.decimal128(9, 2))
    return pa.table(columns)


def expected(view, rows):
    """By Python, row by row: values and masks of every column that has an array."""
    values, masks = {}, {}
    for name in view.columns:
        try:
            column = view[name]
        except pinion.NoTensor:
            continue
        there, nothing = column.to_numpy(), np.nan if column.is_float else 0
        valid = np.ones(view.rows, bool) if column.valid is None else column.valid.to_numpy()
        values[name] = np.full((len(rows), *there.shape[1:]), nothing, there.dtype)
        masks[name] = np.zeros(len(rows), bool)
        for i, row in enumerate(rows):
            if 0 <= row < view.rows:
                values[name][i], masks[name][i] = there[row], valid[row]
    return values, masks


def same(taken, wanted):
    assert list(taken) == list(wanted)
    for name, array in wanted.items():
        read = np.asarray(taken[name])
        assert read.dtype == array.dtype and read.shape == array.shape, name
        np.testing.assert_array_equal(read, array, err_msg=name)


@pytest.fixture(params=["host", "gpu"])
def place(request):
    return request.getfixturevalue("gpu") if request.param == "gpu" else None


@pytest.fixture
def table(place):
    """Pins a table, on the host or in the fake driver's memory."""
    ends = []

    def pinned(data, key):
        before = [] if place is None else place.text("fake_live").splitlines()
        memory = {} if place is None else {"memory": place.memory, "device": place.device}
        server = StubServer({"t": TestPin(data, key, slots=2, **memory)})
        ends.append((server, before))
        return pinion.connect(server.url).pin("t")

    yield pinned
    gc.collect()
    for server, before in ends:
        assert server.wait(lambda: not server.leases and not server.mappings)
        server.stop()
        if place is not None:
            for region in server.pins["t"].regions:
                region.close()
            assert wait_for(lambda: place.left(before) == []), place.left(before)
            assert place.text("fake_violations") == ""


def wait_for(what, seconds=5):
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("rows", [MANY, [], [-1], [5] * 700, list(range(ROWS))], ids=len)
def test_rows_of_every_width_are_taken_as_numpy_would(table, rows):
    with table(wide(), ["id"]).latest() as view:
        values, masks = view.take(np.array(rows, np.int64), mask=True, kernel=True)
        assert len(values) == len(TYPES) + 1
        wanted = expected(view, rows)
        same(values, wanted[0])
        same(masks, wanted[1])


def test_a_pin_without_rows_has_only_missing_ones(table):
    with table(wide(0), ["id"]).latest() as view:
        values, masks = view.take([0, -1, 1], mask=True, kernel=True)
        same(values, expected(view, [0, -1, 1])[0])
        assert not any(np.asarray(mask).any() for mask in masks.values())


def test_a_matrix_is_taken_in_one_launch(table, place):
    names = [f"f{i}" for i in range(9)]
    data = {name: [None if (i + n) % 5 == 0 else i + n / 10 for i in range(ROWS)] for n, name in enumerate(names)}
    columns = {"id": range(ROWS), **data, "whole": pa.array(np.arange(ROWS) * 1.0)}
    schema = pa.schema([pa.field("id", pa.int64())] + [pa.field(name, pa.float64()) for name in names])
    schema = schema.append(pa.field("whole", pa.float64(), nullable=False))
    with table(pa.table(columns, schema=schema), ["id"]).latest() as view:
        view.take([0], matrix=True, kernel=True)
        before = 0 if place is None else place.calls("cuLaunchKernel")
        taken = view.take(MANY, matrix=True, kernel=True)
        assert place is None or place.calls("cuLaunchKernel") == before + 1
        values, masks = expected(view, MANY)
        order = view.matrix_columns()
        assert "whole" in order and len(order) == 10
        np.testing.assert_array_equal(np.asarray(taken), np.stack([values[name] for name in order], axis=1))
        _, taken = view.take(MANY, order, matrix=True, mask=True, kernel=True)
        np.testing.assert_array_equal(np.asarray(taken), np.stack([masks[name] for name in order], axis=1))
        part = view.take(MANY, [order[4]], matrix=True, kernel=True)
        np.testing.assert_array_equal(np.asarray(part)[:, 0], values[order[4]])


def test_row_numbers_may_be_of_any_integer_type_and_nothing_else(table):
    with table(users(), ["user"]).latest() as view:
        for rows in ([2, 0], np.array([2, 0], np.uint8), pa.array([2, 0], pa.int32()), (2, 0)):
            assert np.asarray(view.take(rows, ["count"], kernel=True)["count"]).tolist() == [6, 0]
        for rows in ([0.5], [[1]], np.array([2**63], np.uint64), pa.array([1, None])):
            with pytest.raises(pinion.InvalidArgument) as refused:
                view.take(rows, ["count"], kernel=True)
            assert refused.value.error == "ROWS"
        with pytest.raises(pinion.HasNulls):
            view.take([1], ["age"], kernel=True)


# -- on the host


def test_arrays_that_are_given_are_filled(table, place):
    if place is not None:
        pytest.skip("below, with arrays on a GPU")
    with table(users(), ["user"]).latest() as view:
        out = {"count": np.empty(3, np.uint16), "score": np.empty((3, 2), np.float32)[:, 0]}
        taken = view.take([2, -1, 4], ["count", "score"], out=out, kernel=True)
        assert taken["count"] is out["count"]
        assert out["count"].tolist() == [6, 0, 12] and np.isnan(out["score"][1])
        for wrong in (np.empty(2, np.uint16), np.empty(3, np.int16), np.empty((3, 1), np.uint16)):
            with pytest.raises(pinion.InvalidArgument) as refused:
                view.take([2, -1, 4], ["count"], out={"count": wrong}, kernel=True)
            assert refused.value.error == "OUT"
        with pytest.raises(pinion.InvalidArgument, match="nothing for count"):
            view.take([1], ["count"], out={}, kernel=True)
        with pytest.raises(pinion.InvalidArgument, match="pair"):
            view.take([1], ["count"], mask=True, out={}, kernel=True)


# -- on a GPU


def taken_later(gpu, view, stream, **options):
    """A take whose first step on the stream begins only later."""
    # Validity is read once for a view, and that is waited for.
    view["count"].check_nulls(masked=False)
    gpu.late(0.4)
    taken = view.take([1, -1, 2], ["count"], stream=stream, **options)
    time.sleep(0.05)
    gpu.late(0)
    return taken


@pytest.mark.parametrize("keep_result", [True, False])
def test_the_lease_ends_after_the_gather_does(pin, gpu, stub, keep_result):
    """It is queued and has not begun; the view is left, the server goes on refreshing."""
    stream = gpu.stream()
    with pin.latest() as view:
        taken = taken_later(gpu, view, stream)
        left = time.monotonic()
    if not keep_result:
        del taken
    del view
    assert time.monotonic() - left < 0.1
    for version in range(1, 10):
        assert stub.publish("users", users(version))
    assert gpu.driver.cuStreamQuery(fake.c_ulonglong(stream)) == 600 and len(stub.leases) == 1
    if keep_result:
        assert np.asarray(taken["count"]).tolist() == [3, 0, 6]
    assert released(stub)


def test_a_lease_that_ends_too_early_gives_what_came_later(pin, gpu, stub):
    """The same with the lease ended by hand: the test above can fail."""
    stream = gpu.stream()
    with pin.latest() as view:
        taken = taken_later(gpu, view, stream)
        pin._mapping.lane.ask_on(pin._mapping.generation, 4, b"", view.hold().lease.id, 2)
        for version in range(1, 10):
            assert stub.publish("users", users(version))
        assert gpu.driver.cuStreamQuery(fake.c_ulonglong(stream)) == 600
        assert np.asarray(taken["count"]).tolist() != [3, 0, 6]


def test_row_numbers_of_the_caller_may_change_once_take_has_returned(pin, gpu):
    """Page-locked ones too, which the driver reads when the copy runs."""
    locked = fake.c_void_p()
    gpu.call("cuMemHostAlloc", fake.byref(locked), fake.c_size_t(24), 0)
    rows = np.ctypeslib.as_array((fake.ctypes.c_int64 * 3).from_address(locked.value))
    rows[:] = [1, -1, 2]
    with pin.latest() as view:
        view["count"].check_nulls(masked=False)
        gpu.late(0.2)
        taken = view.take(rows, ["count"], stream=gpu.stream())
        rows[:] = 9
        gpu.late(0)
        assert np.asarray(taken["count"]).tolist() == [3, 0, 6]
    gpu.call("cuMemFreeHost", locked)


def test_what_was_taken_is_freed_after_its_readers(pin, gpu, stub):
    mine, other = gpu.stream(), gpu.stream()
    with pin.latest() as view:
        taken = view.take([1, -1, 2], ["count", "score"], stream=mine)
        kept = taken["count"].__dlpack__(stream=other)
        address = taken["count"].address
    queued = fake.QueuedRead(gpu, other, address, 6)
    frees = gpu.calls("cuMemFree")
    del taken, kept
    # Freed now, it would be a violation.
    assert not queued.is_done()
    assert np.frombuffer(queued.bytes(), np.uint16).tolist() == [3, 0, 6]
    assert wait_for(lambda: gpu.calls("cuMemFree") > frees)
    del view
    assert released(stub)


def test_a_consumers_stream_waits_for_the_values(pin, gpu):
    mine, other = gpu.stream(), gpu.stream()
    with pin.latest() as view:
        taken = taken_later(gpu, view, mine)["count"]
        kept = taken.__dlpack__(stream=other, max_version=(1, 0))
        out = fake.c_void_p()
        gpu.call("cuMemHostAlloc", fake.byref(out), fake.c_size_t(6), 0)
        where, size = fake.c_ulonglong(taken.address), fake.c_size_t(6)
        gpu.call("cuMemcpyDtoHAsync_v2", out, where, size, fake.c_ulonglong(other))
        gpu.call("cuStreamSynchronize", fake.c_ulonglong(other))
        assert np.frombuffer(fake.ctypes.string_at(out, 6), np.uint16).tolist() == [3, 0, 6]
        gpu.call("cuMemFreeHost", out)
        interface = taken.__cuda_array_interface__
        assert (interface["stream"], interface["shape"], interface["typestr"]) == (mine, (3,), "<u2")
        assert taken.__dlpack_device__() == (2, 0)
        with pytest.raises(BufferError, match="ambiguous"):
            taken.__dlpack__(stream=0)
        del kept


def test_numbers_and_results_may_lie_on_the_gpu_already(pin, gpu):
    stream = gpu.stream()
    with pin.latest() as view:
        view.take([0], ["user", "count", "score"])
        out = view.take([4, 4, 4], ["count", "score"], mask=True)
        # Row numbers that are gathered themselves, and not there yet: the keys are 0, 10, 20, …
        gpu.late(0.2)
        numbers = view.take([0, 1, -1], ["user"], stream=stream)["user"]
        time.sleep(0.05)
        gpu.late(0)
        uses = gpu.calls("cuMemAlloc"), gpu.calls("cuMemcpyHtoDAsync")
        values, masks = view.take(numbers, ["count", "score"], mask=True, out=out, stream=gpu.stream())
        assert (gpu.calls("cuMemAlloc"), gpu.calls("cuMemcpyHtoDAsync")) == uses
        assert values["count"] is out[0]["count"]
        gpu.call("cuCtxSynchronize")
        assert np.asarray(values["count"]).tolist() == [0, 30, 0]
        assert np.asarray(masks["score"]).tolist() == [True, False, True]


class Strided:
    """Someone else's array: a part of ours, by another step."""

    def __init__(self, of, **changes):
        self.of = of
        self.__cuda_array_interface__ = of.__cuda_array_interface__ | changes


def test_arrays_of_others_are_written_by_their_strides_or_refused(pin, gpu):
    with pin.latest() as view:
        room = view.take([0] * 12, ["rank"])["rank"]
        view.take([2, -1, 4], ["score"], out={"score": Strided(room, shape=(3,), strides=(16,))})
        written = np.asarray(room)
        np.testing.assert_array_equal(written[::4], np.float32([0.5, np.nan, 1.0]))
        assert (written[1::4] == 0).all() and (written[2::4] == 0).all()
        view.take([2, 4], ["score", "rank"], matrix=True, out=Strided(room, shape=(2, 2), strides=(4, 8)))
        assert np.asarray(room)[:4].tolist() == [0.5, 1.0, -2.0, -4.0]
        address = room.address
        # Rows of 16 bytes at no multiple of 16.
        out = Strided(room, shape=(2, 4), strides=None, data=(address + 4, False))
        view.take([2, -1], ["embedding"], out={"embedding": out})
        np.testing.assert_array_equal(np.asarray(room)[1:9], np.float32([2, 2.1, 2.2, 2.3] + [np.nan] * 4))
        wrong = [
            room,
            np.empty(3, np.float32),
            Strided(room, shape=(3,), typestr="<i4"),
            Strided(room, shape=(3,), data=(address, True)),
            Strided(room, shape=(3,), data=(address + 2, False)),
            Strided(room, shape=(3,), strides=(-4,)),
            Strided(room, shape=(3,), strides=(6,)),
            Strided(room, shape=(3,), strides=(4, 4)),
        ]
        for out in wrong:
            with pytest.raises(pinion.InvalidArgument) as refused:
                view.take([2, -1, 4], ["score"], out={"score": out})
            assert refused.value.error == "OUT"
        with pytest.raises(pinion.InvalidArgument, match="contiguous int64"):
            view.take(room, ["score"])


@pytest.mark.parametrize(
    ("call", "nth"),
    [("cuMemAlloc", 1), ("cuMemAlloc", 2), ("cuMemcpyHtoDAsync", 1), ("cuModuleLoadData", 1)]
    + [("cuModuleGetFunction", 3), ("cuLaunchKernel", 1), ("cuLaunchKernel", 3)],
)
def test_a_take_that_fails_says_what_the_driver_said_and_leaves_nothing(pin, gpu, stub, call, nth):
    stream = gpu.stream()
    live = gpu.text("fake_live")
    with pin.latest() as view:
        if call.startswith("cuModule"):
            # As before the first take of the process.
            pin._mapping.device._kernels.clear()
        gpu.fail(f"{call}@{nth}=2")
        with pytest.raises(pinion.DeviceError) as failed:
            view.take([1, -1, 2], ["count", "score", "rank"], stream=stream)
        assert failed.value.details["name"] == "CUDA_ERROR_OUT_OF_MEMORY"
        gpu.driver.fake_heal()
        del failed
    del view
    assert released(stub)
    modules = [line for line in gpu.text("fake_live").splitlines() if "modules" in line]
    assert modules == [line for line in live.splitlines() if "modules" in line]
    with pin.latest() as view:
        assert np.asarray(view.take([1, 2], ["count"])["count"]).tolist() == [3, 6]


@pytest.mark.parametrize("call", ["cuEventCreate", "cuEventRecord"])
def test_a_gather_without_an_event_is_waited_for_by_the_whole_context(pin, gpu, stub, call):
    stream = gpu.stream()
    gpu.fail(f"{call}@1=2")
    with pin.latest() as view:
        taken = taken_later(gpu, view, stream)
    del view
    for version in range(1, 5):
        assert stub.publish("users", users(version))
    assert len(stub.leases) == 1
    assert np.asarray(taken["count"]).tolist() == [3, 0, 6]
    assert released(stub)
