"""The local lane and the Python client: the same answers as over Flight, and nothing left behind.

The fears: a mapped table that differs from the scan of the same snapshot while rows are being replaced; a
client that dies, forks or hangs and keeps disk, threads or descriptors; a byte that the server trusts.
"""

import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pinion
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from oracle import NOT_FOUND, PRESENT
from pinion.lane import note_size, padded_json
from support import flight as calls
from support.process import binary, environment
from support.wait import until
from test_segments import MIXED, rows

LATEST = """
[table]
name = "items"
entity = [{ name = "item", type = "int64" }]
event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
history = "latest"

[features]
price = "int32"
name = "string"
code = "dictionary<values=string, indices=int16, ordered=0>"
"""
WIDER = LATEST.replace('price = "int32"', 'price = "int64"').replace(
    "[features]", '[features]\nrating = "float64"'
)
HISTORY = LATEST.replace('"items"', '"prices"').replace('"latest"', '"all"')
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def items(ids, version=0, **types):
    """Rows of `items` and `prices`; some values are null."""
    ids = list(ids)
    return pa.table(
        {
            "item": pa.array(ids, pa.int64()),
            "at": pa.array([NOON + timedelta(seconds=version)] * len(ids), pa.timestamp("us", tz="UTC")),
            "price": pa.array([None if i % 11 == 3 else i + version for i in ids], types.get("price", pa.int32())),
            "name": pa.array([None if i % 7 == 2 else f"item {i} v{version}" for i in ids]),
            "code": pa.array([f"c{i % 5}" for i in ids]),
        }
    )


@pytest.fixture
def server(store, serve):
    store.apply(LATEST, HISTORY)
    return serve()


@pytest.fixture
def client(server):
    with connect(server) as both:
        yield both


def connect(server, **options):
    return pinion.connect(server.flight, lane=f"lane://{server.lane}", **options)


def act(server, name, **body):
    return calls.action(calls.connect(server), name, **body)[0]


def leases(server):
    return act(server, "leases")["leases"]


def assert_mapped_equals_flight(client, table, features=None):
    """A mapped table and the Flight scan of its snapshot: same schema, rows and order."""
    mapped = client.map(table, features)
    scanned = client.scan(table, features, snapshot=mapped.snapshot, local=False)
    assert mapped.table.schema.equals(scanned.schema, check_metadata=True)
    mapped.table.validate(full=True)
    assert plain(mapped.table).equals(plain(scanned))
    return mapped


