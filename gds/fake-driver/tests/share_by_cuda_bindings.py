"""Two processes share device memory through NVIDIA's own bindings, over the fake driver.

Run with the folder of lay-out.sh on LD_LIBRARY_PATH and `cuda-bindings` installed. The producer
creates exportable memory and fills it, the consumer imports, maps and reads it, also after the
producer has given everything back. Prints `equal` and exits 0, or fails.
"""

import ctypes
import multiprocessing
import os
import socket

from cuda.bindings import driver

BYTES = 2 << 20
POSIX_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def ok(answer):
    """The results of a call, or an exception."""
    code, *results = answer
    if code != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{code!r}")
    return results[0] if len(results) == 1 else results


def start():
    ok(driver.cuInit(0))
    device = ok(driver.cuDeviceGet(0))
    ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(device))))
    return device


def grant(address, device, flags):
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = int(device)
    access.flags = flags
    ok(driver.cuMemSetAccess(address, BYTES, [access], 1))


def map_in(handle, device, flags):
    address = ok(driver.cuMemAddressReserve(BYTES, 0, 0, 0))
    ok(driver.cuMemMap(address, BYTES, 0, handle, 0))
    grant(address, device, flags)
    return address


def give_back(address, handle):
    ok(driver.cuMemUnmap(address, BYTES))
    ok(driver.cuMemAddressFree(address, BYTES))
    ok(driver.cuMemRelease(handle))
    ok(driver.cuDevicePrimaryCtxRelease(0))


def read(address):
    out = ctypes.create_string_buffer(BYTES)
    ok(driver.cuMemcpyDtoH(out, address, BYTES))
    return out.raw


def fake_violations():
    """What the library in this process recorded."""
    fake = ctypes.CDLL("libcuda.so.1")
    return fake.fake_violation_count()


def produce(lane, pattern):
    device = start()
    prop = driver.CUmemAllocationProp()
    prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.requestedHandleTypes = POSIX_FD
    prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = int(device)
    size = ok(driver.cuMemGetAllocationGranularity(prop, driver.CUmemAllocationGranularity_flags(0)))
    assert size == BYTES, size
    handle = ok(driver.cuMemCreate(BYTES, prop, 0))
    address = map_in(handle, device, driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
    ok(driver.cuMemcpyHtoD(address, pattern, BYTES))
    ok(driver.cuCtxSynchronize())
    fd = ok(driver.cuMemExportToShareableHandle(handle, POSIX_FD, 0))
    uuid = ok(driver.cuDeviceGetUuid(device)).bytes
    socket.send_fds(lane, [uuid], [int(fd)])
    os.close(int(fd))
    give_back(address, handle)
    assert fake_violations() == 0
    lane.sendall(b"gone")


def consume(lane, pattern):
    device = start()
    uuid, (fd,), _, _ = socket.recv_fds(lane, 16, 1)
    assert uuid == ok(driver.cuDeviceGetUuid(device)).bytes
    handle = ok(driver.cuMemImportFromShareableHandle(fd, POSIX_FD))
    os.close(fd)
    assert lane.recv(4) == b"gone"
    address = map_in(handle, device, driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ)
    assert read(address) == pattern
    refused = driver.cuMemsetD8(address, 0, BYTES)[0]
    assert refused == driver.CUresult.CUDA_ERROR_INVALID_VALUE, refused
    give_back(address, handle)
    assert fake_violations() == 0


def main():
    pattern = os.urandom(BYTES)
    ours, theirs = socket.socketpair()
    producer = multiprocessing.get_context("spawn").Process(target=produce, args=(theirs, pattern))
    producer.start()
    theirs.close()
    consume(ours, pattern)
    producer.join()
    assert producer.exitcode == 0, producer.exitcode
    print("equal")


if __name__ == "__main__":
    main()
