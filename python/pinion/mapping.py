"""Slots of a pin's layout, imported into this process: shared host memory or memory of a GPU; or a table's own files.

A `Mapping` lives as long as anything refers to it: the pin, views, tensors. After the last of them the slots
are unmapped by the client's thread, and the server is told.

Elsewhere: what lies in a slot (`columns`), when a lease ends (`leases`).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pinion import cuda, errors
from pinion import lane as wire
from pinion.cuda import DLPACK_CPU, DLPACK_CUDA
from pinion.leases import Export, Hold, Lease, Releaser, Unmap

if TYPE_CHECKING:
    from pinion.segments import Files

# Bytes that are read back from a device at once for a checksum.
CHUNK_BYTES = 16 << 20


class HostSlot:
    """A slot in shared memory, mapped read-only."""

    def __init__(self, descriptor: int, size: int):
        self._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
        buffer = pa.py_buffer(self._map)
        self.address = buffer.address

    def close(self) -> None:
        self._map.close()


class Mapping:
    """The slots of one layout of one pin, as one PIN lent them."""

    def __init__(self, lane: wire.Lane, releaser: Releaser, pin: str):
        """Sends PIN and imports the slots.

        Raises the server's errors, `DeviceUnavailable` and `DeviceError`: nothing is mapped then.
        """
        info, stored, result, descriptors, generation = lane.pin(pin)
        self.lane = lane
        self.releaser = releaser
        self.info = info
        self.pin: str = info["pin"]
        self.stored: pa.Schema = stored
        self.result: pa.Schema = result
        self.layout: dict[str, Any] = info["layout"]
        self.generation = generation
        self.id: int = info["mapping"]["id"]
        self.slot_bytes: int = self.layout.get("slot_bytes", 0)
        self.device: cuda.Device | None = None
        self.slots: list[Any] = []
        # In place of slots, where the pin is lent.
        self.files: Files | None = None
        unmapped = Unmap(self.slots, generation, self.id)
        releaser.took()
        try:
            if self.layout["form"] == "segments":
                self._map_files(descriptors, unmapped)
            else:
                self._map_slots(descriptors, unmapped)
        finally:
            for number in descriptors:
                os.close(number)

    def _map_files(self, descriptors: list[int], unmapped: Unmap) -> None:
        try:
            # Needs NumPy.
            from pinion.segments import Files
        except ImportError:
            self.releaser.put(unmapped)
            raise
        # They outlive this object while anything that lies in them does.
        self.files = Files(descriptors, self.layout["parts"], self.stored, partial(_unmap, self.releaser, unmapped))

    def _map_slots(self, descriptors: list[int], unmapped: Unmap) -> None:
        try:
            self._import(descriptors)
        except BaseException:
            self.releaser.put(unmapped)
            raise
        weakref.finalize(self, _unmap, self.releaser, unmapped).atexit = False

    def _import(self, descriptors: list[int]) -> None:
        if len(descriptors) != self.layout["slots"]:
            raise errors.ProtocolError(f"{len(descriptors)} descriptors for {self.layout['slots']} slots")
        device = self.layout["device"]
        if device["kind"] == "host":
            for number in descriptors:
                self.slots.append(HostSlot(number, self.slot_bytes))
            return
        if device["kind"] != "cuda":
            raise errors.Unimplemented(f"pins on a device of kind {device['kind']!r} need a newer client")
        self.device = cuda.device_of(device["uuid"])
        for number in descriptors:
            self.slots.append(cuda.Imported(self.device, number, self.slot_bytes))

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """As DLPack numbers devices: (1, 0) the host, (2, n) a GPU."""
        return (DLPACK_CPU, 0) if self.device is None else (DLPACK_CUDA, self.device.ordinal)

    def lease(self) -> tuple[dict[str, Any], Hold]:
        """LATEST: the newest generation and what holds it.

        Raises `LayoutChanged`, `UnknownPin`, `LeaseGone`: map the pin anew.
        """
        if self.releaser.closing:
            raise errors.ConnectionLost("this client was closed")
        reply = self.ask(wire.LATEST, wire.GENERATION, {"latest": {"mapping": self.id}})
        self.releaser.took()
        return reply, Lease(self.releaser, self, reply["lease"]["id"]).hold()

    def checksums(self, lease: int) -> list[dict[str, Any]]:
        """CHECKSUM: what the server reads in a leased slot, buffer by buffer."""
        return self.ask(wire.CHECKSUM, wire.CHECKSUM_IS, {"checksum": {"lease": lease}})["buffers"]

    def row_ids(self, lease: int, keys: pa.RecordBatch) -> pa.Buffer:
        """ROW_IDS: an i64 for each key."""
        command = wire.padded_json({"row_ids": {"lease": lease}})
        payload = command + keys.schema.serialize().to_pybytes() + keys.serialize().to_pybytes()
        kind, count, size, frame = self.lane.ask_on(self.generation, wire.ROW_IDS, payload, len(command))
        if kind != wire.ROWS_FOUND or count != keys.num_rows or size != 8 * count:
            raise errors.ProtocolError(f"{keys.num_rows} keys were answered by {size} bytes in a frame of kind {kind}")
        return frame.slice(wire.HEADER_BYTES, size)

    def check(self) -> None:
        """Raises `LeaseGone` if the connection that holds the leases is gone."""
        self.lane.ask_on(self.generation, wire.PING)

    def ask(self, kind: int, wanted: int, command: dict[str, Any]) -> Any:
        """One JSON request on the connection that holds this mapping."""
        got, _, size, frame = self.lane.ask_on(self.generation, kind, wire.padded_json(command))
        if got != wanted:
            raise errors.ProtocolError(f"a request of kind {kind} was answered by a frame of kind {got}")
        return json.loads(frame.slice(wire.HEADER_BYTES, size).to_pybytes())

    def check_range(self, offset: int, size: int) -> None:
        """What the server says must lie in its slot: it is not trusted with this process's memory."""
        if offset < 0 or size < 0 or offset + size > self.slot_bytes:
            raise errors.ProtocolError(f"bytes {offset} to {offset + size} of a slot of {self.slot_bytes}")

    def buffer(self, slot: int, offset: int, size: int, hold: Hold) -> pa.Buffer:
        """Bytes of a leased slot: on the host as they lie there, from a GPU a copy."""
        self.check_range(offset, size)
        address = self.slots[slot].address + offset
        if self.device is None:
            return pa.foreign_buffer(address, size, Export(hold))
        copy = pa.allocate_buffer(size)
        if size:
            self.device.read(address, copy.address, size)
        return copy

    def crc32(self, slot: int, offset: int, size: int) -> int:
        """The checksum of bytes of a slot."""
        import zlib

        self.check_range(offset, size)
        address, crc = self.slots[slot].address + offset, 0
        chunk = None if self.device is None else pa.allocate_buffer(min(size, CHUNK_BYTES))
        for start in range(0, size, CHUNK_BYTES):
            part = min(CHUNK_BYTES, size - start)
            if chunk is None:
                view: Any = (ctypes.c_char * part).from_address(address + start)
            else:
                self.device.read(address + start, chunk.address, part)
                view = memoryview(chunk)[:part]
            crc = zlib.crc32(view, crc)
        return crc


def _unmap(releaser: Releaser, slots: Unmap) -> None:
    # A forked child has copies of the mappings; the pin is its parent's.
    if os.getpid() == slots.pid:
        releaser.put(slots)