def plain(table):
    """Dictionaries decoded: two encodings of equal values are equal."""
    columns = [
        pc.cast(c, c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in table.combine_chunks().columns
    ]
    return pa.table(dict(zip(table.column_names, columns)))


def in_order(table):
    return plain(table).sort_by([(name, "ascending") for name in ("item", "at", "price", "name")])


# -- the same answers


def test_lookups_are_equal_over_the_lane_and_over_flight(server, client):
    client.put("items", items(range(100)))
    client.put("prices", items([5], version=60))
    over_flight = pinion.connect(server.flight)
    keys = {"item": [5, 7, 10_000, 5]}
    for arguments in (
        {"features": ["items:price", "items:name", "items:code"], "status": True, "event_time": True},
        {"features": ["items:price", "prices:price"], "full_feature_names": True, "status": True},
        {"features": ["prices:name"], "as_of": NOON, "status": True},
    ):
        lane, flight = client.lookup(keys=keys, **arguments), over_flight.lookup(keys=keys, **arguments)
        assert lane.schema.equals(flight.schema)
        assert plain(pa.Table.from_batches([lane])).equals(plain(pa.Table.from_batches([flight])))
    reply = client.lookup(["items:price"], keys, status=True)
    assert reply.column("price__status").to_pylist() == [PRESENT, PRESENT, NOT_FOUND, PRESENT]


def test_a_prepared_lookup_reads_the_newest_rows_and_any_number_of_keys(client):
    lookup = client.prepare(["items:price"], status=True)
    assert lookup({"item": [1]}).column("price__status").to_pylist() == [NOT_FOUND]
    client.put("items", items(range(5000)))
    for count in (1, 0, 5000, 3, 1000, 1):
        keys = pa.record_batch({"item": pa.array(range(count), pa.int64())})
        assert lookup(keys).column("price").to_pylist() == [None if i % 11 == 3 else i for i in range(count)]
    assert lookup({"item": pa.array([4], pa.int32())}).column("price").to_pylist() == [4]


def test_every_type_is_equal_mapped_and_looked_up(store, serve):
    store.apply(MIXED)
    with connect(serve()) as client:
        schema = client.scan("mixed", local=False).schema
        client.put("mixed", pa.Table.from_pylist(rows(1, range(9000), 10**15), schema=schema))
        client.action("flush", {"table": "mixed"})
        client.put("mixed", pa.Table.from_pylist(rows(2, range(100, 3000, 7), 10**15 + 10**9), schema=schema))
        client.delete("mixed", {"id": pa.array([6, 9]), "kind": ["k0", "k0"]})
        mapped = assert_mapped_equals_flight(client, "mixed")
        assert mapped.table.num_rows == 8998
        keys = mapped.table.select(["id", "kind"]).slice(50, 500).combine_chunks().to_batches()[0]
        features = [f"mixed:{name}" for name in schema.names[3:]]
        found = client.lookup(features, keys)
        assert found.to_pylist() == mapped.table.drop(["at"]).slice(50, 500).to_pylist()


def test_definitions_that_changed_are_equal_mapped(store, serve):
    store.apply(LATEST)
    with connect(serve()) as client:
        client.put("items", items(range(3000)))
        client.action("flush", {"table": "items"})
        client.action("apply", {"definitions": [WIDER]})
        client.put("items", items(range(50, 60), version=1, price=pa.int64()))
        client.action("flush", {"table": "items"})
        client.put("items", items(range(55, 57), version=2, price=pa.int64()))
        mapped = assert_mapped_equals_flight(client, "items")
        assert mapped.table.schema.field("price").type == pa.int64()
        # Without the widened and the new column the old segment is mapped as it is.
        narrow = assert_mapped_equals_flight(client, "items", ["name", "item"])
        assert narrow.copied_bytes < mapped.copied_bytes
        assert narrow.leased_bytes > mapped.leased_bytes


@pytest.mark.parametrize("table", ["items", "prices"])
def test_a_mapped_table_equals_the_scan_of_its_snapshot_under_a_writer(server, client, table):
    """The fear this file is named for. The writer replaces, deletes, flushes and merges all the time."""
    client.put(table, items(range(20_000)))
    client.action("flush", {"table": table})
    stop = threading.Event()
    failures = []

    def write():
        generator = random.Random(7)
        with pinion.connect(server.flight) as writer:
            version = 0
            while not stop.is_set():
                version += 1
                try:
                    ids = generator.sample(range(22_000), generator.randrange(1, 400))
                    writer.put(table, items(ids, version=version))
                    if version % 5 == 0:
                        at = pa.array([NOON + timedelta(seconds=version)], pa.timestamp("us", tz="UTC"))
                        writer.delete(table, {"item": [generator.randrange(22_000)], "at": at})
                    if version % 9 == 0:
                        writer.action("flush", {"table": table})
                    if version % 31 == 0:
                        writer.action("merge", {"table": table})
                except Exception as error:
                    failures.append(error)
                    return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        dirty = 0
        until = time.monotonic() + 6
        while time.monotonic() < until:
            # A merge between the two changes the order of rows, nothing else.
            mapped = client.map(table)
            scanned = client.scan(table, snapshot=mapped.snapshot, local=False)
            assert in_order(mapped.table).equals(in_order(scanned))
            dirty += mapped.copied_bytes > 0
        assert dirty > 5
    finally:
        stop.set()
        thread.join()
    assert not failures, failures


def test_an_empty_table_is_mapped(client):
    for features in (None, ["name"]):
        mapped = assert_mapped_equals_flight(client, "items", features)
        assert mapped.table.num_rows == 0


def test_a_mapped_table_is_not_copied(client):
    client.put("items", items(range(50_000)))
    client.action("merge", {"table": "items"})
    before = pa.total_allocated_bytes()
    mapped = client.map("items", ["item", "price", "name"])
    assert mapped.copied_bytes == 0
    assert pa.total_allocated_bytes() - before < 64 * 1024
    assert mapped.table.num_rows == 50_000


def test_a_table_with_few_replaced_rows_is_not_copied_either(client):
    client.put("items", items(range(50_000)))
    client.action("merge", {"table": "items"})
    replaced = [0, 1, 777, 49_999]
    client.put("items", items(replaced, version=1))
    mapped = assert_mapped_equals_flight(client, "items")
    assert mapped.copied_bytes < 4096, "more was copied than the rows of the log"
    client.put("items", items(range(0, 50_000, 100), version=2))
    mapped = assert_mapped_equals_flight(client, "items")
    assert mapped.copied_bytes > 100_000, "every batch has too many replaced rows to be cut"


def test_auto_takes_the_lane_for_whole_tables_and_flight_for_the_rest(server, client):
    client.put("items", items(range(100)))
    client.action("flush", {"table": "items"})
    held = client.scan("items", ["item"])
    assert len(leases(server)) == 1
    assert client.scan("items", filter="item < 3").num_rows == 3
    assert client.scan("items", limit=4).num_rows == 4
    assert client.scan("items", view="latest", local=False).num_rows == held.num_rows
    with pytest.raises(ValueError):
        client.scan("items", limit=4, local=True)
    with pinion.connect(f"lane://{server.lane}") as lane, pytest.raises(ValueError):
        lane.scan("items", limit=4)
    for local in (True, False):
        batches = client.scan_batches("items", local=local)
        assert sum(batch.num_rows for batch in batches) == 100


def test_a_put_is_seen_by_whoever_waits_for_its_token(client):
    ack = client.put("items", items([1]), id="one")
    assert ack["applied"] and ack["durable"]
    assert not client.put("items", items([1]), id="one")["applied"]
    assert client.lookup(["items:price"], {"item": [1]}, wait=ack).column("price").to_pylist() == [1]
    assert client.map("items", wait=ack).table.num_rows == 1
    assert {table["table"] for table in client.tables()} == {"items", "prices"}


# -- errors


def test_errors_are_typed_alike_on_both_ways(server, client):
    lane, flight = pinion.connect(f"lane://{server.lane}"), pinion.connect(server.flight)
    for way in (lane, flight):
        with pytest.raises(pinion.UnknownTable) as unknown:
            way.lookup(["itms:price"], {"item": [1]})
        assert (unknown.value.error, unknown.value.details["hint"]) == ("UNKNOWN_TABLE", "items")
        with pytest.raises(pinion.UnknownFeature):
            way.scan("items", ["prise"])
        with pytest.raises(pinion.InvalidArgument) as keys:
            way.lookup(["items:price"], {"itm": [1]})
        assert keys.value.error == "KEYS"
        with pytest.raises(pinion.SnapshotExpired):
            way.scan("items", snapshot="9-9")
        with pytest.raises(pinion.DeadlineExceeded):
            token = {"table": "items", "snapshot": "1-999999"}
            way.lookup(["items:price"], {"item": [1]}, wait=token, wait_timeout=0.02)
        # It goes on.
        assert way.lookup(["items:price"], {"item": [1]}).num_rows == 1
    with pytest.raises(ValueError):
        lane.put("items", items([1]))
    with pytest.raises(pinion.ConnectionLost):
        pinion.connect("lane:///nowhere/lane.sock")
    with pytest.raises(pinion.ConnectionLost):
        pinion.connect("grpc://127.0.0.1:1").scan("items")


def test_a_changed_type_ends_a_prepared_lookup_by_name(client):
    client.put("items", items([1]))
    lookup = client.prepare(["items:price"])
    for reply in (lookup({"item": [1]}), client.lookup(["items:price"], {"item": [1]})):
        assert reply.schema.field("price").type == pa.int32()
    client.action("apply", {"definitions": [WIDER]})
    client.put("items", pa.table({**{n: items([1], 9).column(n) for n in ("item", "at")}, "price": [2**40]}))
    with pytest.raises(pinion.DefinitionChanged):
        lookup({"item": [1]})
    # What the client keeps by itself it also prepares anew by itself.
    assert client.lookup(["items:price"], {"item": [1]}).column("price").to_pylist() == [2**40]
    assert client.prepare(["items:price"])({"item": [1]}).column("price").to_pylist() == [2**40]


# -- leases, and what remains of clients


def test_a_lease_ends_with_the_last_array_that_is_mapped(server, client):
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})
    table = client.scan("items", local=True)
    column = table.column("item").chunk(0).slice(10, 5)
    [lease] = leases(server)
    assert (lease["pid"], lease["table"], lease["overdue"]) == (os.getpid(), "items", False)
    del table
    assert len(leases(server)) == 1, "an array still points into the file"
    assert column.to_pylist() == [10, 11, 12, 13, 14]
    del column
    assert leases(server) == []
    assert client.lookup(["items:price"], {"item": [1]}).num_rows == 1


