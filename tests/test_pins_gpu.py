"""The Python client's pins on a GPU, over the fake driver: import, release after the GPU's work, errors, forks.

The fears: a lease that ends while a queued read has not run, so that it reads what the server wrote since; a deleter
that waits or sends; memory that stays mapped; an error of the driver that is swallowed, or leaves half an import.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pinion
import pinion.cuda
import pytest
from support import gpu as fake
from support.pinned import ROWS, client, pin, released, users  # noqa: F401  (fixtures)
from support.pins import StubServer, TestPin
from support.process import REPOSITORY


@pytest.fixture(scope="module")
def gpu():
    if not fake.library().exists():
        pytest.skip(f"{fake.library()} is not built (cargo build --release -p pinion-gds-fake-driver)")
    driver = fake.Gpu()
    # The context is retained once for the life of the process.
    pinion.cuda.device_of(driver.uuid)
    return driver


@pytest.fixture
def double(gpu):
    gpu.driver.fake_clear_violations()
    before = gpu.text("fake_live").splitlines()
    pin = TestPin(users(), ["user"], slots=3, memory=gpu.memory, device=gpu.device)
    pin.leaks = False
    yield pin
    gpu.driver.fake_heal()
    for region in pin.regions:
        region.close()
    assert gpu.text("fake_violations") == ""
    if not pin.leaks:
        deadline = time.monotonic() + 5
        while (left := gpu.left(before)) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert left == []


@pytest.fixture
def stub(double):
    server = StubServer({"users": double})
    yield server
    gc.collect()
    assert server.wait(lambda: not server.leases and not server.mappings)
    server.stop()


def counts(version=0):
    return users(version).column("count").to_pylist()


def as_counts(data):
    return np.frombuffer(data, np.uint16).tolist()


def test_a_pin_on_a_gpu_reads_equal_and_is_verified(pin, gpu, stub):
    assert pin.device == gpu.device
    assert pin._mapping.slots[0].read_only
    with pin.latest() as view:
        assert view.to_arrow(declared=True).equals(users())
        assert view.to_numpy(["count"])["count"].tolist() == counts()
        assert list(view.row_ids([30, 5])) == [3, -1]
        np.testing.assert_array_equal(view.matrix(["score", "rank"]).to_numpy()[:, 1], view["rank"].to_numpy())
    assert released(stub)
    stub.publish("users", users(1))
    assert pin.verify()["number"] == 2
    stub.lie = lambda buffers: buffers[3].update(crc32=1)
    with pytest.raises(pinion.DataLoss):
        pin.verify()


def test_slots_are_imported_once_and_unmapped_in_the_end(pin, gpu, stub):
    imports = gpu.calls("cuMemImportFromShareableHandle")
    for version in range(1, 5):
        assert stub.publish("users", users(version))
        with pin.latest() as view:
            assert view.to_numpy(["count"])["count"].tolist() == counts(version)
        assert released(stub)
    assert gpu.calls("cuMemImportFromShareableHandle") == imports
    unmapped = gpu.calls("cuMemUnmap")
    del view
    pin.close()
    assert stub.wait(lambda: not stub.mappings)
    assert gpu.calls("cuMemUnmap") == unmapped + 3


def read_later(gpu, view, stream):
    column = view["count"]
    return fake.QueuedRead(gpu, stream, column._address, ROWS * 2)


@pytest.mark.parametrize("known", ["named", "dlpack", "cuda_array_interface"])
def test_the_lease_ends_after_the_gpu_does(pin, gpu, stub, known):
    """A read is queued and has not begun; the block is left, everything is dropped, the server goes on refreshing."""
    stream = gpu.stream()
    with pin.latest() as view:
        column = view["count"]
        if known == "named":
            kept = column.__dlpack__(stream=1)
            view.use(stream)
        elif known == "dlpack":
            kept = column.__dlpack__(stream=stream)
        else:
            assert column.__cuda_array_interface__["data"] == (column._address, False)
            kept = column
            # Another stream is named, and idle: that says nothing of the one that is not.
            view.use(gpu.stream())
        queued = read_later(gpu, view, stream)
        start = time.monotonic()
    del kept, column, view
    assert time.monotonic() - start < 0.1
    for version in range(1, 10):
        assert stub.publish("users", users(version))
    assert not queued.is_done() and len(stub.leases) == 1
    assert as_counts(queued.bytes()) == counts()
    assert released(stub)


def test_a_client_that_releases_too_early_reads_what_came_later(pin, gpu, stub):
    """The same with the lease ended by hand: the test above can fail."""
    stream = gpu.stream()
    with pin.latest() as view:
        queued = read_later(gpu, view, stream)
        lease = view.hold().lease
        pin._mapping.lane.ask_on(pin._mapping.generation, 4, b"", lease.id, 2)
        for version in range(1, 10):
            assert stub.publish("users", users(version))
        assert not queued.is_done()
        assert as_counts(queued.bytes()) != counts()


def test_work_that_is_done_ends_the_lease_though_other_streams_are_busy(pin, gpu, stub):
    """Streams that were named are waited for, not the device."""
    busy, mine = gpu.stream(), gpu.stream()
    with pin.latest() as view:
        kept = view["count"].__dlpack__(stream=mine)
    region = stub.pins["users"].regions[0]
    queued = fake.QueuedRead(gpu, busy, region.address.value, 64)
    del kept, view
    assert stub.wait(lambda: not stub.leases, 0.25)
    assert not queued.is_done()
    queued.bytes()


def test_what_only_the_host_read_is_released_at_once(pin, gpu, stub, monkeypatch):
    """torch's stream is busy, with work that cannot have read the view."""
    stream = gpu.stream()
    stand_in_for_torch(monkeypatch, stream)
    region = stub.pins["users"].regions[0]
    queued = fake.QueuedRead(gpu, stream, region.address.value, 64)
    with pin.latest() as view:
        assert view.to_arrow(["count"], declared=True).column("count").to_pylist() == counts()
    assert stub.wait(lambda: not stub.leases, 0.25)
    assert not queued.is_done()
    queued.bytes()


