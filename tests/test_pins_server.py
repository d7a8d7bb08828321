"""Pins over a real server: shared host memory, the Python client, and processes that die.

The fears: a byte in a slot that the table does not have, or that changes under a lease; memory that is given back
under a reader, or never; a dead process whose forked children keep what it held; a client that believes an old
layout; a byte in a request that the server trusts.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pinion
import pyarrow as pa
import pytest
from support import flight as calls
from support.process import binary, environment
from support.wait import until
from test_lane import LATEST, WIDER, calls_metrics, connect, items, python_environment, usage
from test_segments import MIXED, rows

HEADER = struct.Struct("<IBBHII")
# What a server needs for a pin of a few thousand rows is far below it.
ROOM = {"PINION__GDS__BUDGET_BYTES": "256 MiB"}


@pytest.fixture
def server(store, serve):
    store.apply(LATEST)
    return serve(env=ROOM)


@pytest.fixture
def client(server):
    with connect(server) as both:
        yield both


def pins(server):
    return calls.action(calls.connect(server), "pins")[0]["pins"]


def devices(server):
    return calls.action(calls.connect(server), "pins")[0]["devices"]


def held(server):
    """Process ids of leases and of mappings, of all pins."""
    listed = pins(server)
    return [[note["pid"] for pin in listed for note in pin[kind]] for kind in ("leases", "mappings")]


def comparable(table):
    """Rows in an order of their own, dictionaries and views as plain values."""
    return sorted(map(str, table.to_pylist()))


def assert_equal_to_flight(client, view, table):
    """The rows of a view are those of the Flight scan of its snapshot."""
    scanned = client.scan(table, snapshot=view.snapshot, local=False)
    read = view.to_arrow(declared=True)
    read.validate(full=True)
    assert read.schema.equals(scanned.select(read.column_names).schema)
    assert comparable(read) == comparable(scanned.select(read.column_names))


def newest(client, pin, table="items"):
    """A view of the table's present snapshot; left open."""
    snapshot = client.map(table).snapshot
    return caught_up(pin, lambda view: view.snapshot == snapshot)


def caught_up(pin, wanted):
    """A view of the first generation in which `wanted(view)` is true; left open."""

    def look():
        view = pin.latest()
        if wanted(view):
            return view
        view.close()
        return None

    return until(look, every=0.005)


# -- the same rows


def test_every_type_of_a_pin_equals_the_flight_scan_nulls_included(store, serve):
    store.apply(MIXED)
    server = serve(env=ROOM)
    with connect(server) as client:
        schema = client.scan("mixed", local=False).schema
        client.put("mixed", pa.Table.from_pylist(rows(1, range(3000), 10**15), schema=schema))
        client.action("flush", {"table": "mixed"})
        client.put("mixed", pa.Table.from_pylist(rows(2, range(100, 1000, 7), 10**15 + 10**9), schema=schema))
        client.delete("mixed", {"id": pa.array([6, 9]), "kind": ["k0", "k0"]})
        for mode in ("fresh", "frozen"):
            pin = client.pin("mixed", mode=mode, name=mode)
            with pin.latest() as view:
                assert view.rows == 2998
                assert pin.key == ["id", "kind"]
                assert_equal_to_flight(client, view, "mixed")
            assert pin.verify()["number"] == 1
            pin.close()


def test_every_example_of_a_definition_can_be_pinned(store, serve):
    from support.process import EXAMPLES

    files = sorted(EXAMPLES.glob("*.toml"))
    assert files
    # Without what feeds them: no broker is running.
    texts = [file.read_text() for file in files]
    store.apply(*[text.split("[source.kafka]")[0] for text in texts])
    server = serve(env=ROOM)
    with connect(server) as client:
        tables = [t["table"] for t in client.action("stats")["tables"]]
        assert tables
        for table in tables:
            with client.pin(table, slots=2).latest() as view:
                assert view.rows == 0
                assert_equal_to_flight(client, view, table)
            client.unpin(table)