def test_mapped_rows_outlive_merges_the_client_and_the_server(server, client):
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})
    table = client.scan("items", local=True)
    expected = plain(client.scan("items", local=False))
    client.put("items", items(range(500), version=1))
    client.action("merge", {"table": "items"})
    client.close()
    server.stop()
    assert plain(table).equals(expected)


def test_a_client_that_is_killed_leaves_nothing(server, client):
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})
    script = (
        "import pinion, sys, time\n"
        f"c = pinion.connect('lane://{server.lane}')\n"
        "t = c.scan('items'); p = c.prepare(['items:price']); p({'item': [1]})\n"
        "print('ready', flush=True); time.sleep(100)\n"
    )
    threads, descriptors = usage(server)
    child = subprocess.Popen(["python", "-c", script], stdout=subprocess.PIPE, text=True, env=python_environment())
    assert child.stdout.readline() == "ready\n"
    assert [lease["pid"] for lease in leases(server)] == [child.pid]
    child.send_signal(signal.SIGKILL)
    child.wait()
    until(lambda: leases(server) == [])
    until(lambda: usage(server) <= (threads, descriptors))


def usage(server):
    """Threads of the lane, and open descriptors, of the server."""
    root = f"/proc/{server.process.pid}"
    names = []
    for task in os.listdir(f"{root}/task"):
        try:
            with open(f"{root}/task/{task}/comm") as comm:
                names.append(comm.read())
        except FileNotFoundError:
            pass
    return sum(name.startswith("pinion-lane") for name in names), len(os.listdir(f"{root}/fd"))


