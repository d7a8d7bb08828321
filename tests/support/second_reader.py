"""Reads a pin with NVIDIA's `cuda-bindings` and a bare socket: a second consumer that shares no code with our client.

    LD_LIBRARY_PATH=FOLDER python second_reader.py SOCKET PIN COLUMN

Prints the values of an int column as JSON. Follows docs/local-lane.md.
"""

import json
import os
import socket
import struct
import sys

from cuda.bindings import driver

HEADER = struct.Struct("<IBBHII")


def ok(answer):
    code, *results = answer
    assert code == driver.CUresult.CUDA_SUCCESS, code
    return results[0] if results else None


def ask(lane, kind, payload=b"", detail=0, flags=0):
    """One request; the reply's JSON (the first `detail` bytes, or all) and descriptors."""
    lane.sendall(HEADER.pack(len(payload), kind, flags, 0, 1, detail) + payload)
    header, descriptors, _, _ = socket.recv_fds(lane, 16, 253)
    size, kind, _, _, _, detail = HEADER.unpack(header)
    data = b""
    while len(data) < size:
        data += lane.recv(size - len(data))
    assert kind != 255, data
    return data[:detail] if kind == 137 else data, descriptors


def main(path, pin, column):
    lane = socket.socket(socket.AF_UNIX)
    lane.connect(path)
    ask(lane, 1, b"PINLANE\0" + struct.pack("<HH", 1, 1))
    info, descriptors = ask(lane, 9, json.dumps({"pin": {"pin": pin}}).encode())
    info = json.loads(info)
    ok(driver.cuInit(0))
    device = ok(driver.cuDeviceGet(0))
    ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(device))))
    size = info["layout"]["slot_bytes"]
    kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    slots = []
    for descriptor in descriptors:
        handle = ok(driver.cuMemImportFromShareableHandle(descriptor, kind))
        os.close(descriptor)
        address = ok(driver.cuMemAddressReserve(size, 0, 0, 0))
        ok(driver.cuMemMap(address, size, 0, handle, 0))
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = int(device)
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        ok(driver.cuMemSetAccess(address, size, [access], 1))
        slots.append(int(address))
    generation = json.loads(ask(lane, 10, json.dumps({"latest": {"mapping": info["mapping"]["id"]}}).encode())[0])
    node = next(c["node"] for c in info["layout"]["columns"] if c["name"] == column)
    out = bytearray(generation["rows"] * node["width"])
    ok(driver.cuMemcpyDtoH(out, slots[generation["slot"]] + node["values"], len(out)))
    values = [int.from_bytes(out[i : i + node["width"]], "little") for i in range(0, len(out), node["width"])]
    ask(lane, 4, detail=generation["lease"]["id"], flags=2)
    print(json.dumps({"generation": generation["number"], "values": values}))


main(*sys.argv[1:])
