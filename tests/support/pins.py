"""A test double of the server's side of pins: the lane's frames, and slots written by hand from a pyarrow table.

Written from docs/local-lane.md and sharing no code with the client or the server, so that the client's tests need
neither a server nor a GPU. It keeps the books that tests look at (leases, mappings, what was released and when) and
answers anything malformed with an error of framing. It is no model of how a server decides.
"""

import array
import json
import mmap
import os
import socket
import struct
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa

HEADER = struct.Struct("<IBBHII")
PAGE = 4096
HEAP_BUFFER = 1 << 30


# -- the layout


def stored(data_type):
    """The type that lies in a slot: dictionaries are their values."""
    return data_type.value_type if pa.types.is_dictionary(data_type) else data_type


class Layout:
    """Places for the columns of a schema."""

    def __init__(self, schema, capacity, heap_bytes=1 << 16, items=8):
        self.capacity = capacity
        self.heap_bytes = heap_bytes
        self.items = items
        self.end = 0
        fields = [field.with_type(stored(field.type)) for field in schema]
        self.stored = pa.schema(fields)
        order = sorted(range(len(fields)), key=lambda i: (width(fields[i].type), str(fields[i].type), i))
        self.columns = []
        for i in order:
            field = fields[i]
            node = self.node(field.type, capacity)
            self.columns.append(
                {"name": field.name, "type": str(schema.field(i).type), "nullable": field.nullable, "node": node}
            )
        # Validity stands behind the values, so that equal-typed values lie side by side.
        for column in self.columns:
            self.validity(column["node"], column["nullable"], capacity)
        self.slot_bytes = -(-self.end // (2 << 20)) * (2 << 20)

    def place(self, size):
        start = self.end
        self.end = -(-(start + size) // PAGE) * PAGE
        return start

    def node(self, data_type, rows):
        if pa.types.is_boolean(data_type):
            return {"kind": "bool", "values": self.place(rows)}
        if is_text(data_type):
            views = self.place(16 * rows)
            return {"kind": "view", "views": views, "heap": self.place(self.heap_bytes), "heap_bytes": self.heap_bytes}
        if pa.types.is_fixed_size_list(data_type):
            size = data_type.list_size
            return {"kind": "fixed_size_list", "size": size, "child": self.node(data_type.value_type, rows * size)}
        if pa.types.is_list(data_type) or pa.types.is_large_list(data_type) or pa.types.is_map(data_type):
            offsets, sizes, room = self.place(8 * rows), self.place(8 * rows), rows * self.items
            child = self.node(item(data_type), room)
            return {"kind": "list", "offsets": offsets, "sizes": sizes, "child": child, "child_capacity": room}
        if pa.types.is_struct(data_type):
            children = [
                {"name": f.name, "type": str(f.type), "nullable": f.nullable, "node": self.node(f.type, rows)}
                for f in data_type
            ]
            return {"kind": "struct", "children": children}
        size = data_type.bit_width // 8
        values = self.place(rows * size)
        return {"kind": "fixed", "width": size, "values": values, "pitch": -(-rows * size // PAGE) * PAGE}

    def validity(self, node, nullable, rows):
        node["validity"] = self.place(rows) if nullable else None
        if node["kind"] == "fixed_size_list":
            self.validity(node["child"], True, rows * node["size"])
        elif node["kind"] == "list":
            self.validity(node["child"], node["child"]["kind"] != "struct", node["child_capacity"])
        for child in node.get("children", ()):
            self.validity(child["node"], child["nullable"], rows)


def width(data_type):
    try:
        return data_type.bit_width
    except ValueError:
        return 1 << 20


def is_text(data_type):
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(kind(data_type) for kind in kinds)


def item(data_type):
    if pa.types.is_map(data_type):
        return pa.struct([data_type.key_field.with_nullable(False), data_type.item_field])
    return data_type.value_type


class Writer:
    """Encodes arrays into the bytes of a slot, and notes how many bytes of each buffer are used."""

    def __init__(self, size):
        self.bytes = bytearray(size)
        self.used = []

    def put(self, column, name, offset, data):
        self.bytes[offset : offset + len(data)] = data
        self.used.append((column, name, offset, len(data)))

    def column(self, name, node, values, path=""):
        """`values` are a pyarrow array of the stored type."""
        kind = node["kind"]
        valid = np.array(values.is_valid().to_pylist(), np.uint8)
        if node["validity"] is not None:
            self.put(name, path + "validity", node["validity"], valid.tobytes())
        if kind == "bool":
            self.put(name, path + "values", node["values"], bytes(1 if v else 0 for v in values.to_pylist()))
        elif kind == "fixed":
            self.put(name, path + "values", node["values"], fixed(values, valid, node["width"]))
        elif kind == "view":
            self.views(name, node, values.to_pylist(), path)
        elif kind == "fixed_size_list":
            nothing = [None] * node["size"]
            flat = [v for row in values.to_pylist() for v in (nothing if row is None else row)]
            self.column(name, node["child"], pa.array(flat, values.type.value_type), path + "child.")
        elif kind == "list":
            rows = values.to_pylist()
            sizes = [0 if row is None else len(row) for row in rows]
            # Backwards, as lists lie that were appended in another order than their rows.
            offsets, flat = [0] * len(rows), []
            for i in reversed(range(len(rows))):
                offsets[i] = len(flat)
                flat += rows[i] or []
            self.put(name, path + "offsets", node["offsets"], struct.pack(f"<{len(rows)}q", *offsets))
            self.put(name, path + "sizes", node["sizes"], struct.pack(f"<{len(rows)}q", *sizes))
            if pa.types.is_map(values.type):
                names = [f.name for f in item(values.type)]
                flat = [dict(zip(names, pair)) for pair in flat]
            self.column(name, node["child"], pa.array(flat, item(values.type)), path + "child.")
        elif kind == "struct":
            for i, child in enumerate(node["children"]):
                self.column(name, child["node"], values.field(i), f"{path}children.{i}.")
        else:
            raise AssertionError(kind)

    def views(self, name, node, values, path):
        heap, slots = bytearray(), bytearray()
        for value in values:
            data = b"" if value is None else value.encode() if isinstance(value, str) else value
            if len(data) <= 12:
                slots += struct.pack("<i12s", len(data), data)
            else:
                slots += struct.pack("<i4sii", len(data), data[:4], len(heap) // HEAP_BUFFER, len(heap) % HEAP_BUFFER)
                heap += data
        assert len(heap) <= node["heap_bytes"], "the test's heap is too small"
        self.put(name, path + "views", node["views"], slots)
        self.put(name, path + "heap", node["heap"], heap)


def fixed(values, valid, size):
    """Raw values; under nulls NaN in floats, 0 in others."""
    if not len(values):
        return b""
    start = values.offset * size
    raw = np.frombuffer(values.buffers()[1], np.uint8)[start : start + len(values) * size].reshape(-1, size).copy()
    null = {"halffloat": np.float16, "float": np.float32, "double": np.float64}.get(str(values.type))
    raw[valid == 0] = 0 if null is None else np.frombuffer(null(np.nan).tobytes(), np.uint8)
    return raw.tobytes()


# -- memory


class HostMemory:
    """One slot in a memory file, written through a mapping of its own."""

    def __init__(self, size):
        self.descriptor = os.memfd_create("pinion-test-slot", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self.map = mmap.mmap(self.descriptor, size)

    def write(self, data):
        self.map[:] = bytes(data)

    def read(self, offset, size):
        return self.map[offset : offset + size]

    def export(self):
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)


# -- the pin and the server


class TestPin:
    """A pin with slots, generations and leases."""

    __test__ = False

    def __init__(self, table, key, capacity=64, slots=2, memory=HostMemory, device=None, mode="fresh", **layout):
        self.id = f"p{os.urandom(4).hex()}"
        self.table = table
        self.key = key
        self.mode = mode
        self.memory = memory
        self.device = device or {"kind": "host", "uuid": "host", "ordinal": 0}
        self.slots = slots
        self.layout_options = layout
        self.layout_number = 0
        self.number = 0
        # What lies in each slot: (generation, table), and the newest slot.
        self.lay_out(table.schema, capacity)
        self.publish(table)

    def lay_out(self, schema, capacity):
        """A new layout: new slots, nothing in them."""
        self.schema = schema
        self.layout_number += 1
        self.layout = Layout(schema, capacity, **self.layout_options)
        self.regions = [self.memory(self.layout.slot_bytes) for _ in range(self.slots)]
        self.contents = [None] * self.slots
        self.used = [None] * self.slots
        self.newest = None

    def publish(self, table, leased=()):
        """Writes a generation into a slot that is not leased. False if there is none: the pin stalls."""
        free = [i for i in range(self.slots) if i not in leased and i != self.newest]
        if not free:
            return False
        self.number += 1
        slot = free[0]
        writer = Writer(self.layout.slot_bytes)
        for column in self.layout.columns:
            values = table.column(column["name"]).combine_chunks()
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            writer.column(column["name"], column["node"], values)
        self.regions[slot].write(writer.bytes)
        self.contents[slot] = (self.number, table)
        self.used[slot] = writer.used
        self.newest = slot
        return True

    def layout_json(self):
        return {
            "layout": self.layout_number,
            "kind": self.mode,
            "form": "columns",
            "device": self.device,
            "capacity_rows": self.layout.capacity,
            "slot_bytes": self.layout.slot_bytes,
            "slots": self.slots,
            "columns": self.layout.columns,
        }

    def generation_json(self):
        number, table = self.contents[self.newest]
        return {
            "layout": self.layout_number,
            "slot": self.newest,
            "number": number,
            "rows": table.num_rows,
            "snapshot": f"1-{number}",
            "positions": {"events": {"0": number}},
            "age_ms": 0,
            "stalled_by_lease": None,
            "bytes_written": 0,
        }


class Refused(Exception):
    """Becomes an ERROR frame."""

    def __init__(self, code, error, message, **details):
        super().__init__(message)
        self.code = code
        self.details = {"error": error, "message": message, **details}


class StubServer:
    """Serves pins on a Unix socket. `pins` by name; `leases` and `mappings` of all connections."""

    def __init__(self, pins):
        self.folder = tempfile.mkdtemp(prefix="pinion-stub-")
        self.path = str(Path(self.folder) / "lane.sock")
        self.pins = dict(pins)
        self.lock = threading.RLock()
        self.released = threading.Condition(self.lock)
        # (connection, id) -> (pin, slot, layout number), and (connection, id) -> (pin, layout number).
        self.leases = {}
        self.mappings = {}
        self.actions = []
        self.requests = []
        # What the server says of a slot instead of the truth.
        self.lie = None
        # Kind of a reply -> how many bytes of it come at once, and after how many seconds the others do.
        self.slow = {}
        # Kinds of which the next reply comes under another request's number.
        self.strange = set()
        self.connections = []
        self.start()

    def start(self):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.path)
        self.listener.listen()
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    @property
    def url(self):
        return f"lane://{self.path}"

    def accept(self, listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=Connection(self, connection).serve, daemon=True).start()

    def hang_up(self):
        """Ends every connection, as a server that stops does; what was leased ends with them."""
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.connections = []
        self.wait(lambda: not self.leases and not self.mappings)

    def restart(self, pins):
        """Another server at the same place, with other pins."""
        self.stop()
        os.unlink(self.path)
        self.pins = dict(pins)
        self.start()

    def stop(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.hang_up()

    def publish(self, name, table):
        with self.lock:
            pin = self.pins[name]
            leased = {slot for p, slot, layout in self.leases.values() if p is pin and layout == pin.layout_number}
            return pin.publish(table, leased)

    def wait(self, what, seconds=5):
        """Waits until something is true of the books; returns whether it became so."""
        with self.released:
            return self.released.wait_for(what, seconds)

    def pin(self, named):
        for name, pin in self.pins.items():
            if named in (name, pin.id):
                return name, pin
        raise Refused(5, "UNKNOWN_PIN", f"no pin {named!r}")


class Connection:
    def __init__(self, server, connection):
        self.server = server
        self.socket = connection
        self.next = 0
        self.greeted = False

    def serve(self):
        try:
            while (header := self.read(16)) is not None:
                size, kind, flags, reserved, request, detail = HEADER.unpack(header)
                payload = self.read(size) if size else b""
                self.server.requests.append(kind)
                assert reserved == 0 and (flags == 0 or kind == 4)
                assert self.greeted or kind == 1
                self.answer(kind, flags, request, detail, payload)
        except OSError:
            pass
        finally:
            with self.server.released:
                for book in (self.server.leases, self.server.mappings):
                    for key in [key for key in book if key[0] is self]:
                        del book[key]
                self.server.released.notify_all()
            self.socket.close()

    def read(self, size):
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            if not more:
                return None
            data += more
        return data

    def send(self, kind, request, payload=b"", detail=0, descriptors=()):
        if kind in self.server.strange:
            self.server.strange.remove(kind)
            request += 1000
        frame = HEADER.pack(len(payload), kind, 0, 0, request, detail) + payload
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        at_once, seconds = self.server.slow.get(kind, (len(frame), 0))
        sent = self.socket.sendmsg([frame[:at_once]], control) if at_once else 0
        time.sleep(seconds)
        if sent == 0:
            sent = self.socket.sendmsg([frame], control)
        self.socket.sendall(frame[sent:])
        for descriptor in descriptors:
            os.close(descriptor)

    def answer(self, kind, flags, request, detail, payload):
        handlers = {4: self.release, 7: self.action, 9: self.map, 10: self.latest, 11: self.row_ids, 12: self.checksum}
        if kind == 1:
            self.greeted = payload[:8] == b"PINLANE\0"
            self.send(129, request, text({"server": "a test double", "lookup_max_rows": 1 << 20}), 1)
        elif kind == 8:
            self.send(136, request, payload)
        else:
            try:
                with self.server.released:
                    reply = handlers[kind](request, flags, detail, payload)
                    self.server.released.notify_all()
                self.send(*reply)
            except Refused as refused:
                self.send(255, request, text(refused.details), refused.code)

    def number(self):
        self.next += 1
        return self.next

    def action(self, request, _flags, _detail, payload):
        command = json.loads(payload)
        body = command["body"]
        self.server.actions.append((command["action"], body))
        if command["action"] == "pin":
            name, pin = self.server.pin(body.get("name", body["table"]))
            reply = {"pin": pin.id, "name": name}
        elif command["action"] == "unpin":
            name, _ = self.server.pin(body["pin"])
            del self.server.pins[name]
            reply = {}
        else:
            reply = {"pins": [{"pin": pin.id, "name": name} for name, pin in self.server.pins.items()]}
        return 135, request, text(reply)

    def map(self, request, _flags, _detail, payload):
        name, pin = self.server.pin(json.loads(payload)["pin"]["pin"])
        descriptors = [region.export() for region in pin.regions]
        mapping = self.number()
        self.server.mappings[self, mapping] = (pin, pin.layout_number)
        about = text(
            {
                "pin": pin.id,
                "name": name,
                "table": name,
                "key": pin.key,
                "mapping": {"id": mapping, "bytes": pin.slots * pin.layout.slot_bytes},
                "layout": pin.layout_json(),
                "generation": pin.generation_json(),
            }
        )
        schemas = bytes(pin.layout.stored.serialize()) + bytes(pin.schema.serialize())
        return 137, request, about + schemas, len(about), descriptors

    def latest(self, request, _flags, _detail, payload):
        mapping = json.loads(payload)["latest"]["mapping"]
        if (self, mapping) not in self.server.mappings:
            raise Refused(3, "UNKNOWN_MAPPING", f"no mapping {mapping}")
        pin, layout = self.server.mappings[self, mapping]
        self.server.pin(pin.id)
        if layout != pin.layout_number:
            raise Refused(9, "LAYOUT_CHANGED", f"layout {pin.layout_number}")
        lease = self.number()
        self.server.leases[self, lease] = (pin, pin.newest, layout)
        return 138, request, text(pin.generation_json() | {"lease": {"id": lease}})

    def leased(self, lease):
        if (self, lease) not in self.server.leases:
            raise Refused(3, "UNKNOWN_LEASE", f"no lease {lease}")
        pin, slot, layout = self.server.leases[self, lease]
        return pin, slot

    def row_ids(self, request, _flags, detail, payload):
        pin, slot = self.leased(json.loads(payload[:detail])["row_ids"]["lease"])
        reader = pa.BufferReader(payload[detail:])
        schema = pa.ipc.read_schema(reader)
        keys = pa.ipc.read_record_batch(pa.ipc.read_message(reader), schema)
        if set(keys.schema.names) != set(pin.key):
            raise Refused(3, "SCHEMA", f"the key is {pin.key}")
        _, table = pin.contents[slot]
        rows = {tuple(row.values()): i for i, row in enumerate(table.select(pin.key).to_pylist())}
        found = [rows.get(tuple(row[name] for name in pin.key), -1) for row in keys.to_pylist()]
        return 139, request, struct.pack(f"<{len(found)}q", *found), len(found)

    def checksum(self, request, _flags, _detail, payload):
        pin, slot = self.leased(json.loads(payload)["checksum"]["lease"])
        read = pin.regions[slot].read
        buffers = [
            {"column": column, "buffer": name, "offset": at, "bytes": n, "crc32": zlib.crc32(read(at, n))}
            for column, name, at, n in pin.used[slot]
        ]
        if self.server.lie:
            self.server.lie(buffers)
        return 140, request, text({"buffers": buffers})

    def release(self, request, flags, detail, _payload):
        book = {2: self.server.leases, 3: self.server.mappings}[flags]
        if book.pop((self, detail), None) is None:
            raise Refused(3, "UNKNOWN_LEASE" if flags == 2 else "UNKNOWN_MAPPING", f"no {detail}")
        return 132, request


def text(value):
    data = json.dumps(value).encode()
    return data + b" " * (-len(data) % 8)