def python_environment():
    import sys

    env = environment()
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    env["PYTHONPATH"] = os.path.dirname(os.path.dirname(pinion.__file__))
    return env


def test_a_forked_child_has_a_connection_of_its_own(server, client):
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})
    table = client.scan("items", local=True)
    lookup = client.prepare(["items:price"])
    lookup({"item": [1]})

    def child(results):
        values = [lookup({"item": [i]}).column("price").to_pylist() for i in range(50)]
        # What the parent mapped is readable; letting go of it here is nobody's business there.
        total = table.num_rows
        try:
            client.scan("items", local=False)
            refused = None
        except pinion.FailedPrecondition as error:
            refused = error.error
        results.put((values, total, len(client.leases()), refused))

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=child, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    for i in range(500):
        assert lookup({"item": [i % 900]}).num_rows == 1
    expected = [[None if i % 11 == 3 else i] for i in range(50)]
    for _ in processes:
        values, total, held, refused = results.get()
        assert (values, total, held, refused) == (expected, 1000, 1, "FORKED")
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert len(leases(server)) == 1
    del table
    assert leases(server) == []


def test_a_restarted_server_is_found_again(store, serve, server, client):
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})
    lookup = client.prepare(["items:price"])
    over_flight = pinion.connect(flight=f"grpc+unix://{server.uds}").prepare(["items:price"])
    table = client.scan("items", local=True)
    for way in (lookup, over_flight):
        assert way({"item": [4]}).column("price").to_pylist() == [4]
    for end in (server.stop, server.kill):
        end()
        with pytest.raises(pinion.ConnectionLost):
            lookup({"item": [4]})
        server.start()
        for way in (lookup, over_flight):
            assert way({"item": [4]}).column("price").to_pylist() == [4]
        assert leases(server) == []
    assert table.num_rows == 1000