def stand_in_for_torch(monkeypatch, stream):
    """`torch.cuda` as far as the client asks it: whether it is in use, and its current stream."""
    cuda = types.SimpleNamespace(
        is_initialized=lambda: True, current_stream=lambda _: types.SimpleNamespace(cuda_stream=stream)
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))


def test_torchs_current_stream_is_known_without_being_named(pin, gpu, stub, monkeypatch):
    """The stream that is current where a tensor dies, and where the block is left."""
    current = gpu.stream()
    stand_in_for_torch(monkeypatch, current)
    other = gpu.stream()
    with pin.latest() as view:
        kept = view["count"].__dlpack__(stream=other)
        address = view["count"]._address
    queued = fake.QueuedRead(gpu, current, address, ROWS * 2)
    del kept, view
    for version in range(1, 5):
        stub.publish("users", users(version))
    assert not stub.wait(lambda: not stub.leases, 0.1)
    assert not queued.is_done()
    assert as_counts(queued.bytes()) == counts()
    assert released(stub)


def test_a_capsule_names_the_gpu_and_carries_a_deleter_that_is_not_ours(pin, stub):
    class Tensor(ctypes.Structure):
        _fields_ = [
            ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
            ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
            ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
        ]  # fmt: skip

    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    with pin.latest() as view:
        matrix = view.matrix(["score", "rank"])
        assert matrix.__dlpack_device__() == (2, 0)
        for options, name, at in (({}, b"dltensor", 0), ({"max_version": (1, 0)}, b"dltensor_versioned", 32)):
            capsule = matrix.__dlpack__(stream=1, **options)
            tensor = Tensor.from_address(api.PyCapsule_GetPointer(capsule, name) + at)
            assert (tensor.device_type, tensor.device_id, tensor.code, tensor.bits) == (2, 0, 2, 32)
            assert tensor.shape[:2] == [ROWS, 2]
            assert tensor.strides[:2] == [1, matrix.strides[1] // 4]
            assert tensor.data + tensor.byte_offset == view["score"]._address
            del tensor, capsule
        with pytest.raises(BufferError, match="ambiguous"):
            matrix.__dlpack__(stream=0)
        with pytest.raises(BufferError, match="without a copy"):
            matrix.__dlpack__(stream=1, dl_device=(1, 0))
        with pytest.raises(BufferError, match="without a copy"):
            matrix.__dlpack__(copy=True)
        interface = view["age"].__cuda_array_interface__
        assert (interface["typestr"], interface["shape"], interface["data"][1]) == ("<i4", (ROWS,), False)
        del matrix


@pytest.mark.parametrize(
    ("call", "nth"),
    [("cuDeviceGetCount", 1)]
    + [(f"cuMem{call}", nth) for call in ("ImportFromShareableHandle", "AddressReserve", "Map") for nth in (1, 2, 3)],
)
def test_an_import_that_fails_says_what_the_driver_said_and_leaves_nothing(client, gpu, stub, call, nth):
    gpu.fail(f"{call}@{nth}=2")
    live = gpu.text("fake_live")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(pinion.DeviceError) as failed:
        client.pin("users")
    assert failed.value.details == {"call": call, "code": 2, "name": "CUDA_ERROR_OUT_OF_MEMORY"}
    assert stub.wait(lambda: not stub.mappings)
    assert gpu.text("fake_live") == live
    gpu.driver.fake_heal()
    # The lane's own socket, and nothing else.
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    assert client.pin("users").verify()["number"] == 1


def test_memory_that_cannot_be_read_only_is_mapped_writable(client, gpu, stub):
    gpu.fail("cuMemSetAccess@1=801")
    pin = client.pin("users")
    assert [slot.read_only for slot in pin._mapping.slots] == [False, True, True]
    assert pin.verify()["number"] == 1


def test_a_code_that_no_header_knows_is_reported_as_it_is(client, gpu, stub):
    gpu.fail("cuMemMap@1=31337")
    with pytest.raises(pinion.DeviceError, match=r"cuMemMap failed with 31337 \(unknown\)"):
        client.pin("users")


def test_a_lease_of_which_the_driver_no_longer_answers_is_kept(pin, gpu, stub, caplog):
    stream = gpu.stream()
    gpu.fail("cuEventQuery@1=999")
    with pin.latest() as view:
        view["count"].__dlpack__(stream=stream)
    del view
    assert not stub.wait(lambda: not stub.leases, 0.2)
    assert "CUDA_ERROR_UNKNOWN" in caplog.text
    # Nor are its slots unmapped, with the pin closed and all of the client gone.
    unmapped = gpu.calls("cuMemUnmap")
    pin.close()
    assert not stub.wait(lambda: not stub.mappings, 0.1)
    assert gpu.calls("cuMemUnmap") == unmapped
    stub.pins["users"].leaks = True
    stub.hang_up()


def test_a_stream_that_takes_no_event_lets_the_whole_context_be_waited_for(pin, gpu, stub):
    stream = gpu.stream()
    gpu.fail("cuEventRecord@1+=900")
    with pin.latest() as view:
        kept = view["count"].__dlpack__(stream=stream)
        queued = read_later(gpu, view, stream)
    del view, kept
    assert not stub.wait(lambda: not stub.leases, 0.1)
    assert not queued.is_done()
    assert as_counts(queued.bytes()) == counts()
    assert released(stub)


def test_another_device_is_refused_by_name(client, gpu, stub):
    stub.pins["users"].device = {"kind": "cuda", "uuid": "GPU-12345678-1234-1234-1234-123456789abc", "ordinal": 0}
    with pytest.raises(pinion.DeviceUnavailable, match="CUDA_VISIBLE_DEVICES") as refused:
        client.pin("users")
    assert refused.value.details["seen"] == [gpu.uuid]


def test_a_forked_child_is_refused_and_the_parent_goes_on(client, pin, gpu, stub):
    with pin.latest() as view:
        kept = view["count"].__dlpack__(stream=1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                told = 0
                for use in (pin.latest, view.to_numpy, lambda: client.pin("users")):
                    try:
                        use()
                    except (pinion.Forked, pinion.DeviceUnavailable) as error:
                        told += error.error == "FORKED" and "spawn" in str(error)
                del kept, view, pin
                gc.collect()
                code = 0 if told == 3 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert stub.wait(lambda: len(stub.leases) == 1 and len(stub.mappings) == 1)
        assert view.to_numpy(["count"])["count"].tolist() == counts()
    del kept, view
    assert released(stub)


def test_a_process_of_its_own_reads_and_leaves_nothing(gpu, stub):
    code = """
import sys, builtins, pinion
pin = pinion.connect(sys.argv[1]).pin("users")
view = pin.latest().__enter__()
print(view.to_numpy(["count"])["count"].tolist())
builtins.kept = [view, view["count"].__dlpack__(stream=1), view["count"].__cuda_array_interface__]
builtins.kept.append(builtins.kept)
"""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, stub.url],
        env={**os.environ, **fake.environment(), "PYTHONPATH": str(REPOSITORY / "python")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == counts()
    assert stub.wait(lambda: not stub.leases and not stub.mappings)


def test_nvidias_own_bindings_read_the_same_pin(gpu, stub):
    """A second, independent consumer, written from the protocol page."""
    pytest.importorskip("cuda.bindings")
    stub.publish("users", users(4))
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tests/support/second_reader.py", stub.path, "users", "count"],
        env={**os.environ, **fake.environment()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"generation": 2, "values": counts(4)}
    assert stub.wait(lambda: not stub.leases and not stub.mappings)