def test_another_process_reads_equal_values(server, client):
    client.put("items", items(range(1000)))
    pin = client.pin("items")
    script = (
        "import pinion, sys, json\n"
        f"c = pinion.connect('lane://{server.lane}')\n"
        "with c.pin('items').latest() as view:\n"
        "    t = view.to_arrow(['item', 'price', 'name'], declared=True)\n"
        "    print(json.dumps([view.snapshot, sorted(t.to_pylist(), key=lambda r: r['item'])]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=python_environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    snapshot, read = json.loads(done.stdout)
    scanned = client.scan("items", ["item", "price", "name"], snapshot=snapshot, local=False)
    assert read == sorted(scanned.to_pylist(), key=lambda row: row["item"])
    # The pin stays; what the process held of it does not.
    until(lambda: held(server) == [[], [os.getpid()]], seconds=1)
    assert pin.row_count == 1000


def test_a_fresh_pin_follows_puts_deletes_flushes_and_merges(server, client):
    client.put("items", items(range(2000)))
    pin = client.pin("items", slots=3)
    generator = random.Random(4)
    version = 0
    for step in range(40):
        version += 1
        what = generator.randrange(5)
        ids = generator.sample(range(2400), 150)
        if what < 3:
            client.put("items", items(ids, version))
        elif what == 3:
            client.delete("items", {"item": pa.array(ids, pa.int64())})
        else:
            client.action(generator.choice(["flush", "merge"]), {"table": "items"})
        with newest(client, pin) as view:
            assert_equal_to_flight(client, view, "items")
            if step % 5 == 0:
                view.verify()


def test_a_frozen_pin_stays_as_it_was(server, client):
    client.put("items", items(range(300)))
    pin = client.pin("items", mode="frozen")
    with pin.latest() as view:
        before = view.to_arrow(declared=True)
    client.put("items", items(range(200, 500), 1))
    client.action("merge", {"table": "items"})
    time.sleep(0.1)
    with pin.latest() as view:
        assert view.generation == 1
        assert view.to_arrow(declared=True).equals(before)
        assert pin.verify()["number"] == 1


def test_a_leased_generation_never_changes_while_the_table_does(server, client):
    client.put("items", items(range(300)))
    pin = client.pin("items", slots=3)
    stop = threading.Event()

    def write():
        with connect(server) as writer:
            version = 0
            while not stop.is_set():
                version += 1
                writer.put("items", items(range(300), version))

    def versions(arrow):
        return {name.rpartition(" v")[2] for name in arrow["name"].to_pylist() if name is not None}

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    try:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            with pin.latest() as view:
                arrow = view.to_arrow(["item", "price", "name"])
                before = arrow.to_pylist()
                # Each put replaced all rows: a generation holds one, whole.
                [version] = versions(arrow)
                assert view.rows == 300 and before == sorted_as(before, int(version))
                view.verify()
                time.sleep(0.02)
                assert arrow.to_pylist() == before
                seen.append(int(version))
    finally:
        stop.set()
        thread.join()
    assert seen == sorted(seen) and len(set(seen)) > 5, seen
    with newest(client, pin) as view:
        assert_equal_to_flight(client, view, "items")


def sorted_as(read, version):
    """What `items` of a version says of the same items, in the order read."""
    wanted = {row["item"]: row for row in items(range(300), version).select(["item", "price", "name"]).to_pylist()}
    return [wanted[row["item"]] for row in read]


def test_row_ids_are_those_of_the_leased_generation(server, client):
    client.put("items", items(range(0, 2000, 2)))
    for mode, key in (("fresh", 8), ("frozen", 10)):
        pin = client.pin("items", mode=mode, name=mode)
        with pin.latest() as view:
            column = view.to_arrow(["item"])["item"].to_pylist()
            ids = [int(i) for i in view.row_ids({"item": pa.array([0, 1, key, 1998, 10**12], pa.int64())})]
            assert [None if i < 0 else column[i] for i in ids] == [0, None, key, 1998, None]
            narrow = view.row_ids({"item": pa.array([key], pa.int16())})
            assert int(narrow[0]) == ids[2]
            # The last row moves into the hole, in generations to come.
            client.delete("items", {"item": pa.array([key], pa.int64())})
            if mode == "fresh":
                with newest(client, pin) as later:
                    gone = later.row_ids({"item": pa.array([key, 0], pa.int64())})
                    assert [int(i) for i in gone] == [-1, later.to_arrow(["item"])["item"].to_pylist().index(0)]
            assert int(view.row_ids({"item": pa.array([key], pa.int64())})[0]) == ids[2]
            for wrong in ({"item": ["a"]}, {"other": [1]}):
                with pytest.raises(pinion.InvalidArgument) as refused:
                    view.row_ids(wrong)
                assert refused.value.error == "KEYS"


def test_features_are_pinned_in_the_order_asked_and_lie_as_a_matrix(store, serve):
    floats = LATEST.replace('price = "int32"', "\n".join(f'f{i} = "float32"' for i in range(8)))
    store.apply(floats)
    server = serve(env=ROOM)
    with connect(server) as client:
        schema = client.scan("items", local=False).schema
        values = [{"item": i, **{f"f{k}": i + k / 8 for k in range(8)}} for i in range(50)]
        client.put("items", pa.Table.from_pylist([{"at": 10**15, "name": "x", "code": "y", **v} for v in values], schema=schema))
        pin = client.pin("items", ["f6", "f1", "f3", "item"])
        assert pin.schema.names == ["f6", "f1", "f3", "item"]
        with pin.latest() as view:
            array = view.matrix().to_numpy()
            names = view.matrix_columns()
            assert sorted(names) == ["f1", "f3", "f6"]
            item = view.to_arrow(["item"])["item"].to_pylist()
            assert array.tolist() == [[i + int(name[1:]) / 8 for name in names] for i in item]


# -- who holds what


HOLD = """
import os, sys, time, pinion
c = pinion.connect('lane://' + sys.argv[1])
view = c.pin('items').latest()
children = []
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        time.sleep(100)
        os._exit(0)
    children.append(child)
print(*children, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("workers", [0, 4])
def test_a_consumer_that_is_killed_holds_nothing_a_second_later(server, client, workers):
    client.put("items", items(range(1000)))
    client.action("pin", {"table": "items"})
    threads, descriptors = usage(server)
    command = [sys.executable, "-c", HOLD, str(server.lane), str(workers)]
    consumer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=python_environment())
    children = [int(n) for n in consumer.stdout.readline().split()]
    try:
        assert len(children) == workers
        assert held(server) == [[consumer.pid], [consumer.pid]]
        consumer.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: held(server) == [[], []], seconds=1, every=0.01)
        assert time.monotonic() - killed < 1
        for child in children:
            os.kill(child, 0)
        consumer.wait()
        until(lambda: usage(server) <= (threads, descriptors))
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_memory_stays_valid_when_the_server_is_killed_and_a_new_one_is_found(server):
    client = pinion.connect(f"grpc+unix://{server.uds}", lane=f"lane://{server.lane}")
    client.put("items", items(range(1000)))
    pin = client.pin("items")
    first = pin.id
    with pin.latest() as view:
        array = view.to_arrow(["item", "name"])
        before = array.to_pylist()
        server.kill()
        assert array.to_pylist() == before
        server.start()
        client.put("items", items(range(500, 1500), 1))
        assert array.to_pylist() == before
        with pytest.raises(pinion.LeaseGone):
            view.check()
    with newest(client, pin) as view:
        assert view.rows == 1500
        assert_equal_to_flight(client, view, "items")
        assert pin.id != first
    assert array.to_pylist() == before
    until(lambda: held(server) == [[], [os.getpid()]])
    client.close()


def test_a_pin_that_is_ended_is_read_to_the_end_and_its_memory_comes_back(server, client):
    client.put("items", items(range(1000)))
    pin = client.pin("items")
    view = pin.latest()
    before = view.to_arrow(declared=True)
    client.action("unpin", {"pin": pin.id})
    [listed] = pins(server)
    assert listed["retired"] == "unpinned" and [note["pid"] for note in listed["leases"]] == [os.getpid()]
    client.put("items", items(range(1000), 5))
    assert view.verify()["number"] == view.generation
    assert view.to_arrow(declared=True).equals(before)
    with pytest.raises(pinion.UnknownPin):
        pin.latest()
    assert devices(server)[0]["used_bytes"] > 0
    view.close()
    pin.close()
    del view, pin, before
    until(lambda: devices(server)[0]["used_bytes"] == 0, seconds=5)
    assert pins(server) == []


def test_a_lease_that_stalls_a_pin_is_named_and_its_end_lets_it_go_on(server, client):
    client.put("items", items(range(100)))
    pin = client.pin("items")
    old = pin.latest()
    client.put("items", items(range(100), 1))
    new = caught_up(pin, lambda view: view.generation > old.generation)
    # Both slots are leased.
    client.put("items", items(range(100), 2))
    stalled = until(lambda: pins(server)[0]["generation"]["stalled_by_lease"])
    assert stalled["pid"] == os.getpid()
    with pin.latest() as view:
        assert view.generation == new.generation
        assert view.info["stalled_by_lease"]["pid"] == os.getpid()
    text = listed(server)
    assert f"{os.getpid()} for" in text
    old.close()
    with newest(client, pin) as view:
        assert_equal_to_flight(client, view, "items")
    until(lambda: pins(server)[0]["generation"]["stalled_by_lease"] is None)
    new.close()
    metrics = calls_metrics(server)
    assert 'pinion_pin_stalls_total{pin="items",table="items"} 1' in metrics


def test_a_pin_grows_by_a_slot_before_it_stalls(server, client):
    client.put("items", items(range(100)))
    pin = client.pin("items", max_slots=3)
    views = [pin.latest()]
    for version in (1, 2):
        client.put("items", items(range(100), version))
        last = views[-1].generation
        views.append(caught_up(pin, lambda view: view.generation > last))
    assert len({(view.address) for view in views}) == 3
    assert pins(server)[0]["slots"] == 3
    for view in views:
        view.verify()
        view.close()


# -- layouts, budgets, refusals


def test_a_pin_that_outgrows_its_layout_is_laid_out_anew(server, client):
    client.put("items", items(range(100)))
    pin = client.pin("items")
    old = pin.latest()
    before = old.to_arrow(declared=True)
    layout = old.info["layout"]
    client.put("items", items(range(20_000), 1))
    with newest(client, pin) as view:
        assert view.rows == 20_000
        assert view.info["layout"] > layout
        assert_equal_to_flight(client, view, "items")
        view.verify()
    assert old.to_arrow(declared=True).equals(before)
    old.verify()


def test_a_pin_follows_a_definition_that_changes(server, client):
    client.put("items", items(range(100)))
    pin = client.pin("items", ["item", "price"])
    client.action("apply", {"definitions": [WIDER]})
    client.put("items", items(range(150), 1, price=pa.int64()))
    with newest(client, pin) as view:
        assert view.rows == 150
        assert view.to_arrow()["price"].type == pa.int64()
        assert_equal_to_flight(client, view, "items")


def test_an_old_layout_and_unknown_numbers_are_refused_by_name(server, client):
    client.put("items", items(range(100)))
    client.action("pin", {"table": "items"})
    with Raw(server) as lane:
        pinned = lane.json(9, {"pin": {"pin": "items"}})
        mapping = pinned["mapping"]["id"]
        client.put("items", items(range(20_000), 1))
        until(lambda: pins(server)[0]["layout"] > 1)
        assert lane.error(10, {"latest": {"mapping": mapping}}) == (9, "LAYOUT_CHANGED")
        assert lane.error(10, {"latest": {"mapping": mapping + 1}}) == (3, "UNKNOWN_MAPPING")
        assert lane.error(12, {"checksum": {"lease": 7}}) == (3, "UNKNOWN_LEASE")
        assert lane.error(9, {"pin": {"pin": "itens"}}) == (5, "UNKNOWN_PIN")
        assert lane.error(9, {"pin": {"pin": "items", "slot": 1}}) == (3, "COMMAND_SYNTAX")
        assert lane.ask(4, b"", mapping, 3)[0] == 132
        code, payload = lane.ask(4, b"", mapping, 3)[1:]
        assert (code, json.loads(payload)["error"]) == (3, "UNKNOWN_MAPPING")


def test_refusals_name_the_limit_and_the_difference(store, serve):
    store.apply(LATEST)
    server = serve(env={"PINION__GDS__BUDGET_BYTES": "2 MiB"})
    with connect(server) as client:
        client.put("items", items(range(1000)))
        with pytest.raises(pinion.ResourceExhausted) as refused:
            client.pin("items", slots=16)
        assert refused.value.error == "PIN_BUDGET"
        assert refused.value.details["budget_bytes"] == 2 << 20
        assert refused.value.details["needed_bytes"] > 2 << 20
        assert pins(server) == [] and devices(server)[0]["used_bytes"] == 0
        pin = client.pin("items")
        assert client.pin("items").id == pin.id
        with pytest.raises(pinion.FailedPrecondition) as refused:
            client.pin("items", mode="frozen")
        assert refused.value.error == "PIN_DIFFERS"
        assert refused.value.details["differs"] == ["mode", "slots", "max_slots"]
        for body, error in (
            ({"table": "itens"}, "UNKNOWN_TABLE"),
            ({"table": "items", "device": 3}, "UNKNOWN_DEVICE"),
            ({"table": "items", "name": ""}, "PIN_REQUEST"),
            ({"table": "items", "name": "n", "features": ["prise"]}, "PIN_REQUEST"),
            ({"table": "items", "name": "n", "slots": 1}, "PIN_REQUEST"),
            ({"table": "items", "mod": "fresh"}, "ACTION_BODY"),
        ):
            with pytest.raises(pinion.PinionError) as refused:
                client.action("pin", body)
            assert refused.value.error == error, body
        with pytest.raises(pinion.UnknownPin):
            client.unpin("nothing")


def test_a_pin_that_nobody_holds_gives_way_and_one_that_is_held_does_not(store, serve):
    store.apply(LATEST)
    server = serve(env={"PINION__GDS__BUDGET_BYTES": "1 MiB"})
    with connect(server) as client:
        client.put("items", items(range(2000)))
        body = {"table": "items", "mode": "frozen"}
        size = client.action("pin", {**body, "name": "p0"})["device_bytes"]
        fit = (1 << 20) // size
        assert 2 <= fit < 16, size
        held_pin = client.pin("items", mode="frozen", name="p0")
        view = held_pin.latest()
        before = view.to_arrow(declared=True)
        for number in range(1, 2 * fit):
            client.action("pin", {**body, "name": f"p{number}"})
        names = [pin["name"] for pin in pins(server)]
        assert "p0" in names and "p1" not in names and len(names) == fit
        assert devices(server)[0]["evictions"] == fit
        assert view.verify() and view.to_arrow(declared=True).equals(before)


def test_many_that_pin_the_same_at_once_share_one(server, client):
    client.put("items", items(range(5000)))
    found = []

    def ask():
        with connect(server) as other:
            found.append(other.action("pin", {"table": "items"})["pin"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert len(pins(server)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_pins_are_for_the_server_s_own_user_only(server, client):
    client.put("items", items(range(10)))
    client.action("pin", {"table": "items"})
    os.chmod(server.folder, 0o711)
    os.chown(server.lane, -1, 61002)

    def somebody(results):
        os.setgroups([61002])
        os.setgid(61003)
        os.setuid(61001)
        with pinion.connect(f"lane://{server.lane}") as other:
            rows = other.lookup(["items:price"], {"item": [1]}).num_rows
            try:
                other.pin("items")
                results.put((rows, None))
            except pinion.PeerRefused as refused:
                results.put((rows, refused.details["uid"]))

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=somebody, args=(results,))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert results.get() == (1, 61001)


# -- the command line, metrics


def listed(server, *arguments):
    command = [str(binary()), "pins", "--server", server.flight, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(server, *arguments):
    command = [str(binary()), *arguments, "--server", server.flight]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)


def test_the_command_line_pins_lists_and_unpins(server, client):
    client.put("items", items(range(1234)))
    made = run(server, "pin", "items", "--features", "item,price", "--frozen", "--device", "host", "--name", "epoch-7")
    assert made.returncode == 0, made.stderr
    assert "epoch-7" in made.stdout and "1,234" in made.stdout.replace(" ", ",")
    pin = client.pin("items", ["item", "price"], device="host", mode="frozen", name="epoch-7")
    with pin.latest():
        [told] = json.loads(listed(server, "--output", "json"))
        assert told["name"] == "epoch-7" and told["leases"][0]["pid"] == os.getpid()
        text = listed(server)
        assert "epoch-7" in text and "frozen" in text and "STALLED BY" in text
    metrics = calls_metrics(server)
    assert 'pinion_pin_rows{pin="epoch-7",table="items"} 1234' in metrics
    assert "pinion_pins 1" in metrics and "pinion_device_used_bytes" in metrics
    assert run(server, "unpin", "epoch-7").returncode == 0
    missing = run(server, "unpin", "epoch-7")
    assert missing.returncode == 1 and "no pin" in missing.stderr
    metrics = calls_metrics(server)
    assert "pinion_pins 0" in metrics


# -- bytes that are no frames


class Raw:
    """A connection that says what it is told to."""

    def __init__(self, server):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(server.lane))
        assert self.ask(1, b"PINLANE\0" + struct.pack("<HH", 1, 1))[0] == 129

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def ask(self, kind, payload=b"", detail=0, flags=0):
        """Kind, detail and payload of the reply; descriptors are closed."""
        self.socket.sendall(HEADER.pack(len(payload), kind, flags, 0, 1, detail) + payload)
        header, descriptors, _, _ = socket.recv_fds(self.socket, 16, 253)
        for descriptor in descriptors:
            os.close(descriptor)
        size, kind, _, _, _, detail = HEADER.unpack(header)
        data = b""
        while len(data) < size:
            data += self.socket.recv(size - len(data))
        return kind, detail, data

    def json(self, kind, body):
        kind, detail, data = self.ask(kind, json.dumps(body).encode())
        assert kind != 255, data
        return json.loads(data[:detail] if kind == 137 else data)

    def error(self, kind, body):
        kind, code, data = self.ask(kind, json.dumps(body).encode())
        assert kind == 255
        return code, json.loads(data)["error"]


def test_malformed_requests_about_pins_are_refused_and_leave_nothing(server, client):
    client.put("items", items(range(100)))
    client.action("pin", {"table": "items"})
    threads, descriptors = usage(server)
    generator = random.Random(6)
    keys = pa.record_batch({"item": pa.array([1, 2, 500], pa.int64())})
    messages = keys.schema.serialize().to_pybytes() + keys.serialize().to_pybytes()
    good = 0
    for _ in range(400):
        with Raw(server) as lane:
            mapping = lane.json(9, {"pin": {"pin": "items"}})["mapping"]["id"]
            lease = lane.json(10, {"latest": {"mapping": mapping}})["lease"]["id"]
            command = json.dumps({"row_ids": {"lease": lease}}).encode()
            command += b" " * (-len(command) % 8)
            requests = [
                (9, b'{"pin": {"pin": "items"}}', 0, 0),
                (10, b'{"latest": {"mapping": %d}}' % mapping, 0, 0),
                (11, command + messages, len(command), 0),
                (12, b'{"checksum": {"lease": %d}}' % lease, 0, 0),
                (4, b"", generator.choice([lease, mapping, 99]), generator.choice([2, 3])),
            ]
            kind, payload, detail, flags = generator.choice(requests)
            data = bytearray(payload)
            for _ in range(generator.randrange(3)):
                if data:
                    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            if generator.random() < 0.2:
                data = data[: generator.randrange(len(data) + 1)]
            if generator.random() < 0.1:
                detail = generator.randrange(2**32)
            try:
                reply, code, _ = lane.ask(kind, bytes(data), detail, flags)
                good += reply != 255
                # The connection goes on: these are no errors of framing.
                assert lane.ask(8, b"still here")[2] == b"still here"
            except struct.error:
                raise AssertionError(f"the server hung up on kind {kind}: {bytes(data)!r}")
    assert good > 20
    until(lambda: held(server) == [[], []])
    until(lambda: usage(server) <= (threads, descriptors))
    with client.pin("items").latest() as view:
        view.verify()