def test_threads_share_a_client(client):
    client.put("items", items(range(2000)))
    client.action("flush", {"table": "items"})
    lookup = client.prepare(["items:price"])
    failures = []

    def work(seed):
        generator = random.Random(seed)
        try:
            for _ in range(200):
                ids = [i for i in generator.sample(range(2000), generator.randrange(1, 50)) if i % 11 != 3]
                keys = pa.array(ids, generator.choice([pa.int64(), pa.int32(), pa.uint16()]))
                assert lookup({"item": keys}).column("price").to_pylist() == ids
                assert client.lookup(["items:price"], {"item": keys}).column("item").type == keys.type
                if generator.random() < 0.1:
                    assert client.scan("items", ["item"]).num_rows == 2000
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("timeout", [None, 20])
def test_a_lookup_that_spins_does_not_sleep_meanwhile(server, timeout):
    with connect(server) as client:
        put = client.put("items", items([1]))
    log, _, sequence = put["token"]["snapshot"].partition("-")
    later = {"table": "items", "snapshot": f"{log}-{int(sequence) + 1}"}
    with pinion.connect(f"lane://{server.lane}", timeout=timeout, spin_micros=400_000) as client:
        client.lookup(["items:price"], {"item": [1]})
        began = time.thread_time()
        with pytest.raises(pinion.DeadlineExceeded):
            client.lookup(["items:price"], {"item": [1]}, wait=later, wait_timeout=0.6)
        assert time.thread_time() - began > 0.1


def test_a_reply_s_size_is_noted_while_other_threads_forget_them():
    class Cleared(dict):
        """What another thread may do between any two looks."""

        def get(self, *arguments):
            found = super().get(*arguments)
            self.clear()
            return found

    sizes = Cleared({3: 640})
    note_size(sizes, 3, 600)
    assert sizes == {}


def test_lease_limits_name_the_setting_and_the_holder(store, serve):
    store.apply(LATEST, HISTORY)
    env = {"PINION__LANE__LEASED_MAX_BYTES": "60 KiB", "PINION__LANE__LEASE_TERM": "1s"}
    server = serve(env=env)
    with connect(server) as client, connect(server) as other:
        for table in ("items", "prices"):
            client.put(table, items(range(1000)))
            client.action("flush", {"table": table})
        mapped = client.map("items")
        with pytest.raises(pinion.LeasedMaxBytes, match="lane.leased_max_bytes") as refused:
            other.map("prices")
        assert refused.value.details["holder_pid"] == os.getpid()
        time.sleep(1.2)
        assert leases(server)[0]["overdue"]
        with pytest.raises(pinion.LeaseOverdue):
            client._lane._map(padded_json({"map": {"table": "items"}}))
        mapped.renew()
        assert not leases(server)[0]["overdue"]
        again = client.map("items")
        assert again.table.num_rows == 1000
        metrics = calls_metrics(server)
        assert "pinion_leases 2" in metrics and "pinion_lane_connections 2" in metrics
        assert 'pinion_requests_total{method="LaneMap",code="OK"}' in metrics
    until(lambda: "pinion_leases 0" in calls_metrics(server))


def test_whoever_maps_more_renews_what_is_overdue(store, serve):
    store.apply(LATEST, HISTORY)
    server = serve(env={"PINION__LANE__LEASE_TERM": "1s"})
    with connect(server) as client:
        client.put("items", items(range(1000)))
        client.action("flush", {"table": "items"})
        held = [client.scan("items") for _ in range(3)]
        time.sleep(1.2)
        assert [lease["overdue"] for lease in leases(server)] == [True] * 3
        held.append(client.scan("items", ["price"]))
        assert [lease["overdue"] for lease in leases(server)] == [False] * 4
        held.clear()
        assert leases(server) == []


def test_auto_reads_over_flight_what_may_not_be_mapped(store, serve):
    store.apply(LATEST, HISTORY)
    server = serve(env={"PINION__LANE__LEASED_MAX_BYTES": "60 KiB"})
    with connect(server) as client, pinion.connect(f"lane://{server.lane}") as lane_only:
        for table in ("items", "prices"):
            client.put(table, items(range(1000)))
            client.action("flush", {"table": table})
        held = client.scan("items")
        assert client.scan("prices").num_rows == client.scan_batches("prices").read_all().num_rows == 1000
        assert len(leases(server)) == 1
        for refused in (lambda: client.scan("prices", local=True), lambda: lane_only.scan("prices")):
            with pytest.raises(pinion.LeasedMaxBytes):
                refused()
        assert held.num_rows == 1000


def test_a_table_keeps_its_lease_when_the_client_is_forgotten(server, client):
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})
    table = pinion.connect(f"lane://{server.lane}").scan("items")
    gc.collect()
    [lease] = leases(server)
    connections = "pinion_lane_connections"
    assert f"{connections} 2" in calls_metrics(server)
    assert table.num_rows == 1000
    del table
    until(lambda: leases(server) == [] and f"{connections} 1" in calls_metrics(server))


@pytest.mark.parametrize("used", ["once", "after it was closed"])
def test_lookups_that_are_dropped_give_their_handles_back(server, client, used):
    client.put("items", items([1]))
    keys = pa.record_batch({"item": pa.array([1], pa.int64())})
    with pinion.connect(f"lane://{server.lane}") as other:
        for _ in range(other._lane.info["max_handles"] + 100):
            lookup = other.prepare(["items:price"])
            lookup(keys)
            if used != "once":
                # As one that a client keeps no more, while another thread uses it.
                lookup.close()
                lookup(keys)


def test_a_lookup_that_is_dropped_in_the_middle_of_a_request_gives_its_handle_back_later(client):
    lookup, other = client.prepare(["items:price"]), client.prepare(["items:name"])
    keys = pa.record_batch({"item": pa.array([1], pa.int64())})
    assert lookup(keys).num_rows == other(keys).num_rows == 1
    with client._lane._lock:
        del lookup
        assert len(client._lane._ended) == 1
    assert other(keys).num_rows == 1
    assert not client._lane._ended


def calls_metrics(server):
    import urllib.request

    with urllib.request.urlopen(f"{server.admin}/metrics") as reply:
        return reply.read().decode()


def test_the_command_line_lists_leases(server, client):
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})

    def listed(*arguments):
        command = [str(binary()), "leases", "--server", server.flight, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout

    assert json.loads(listed("--output", "json")) == []
    mapped = client.map("items")
    [lease] = json.loads(listed("--output", "json"))
    assert (lease["pid"], lease["snapshot"]) == (os.getpid(), mapped.snapshot)
    text = listed()
    assert str(os.getpid()) in text and "items" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_another_user_is_refused_by_name_unless_in_the_socket_s_group(server):
    os.chmod(server.folder, 0o711)
    os.chmod(server.lane, 0o666)

    def somebody(groups, results):
        os.setgroups(groups)
        os.setgid(61001)
        os.setuid(61001)
        try:
            pinion.connect(f"lane://{server.lane}")
            results.put(None)
        except pinion.PeerRefused as refused:
            results.put((str(refused), refused.details["uid"]))

    def connects(groups):
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        process = context.Process(target=somebody, args=(groups, results))
        process.start()
        process.join(20)
        assert process.exitcode == 0
        return results.get()

    message, uid = connects([])
    assert uid == 61001 and "61001" in message
    os.chown(server.lane, -1, 61002)
    assert connects([61003]) is not None
    assert connects([61003, 61002]) is None


def nice_values(process):
    """The nice values of a process's threads: of the lane, for streams in bulk, and the others."""
    lane, bulk, others = set(), set(), set()
    for thread in os.listdir(f"/proc/{process}/task"):
        with open(f"/proc/{process}/task/{thread}/stat") as stat:
            name, _, rest = stat.read().partition("(")[2].rpartition(")")
        kind = lane if name.startswith("pinion-lane") else bulk if name == "pinion-bulk" else others
        kind.add(int(rest.split()[16]))
    return lane, bulk, others


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
def test_threads_of_the_lane_stand_above_the_rest_of_the_server(store, serve):
    here = os.getpriority(os.PRIO_PROCESS, 0)
    store.apply(LATEST)
    server = serve(env={"PINION__LANE__PRIORITY": "5"})
    with pinion.connect(server.flight, lane=f"lane://{server.lane}") as client:
        put = client.put("items", items([1]))
        log, _, sequence = put["token"]["snapshot"].partition("-")
        later = {"table": "items", "snapshot": f"{log}-{int(sequence) + 1}"}

    def waits(_):
        with pinion.connect(f"lane://{server.lane}") as client, pytest.raises(TimeoutError):
            client.lookup(["items:price"], {"item": [1]}, wait=later, wait_timeout=0.3)

    # Each wait has the runtime make a thread, and that in one of the lane.
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(waits, range(8)))) == 8
    with pinion.connect(f"lane://{server.lane}"):
        assert nice_values(server.process.pid) == ({here - 5}, {here + 5}, {here})


def test_a_priority_that_may_not_be_had_is_refused_with_what_would_allow_it(store):
    without_the_right = ["setpriv", "--bounding-set", "-sys_nice"] if os.geteuid() == 0 else []
    refused = subprocess.run(
        [*without_the_right, binary(), "serve", "--data", store.data, "--lane", store.folder / "lane.sock"],
        env=environment({"PINION__LANE__PRIORITY": "5"}),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert refused.returncode != 0
    assert "lane.priority = 5" in refused.stderr and "CAP_SYS_NICE" in refused.stderr, refused.stderr


# -- bytes that are no frames


def test_random_bytes_and_hang_ups_leave_nothing(server, client):
    client.put("items", items(range(100)))
    client.action("flush", {"table": "items"})
    threads, descriptors = usage(server)
    generator = random.Random(3)
    hello = struct.pack("<IBBHII", 12, 1, 0, 0, 1, 0) + b"PINLANE\0" + struct.pack("<HH", 1, 1)
    mapped = b'{"map":{"table":"items"}}'
    for _ in range(300):
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(str(server.lane))
            data = bytearray(hello + struct.pack("<IBBHII", len(mapped), 5, 0, 0, 2, 0) + mapped)
            kind = generator.randrange(4)
            if kind == 0:
                data = bytearray(generator.randbytes(generator.randrange(200)))
            elif kind == 1:
                data = data[: generator.randrange(len(data))]
            elif kind == 2:
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            try:
                stream.sendall(data)
                if generator.random() < 0.5:
                    stream.shutdown(socket.SHUT_WR)
                    while stream.recv(65536):
                        pass
            except (BrokenPipeError, ConnectionResetError):
                pass
    until(lambda: leases(server) == [])
    until(lambda: usage(server) <= (threads, descriptors))
    assert client.lookup(["items:price"], {"item": [1]}).column("price").to_pylist() == [1]


@pytest.mark.parametrize("by", ["lane", "flight"])
def test_a_dropped_table_ends_its_prepared_lookups_and_one_made_again_is_read(server, by):
    urls = {"lane": {"lane": f"lane://{server.lane}"}, "flight": {"flight": server.flight}}[by]
    with pinion.connect(**urls) as client, connect(server) as operator:
        operator.put("items", items(range(5)))
        prepared = client.prepare(["items:price"])
        assert prepared.lookup({"item": [4]})["price"].to_pylist() == [4]
        assert client.lookup(["items:price"], {"item": [4]})["price"].to_pylist() == [4]
        act(server, "drop", table="items")
        act(server, "apply", definitions=[LATEST])
        operator.put("items", items([4], version=100))
        with pytest.raises(pinion.DefinitionChanged, match="items was dropped"):
            prepared.lookup({"item": [4]})
        assert client.lookup(["items:price"], {"item": [4]})["price"].to_pylist() == [104]


def test_a_reply_over_the_limit_is_refused_with_its_size(server, client):
    client.put("items", items([1]).set_column(3, "name", pa.array(["x" * 100_000])))
    with pinion.connect(flight=server.flight) as over_flight:
        names = over_flight.prepare(["items:name"])
        assert names.lookup({"item": [1] * 5}).num_rows == 5
        with pytest.raises(pinion.ResourceExhausted, match="1000 keys"):
            names.lookup({"item": [1] * 1000})
        assert names.lookup({"item": [1] * 5}).num_rows == 5
