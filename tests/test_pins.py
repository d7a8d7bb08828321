"""The Python client's pins against a test double of the server: shared host memory, no GPU.

The fears: a value read from the wrong place, a null taken for a value; a lease that ends while something still
reads, or never; a fork, a restart or a new layout after which old numbers are believed; a deleter that runs when
the interpreter has gone.
"""

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from decimal import Decimal

import numpy as np
import pinion
import pyarrow as pa
import pytest
from pinion import arrow
from pinion.leases import Releaser, Work
from support.pins import StubServer, TestPin
from support.process import REPOSITORY
from support.wait import until

ROWS = 20


def users(version=0, rows=ROWS):
    """A table of many types; some values are null."""

    def some(values, data_type, step=7):
        return pa.array([None if i % step == 3 else v for i, v in enumerate(values)], data_type)

    ids = range(rows)
    embedding = pa.list_(pa.float32(), 4)
    struct = pa.struct([pa.field("low", pa.int16()), pa.field("name", pa.string())])
    return pa.table(
        {
            "user": pa.array([i * 10 for i in ids], pa.int64()),
            "age": some([i + version for i in ids], pa.int32()),
            "score": some([i / 4 + version for i in ids], pa.float32()),
            "rank": some([-i - version for i in ids], pa.float32(), 5),
            "half": some([np.float16(i) for i in ids], pa.float16()),
            "count": pa.array([i * 3 + version for i in ids], pa.uint16()),
            "on": some([i % 2 == 0 for i in ids], pa.bool_()),
            "at": some([1_700_000_000_000_000 + i for i in ids], pa.timestamp("us", tz="UTC")),
            "price": some([Decimal(i) / 100 for i in ids], pa.decimal128(9, 2)),
            "name": some([f"user {i}" + " with a long name" * (i % 3) + f" v{version}" for i in ids], pa.string()),
            "code": some([f"c{i % 4}" for i in ids], pa.dictionary(pa.int16(), pa.string())),
            "raw": some([bytes([i]) * i for i in ids], pa.large_binary()),
            "hash": some([bytes([i]) * 16 for i in ids], pa.binary(16)),
            "tags": some([[f"t{j} of {i}, and more" for j in range(i % 4)] for i in ids], pa.list_(pa.string())),
            "seen": some([[i, None] if i % 2 else [] for i in ids], pa.large_list(pa.int32())),
            "embedding": some([[i + j / 10 for j in range(4)] for i in ids], embedding, 6),
            "pair": some([{"low": i if i % 2 else None, "name": f"n{i}"} for i in ids], struct),
        }
    )


ALL_FLOATS = ["score", "rank"]


@pytest.fixture
def stub():
    server = StubServer({"users": TestPin(users(), ["user"], slots=3)})
    yield server
    server.stop()


@pytest.fixture
def client(stub):
    with pinion.connect(stub.url) as connected:
        yield connected


@pytest.fixture
def pin(client):
    return client.pin("users")


def torch_or_skip():
    return pytest.importorskip("torch", exc_type=ImportError)


def leased(stub):
    return len(stub.leases)


def released(stub):
    return stub.wait(lambda: not stub.leases)


def in_child(code, *arguments):
    """Runs Python with the client importable; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "python")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# -- what a view holds


def test_a_pin_says_what_it_is(client, stub):
    pin = client.pin("users", ["age"], device="host", mode="fresh", max_slots=4)
    assert stub.actions == [
        ("pin", {"table": "users", "features": ["age"], "device": "host", "mode": "fresh", "max_slots": 4})
    ]
    assert (pin.table, pin.key, pin.mode, pin.row_count) == ("users", ["user"], "fresh", ROWS)
    assert pin.device["kind"] == "host"
    assert pin.schema == users().schema
    assert client.pins() == [{"pin": pin.id, "name": "users"}]


def test_every_type_reads_equal_as_arrow(pin):
    with pin.latest() as view:
        declared = view.to_arrow(declared=True)
        plain = view.to_arrow()
        declared.validate(full=True)
        plain.validate(full=True)
    assert declared.schema == users().schema
    assert declared.to_pylist() == users().to_pylist()
    assert plain.schema.field("name").type == pa.string_view()
    assert plain.schema.field("tags").type == pa.large_list_view(pa.field("item", pa.string_view()))
    assert plain.to_pylist() == users().to_pylist()


def test_maps_read_equal_as_arrow():
    rows = [[("a", 1), ("a key of more than twelve", None)], None, [], [("c", 3)]]
    table = pa.table({"id": pa.array(range(4)), "map": pa.array(rows, pa.map_(pa.string(), pa.int64()))})
    server = StubServer({"maps": TestPin(table, ["id"])})
    with pinion.connect(server.url) as client, client.pin("maps").latest() as view:
        assert view.to_arrow(declared=True).equals(table)
    server.stop()


@pytest.mark.parametrize("inner", ["list", "large_list", "map", "fixed_size_list", "struct"])
def test_rows_of_lists_that_begin_in_the_middle_are_declared_as_they_are(inner):
    """Lists that were replaced lie behind what they were before: the first of them is not the first row of the child."""
    view = pa.large_list_view(pa.string_view())
    entries = pa.struct([pa.field("key", pa.string_view(), nullable=False), pa.field("value", pa.int64())])
    values = {
        "list": ([["a"], ["b", "c"], [], None, ["d", "e", "f"]], view, pa.list_(pa.string())),
        "large_list": ([["a"], ["b", "c"], [], None, ["d", "e", "f"]], view, pa.large_list(pa.string())),
        "map": (
            [[{"key": "a", "value": 1}], [], None, [{"key": "b", "value": 2}, {"key": "c", "value": None}], []],
            pa.large_list_view(pa.field("entries", entries, nullable=False)),
            pa.map_(pa.string(), pa.int64()),
        ),
        "fixed_size_list": (
            [["a", "b"], ["c", "d"], None, ["e", None], ["g", "h"]],
            pa.list_(pa.string_view(), 2),
            pa.list_(pa.string(), 2),
        ),
        "struct": (
            [{"x": ["a"]}, {"x": ["b", "c"]}, None, {"x": []}, {"x": ["d"]}],
            pa.struct([("x", view)]),
            pa.struct([("x", pa.list_(pa.string()))]),
        ),
    }
    rows, lies_as, declared = values[inner]
    child = pa.array(rows, lies_as)
    places = pa.array([2, 1], pa.int64()), pa.array([3, 0], pa.int64())
    lists = pa.LargeListViewArray.from_arrays(*places, child)
    restored = arrow.restore(lists, pa.list_(declared))
    restored.validate(full=True)
    assert restored.to_pylist() == pa.array([rows[2:], []], pa.list_(declared)).to_pylist() != [[], []]
    if inner != "map":
        assert restored.to_pylist() == lists.to_pylist()


def test_an_empty_pin_has_all_columns_and_no_rows():
    server = StubServer({"users": TestPin(users(rows=0), ["user"])})
    with pinion.connect(server.url) as client, client.pin("users").latest() as view:
        assert view.to_arrow(declared=True).equals(users(rows=0))
        assert view.to_numpy(["score"])["score"].shape == (0,)
        assert list(view.row_ids({"user": [10]})) == [-1]
        assert view.verify()["bytes"] == 0
    server.stop()


def test_values_on_the_host_are_not_copied_and_cannot_be_written(pin):
    with pin.latest() as view:
        column = view.to_numpy(["count"])["count"]
        assert view.address <= column.ctypes.data < view.address + view.mapping.slot_bytes
        score = view.to_arrow(["score"]).column("score").chunk(0)
        assert score.buffers()[1].address == view["score"]._address
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_numpy_takes_columns_where_they_lie(pin):
    with pin.latest() as view:
        assert np.from_dlpack(view["count"]).tolist() == users().column("count").to_pylist()
        assert np.asarray(view["user"]).tolist() == users().column("user").to_pylist()
        assert view["embedding"].shape == (ROWS, 4)
        rows = users().column("embedding").to_pylist()
        read = np.asarray(view["embedding"])
        assert [None if np.isnan(row).all() else row for row in read.tolist()] == [
            row and np.float32(row).tolist() for row in rows
        ]
        assert view["hash"].to_numpy()[4].tobytes() == bytes([4]) * 16


def test_nulls_of_floats_are_nan_and_other_nulls_are_not_taken_for_values(pin):
    with pin.latest() as view:
        score = view.to_numpy(["score"])["score"]
        assert [None if np.isnan(x) else x for x in score] == users().column("score").to_pylist()
        with pytest.raises(pinion.HasNulls) as refused:
            view.to_numpy(["age"])
        assert refused.value.details == {"column": "age"}
        assert view["age"].valid.to_numpy().tolist() == users().column("age").is_valid().to_pylist()


def test_a_column_that_is_not_there_or_has_no_array_is_refused_by_name(pin):
    with pin.latest() as view:
        with pytest.raises(pinion.UnknownFeature, match="'agee'"):
            view.to_arrow(["agee"])
        for name in ("name", "tags", "price", "pair", "seen"):
            with pytest.raises(pinion.NoTensor) as refused:
                view[name]
            assert refused.value.details == {"column": name}


def test_equal_typed_columns_are_a_matrix_without_a_copy(pin):
    with pin.latest() as view:
        matrix = view.matrix(["score", "rank"])
        assert matrix.strides[0] == 4 and matrix.strides[1] % 4096 == 0
        read = np.from_dlpack(matrix)
        np.testing.assert_array_equal(read[:, 0], view["score"].to_numpy())
        np.testing.assert_array_equal(read[:, 1], view["rank"].to_numpy())
        with pytest.raises(pinion.NoTensor, match=r"their order is \['score', 'rank'\]"):
            view.matrix(["rank", "score"])
        with pytest.raises(pinion.NoTensor, match="one type"):
            view.matrix(["score", "count"])


def test_rows_are_found_by_key(pin):
    with pytest.raises(pinion.FailedPrecondition, match="within"):
        pin.rows([10])
    with pin.latest() as view:
        for keys in ({"user": [30, 5, 0]}, [30, 5, 0], np.array([30, 5, 0]), pa.array([30, 5, 0])):
            assert list(pin.rows(keys)) == [3, -1, 0]
        assert list(view.row_ids(np.array([], np.int64))) == []
        with pytest.raises(pinion.InvalidArgument):
            view.row_ids({"other": [1]})


def test_every_used_byte_is_verified(pin, stub):
    stub.publish("users", users(1))
    assert pin.verify()["number"] == 2
    stub.publish("users", users(2))
    report = pin.verify()
    assert report["number"] == 3 and report["buffers"] > 30 and report["bytes"] > 3000

    def lie(buffers):
        buffers[5]["crc32"] ^= 1

    stub.lie = lie
    with pytest.raises(pinion.DataLoss) as found:
        pin.verify()
    assert found.value.error == "CHECKSUM"
    stub.lie = lambda buffers: buffers.pop()
    with pytest.raises(pinion.ProtocolError):
        pin.verify()
    stub.lie = lambda buffers: buffers[0].update(bytes=1 << 40)
    with pytest.raises(pinion.ProtocolError):
        pin.verify()
    assert released(stub)


def test_a_byte_that_differs_is_found(pin, stub):
    double = stub.pins["users"]
    region, place = double.regions[0], double.layout.columns[0]["node"]["values"]
    # Between the server's reading and the client's.
    stub.lie = lambda _: region.map.__setitem__(place, region.map[place] ^ 1)
    with pytest.raises(pinion.DataLoss) as found:
        pin.verify()
    assert found.value.details["offset"] == place


# -- leases


def test_a_view_is_leased_until_its_block_is_left(pin, stub):
    with pin.latest() as view:
        assert leased(stub) == 1
        view.to_arrow(["count"])
    assert released(stub)
    with pytest.raises(pinion.FailedPrecondition, match="left"):
        view.to_numpy()
    with pytest.raises(pinion.FailedPrecondition, match="left"):
        view.row_ids([1])


def test_a_view_that_is_dropped_lets_its_lease_go(pin, stub):
    view = pin.latest()
    assert leased(stub) == 1
    del view
    assert released(stub)


@pytest.mark.parametrize(
    "export",
    [
        lambda view: view.to_numpy(["count"])["count"],
        lambda view: view.to_numpy(["count"])["count"][3:5],
        lambda view: np.from_dlpack(view["count"]),
        lambda view: view["count"].__dlpack__(),
        lambda view: view["count"].__dlpack__(max_version=(1, 0)),
        lambda view: view.to_arrow(["name"]).column("name"),
        lambda view: np.from_dlpack(view.matrix(ALL_FLOATS)),
    ],
)
def test_what_was_given_out_keeps_the_lease_to_its_end(pin, stub, export):
    with pin.latest() as view:
        kept = export(view)
    del view
    assert pin.close() is None
    assert not stub.wait(lambda: not stub.leases, 0.1)
    before = bytes(repr(kept), "utf-8") if isinstance(kept, np.ndarray) else None
    # Three more generations: the leased slot is left alone.
    for version in (1, 2, 3):
        assert stub.publish("users", users(version))
    assert before is None or before == bytes(repr(kept), "utf-8")
    del kept
    assert released(stub)
    assert stub.wait(lambda: not stub.mappings)


def test_each_latest_is_the_newest_generation_and_costs_one_message(pin, stub):
    for version in range(1, 6):
        stub.publish("users", users(version))
        stub.wait(lambda: not stub.leases)
        stub.requests.clear()
        with pin.latest() as view:
            assert view.generation == version + 1
            assert view.positions == {"events": {"0": version + 1}}
            assert view.to_numpy(["count"])["count"].tolist() == users(version).column("count").to_pylist()
            assert view.to_arrow(declared=True).equals(users(version))
        assert stub.requests[0] == 10 and set(stub.requests) <= {10, 4}


def test_two_views_of_one_generation_are_two_leases(pin, stub):
    with pin.latest() as one, pin.latest() as two:
        assert (one.generation, leased(stub)) == (two.generation, 2)
        assert list(pin.rows([10])) == [1]
    assert released(stub)


def test_a_reader_in_a_cycle_ends_its_lease_when_it_is_collected(pin, stub):
    class Cycle:
        pass

    cycle = Cycle()
    cycle.me = cycle
    with pin.latest() as view:
        cycle.array = view["count"].to_numpy()
    del view, cycle
    gc.collect()
    assert released(stub)


def test_leases_end_from_any_thread_and_in_the_middle_of_requests(pin, stub):
    """Arrays die while other threads hold the lane's lock: nothing may deadlock."""
    failures = []

    def reader(number):
        try:
            for _ in range(60):
                with pin.latest() as view:
                    kept = [view["count"].to_numpy() for _ in range(3)]
                assert kept[0][1] == 3
                view.info["me"] = view.info  # a cycle: collected at some later time
                if number == 0:
                    gc.collect()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    gc.collect()
    assert released(stub)


def test_a_client_that_closes_lets_what_was_given_out_live(stub):
    client = pinion.connect(stub.url)
    pin = client.pin("users")
    with pin.latest() as view:
        kept = view["count"].to_numpy()
    client.close()
    with pytest.raises(pinion.FailedPrecondition, match="closed"):
        pin.latest()
    assert leased(stub) == 1
    for version in (1, 2, 3):
        stub.publish("users", users(version))
    assert kept.tolist() == users().column("count").to_pylist()
    del view, kept
    assert released(stub) and stub.wait(lambda: not stub.mappings)
    assert stub.wait(lambda: all(c.fileno() == -1 for c in stub.connections))


def test_a_client_that_is_forgotten_leaves_no_thread_and_no_connection(stub):
    before = {thread.ident for thread in threading.enumerate()}
    client = pinion.connect(stub.url)
    pin = client.pin("users")
    with pin.latest() as view:
        view.to_numpy(["count"])
    del client, pin, view
    gc.collect()
    assert stub.wait(lambda: not stub.mappings and all(c.fileno() == -1 for c in stub.connections))
    started = [thread for thread in threading.enumerate() if thread.ident not in before]
    for thread in started:
        thread.join(5)
    assert not any(thread.name == "pinion-releases" and thread.is_alive() for thread in started)


def test_an_end_that_fails_is_kept_and_those_after_it_are_not(caplog):
    ended = threading.Event()

    class Ending(Work):
        def finish(self):
            raise pinion.DeviceError("cuMemFree_v2 failed with 700", "DEVICE")

    class Good(Work):
        def finish(self):
            ended.set()

    releaser = Releaser(None)
    for work in (Ending, Good):
        releaser.took()
        releaser.put(work(releaser, None))
    assert ended.wait(5)
    assert "cuMemFree_v2 failed with 700" in caplog.text


# -- requests that fail while something is leased


KINDS = {"latest": 138, "checksum": 140, "row_ids": 139, "pin": 137, "check": 136}
# What comes of a reply at once: nothing, half of a header, a header and some of what follows it.
PARTS = [(name, at_once) for name in KINDS for at_once in (0, 9, 20) if (name, at_once) != ("check", 20)]


def ask(name, client, pin, view):
    if name == "row_ids":
        view.row_ids([10, 20])
    elif name == "pin":
        client.pin("users")
    else:
        {"latest": pin.latest, "checksum": view.verify, "check": view.check}[name]()


def not_late(request):
    with contextlib.suppress(pinion.DeadlineExceeded):
        request()
        return True


def leased_once(stub):
    return stub.wait(lambda: len(stub.leases) == 1 and len(stub.mappings) == 1)


@contextlib.contextmanager
def held_view(stub, **options):
    """A client and an array of a view of it; the server cannot have written the array's slot when the block ends."""
    descriptors = len(os.listdir("/proc/self/fd"))
    client = pinion.connect(stub.url, **options)
    pin = client.pin("users")
    view = pin.latest()
    kept = view["count"].to_numpy()
    held = types.SimpleNamespace(client=client, pin=pin, view=view)
    yield held
    held.__dict__.clear()
    for version in range(1, 5):
        stub.publish("users", users(version))
    assert kept.tolist() == users().column("count").to_pylist()
    assert not any(c.fileno() == -1 for c in stub.connections)
    del view, kept
    assert released(stub)
    assert pin.latest().to_arrow(declared=True).equals(users(4))
    pin.close()
    client.close()
    del client, pin
    # Interruptions leave cycles of frames.
    gc.collect()
    assert stub.wait(lambda: not stub.mappings)
    until(lambda: all(c.fileno() == -1 for c in stub.connections), 5)
    until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, 5)


@pytest.mark.parametrize(("name", "at_once"), PARTS)
def test_a_reply_that_comes_too_late_ends_nothing(stub, name, at_once):
    with held_view(stub, timeout=0.2) as held:
        stub.slow = {KINDS[name]: (at_once, 0.45)}
        with pytest.raises(pinion.DeadlineExceeded):
            ask(name, **vars(held))
        stub.slow = {}
        # What the late reply gives to nobody is given back, and nobody needs to ask for that.
        assert leased_once(stub)
        until(lambda: not_late(held.view.check))
        assert len(stub.connections) == 2
        ask(name, **vars(held))
        assert leased_once(stub)


@pytest.mark.parametrize(("name", "at_once"), PARTS)
@pytest.mark.parametrize("timeout", [None, 20])
def test_a_request_that_is_interrupted_ends_nothing(stub, interrupts, name, at_once, timeout):
    with held_view(stub, timeout=timeout) as held, interrupted(after=0.1):
        stub.slow = {KINDS[name]: (at_once, 0.25)}
        with pytest.raises(KeyboardInterrupt):
            ask(name, **vars(held))
        stub.slow = {}
        assert leased_once(stub)
        held.view.check()
        assert len(stub.connections) == 2


@contextlib.contextmanager
def interrupted(after):
    """As by Ctrl-C, once, or by the end of the block."""

    def interrupt():
        time.sleep(after)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.fixture
def interrupts():
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_interruptions_at_any_moment_leave_the_connection_in_step(stub, interrupts):
    generator = random.Random(5)
    count = 0
    requests = [([10, 5, 190], [1, -1, 19]), ([0] * 3000, [0] * 3000)]
    with held_view(stub) as held:
        lease = held.view.hold().lease.id
        for _ in range(400):
            try:
                with interrupted(after=generator.uniform(1e-5, 1e-3)):
                    # Python loses an interruption that meets a finalizer.
                    for _ in range(100):
                        for keys, rows in requests:
                            batch = pa.record_batch({"user": pa.array(keys, pa.int64())})
                            found = held.view.mapping.row_ids(lease, batch)
                            assert np.frombuffer(found, np.int64).tolist() == rows
            except KeyboardInterrupt:
                count += 1
        held.view.check()
        assert count > 200 and len(stub.connections) == 2


def test_a_release_whose_reply_is_late_is_not_lost(stub):
    with held_view(stub, timeout=0.2) as held:
        stub.slow = {KINDS["checksum"]: (0, 0.5)}
        with held.pin.latest() as second, pytest.raises(pinion.DeadlineExceeded):
            second.verify()
        del second
        assert leased_once(stub)


@pytest.mark.parametrize("name", KINDS)
def test_a_reply_that_is_not_understood_ends_nothing(stub, name):
    """Later requests go over another connection, and what was leased is released on the old one."""
    client = pinion.connect(stub.url)
    pin = client.pin("users")
    view = pin.latest()
    kept = view["count"].to_numpy()
    stub.strange.add(KINDS[name])
    with pytest.raises(pinion.ProtocolError):
        ask(name, client, pin, view)
    with pytest.raises(pinion.LeaseGone, match="stays"):
        view.check()
    newer = pin.latest()
    assert newer.verify()["number"] == 1
    for version in (1, 2, 3):
        stub.publish("users", users(version))
    assert kept.tolist() == users().column("count").to_pylist()
    first = next(iter(stub.mappings))[0]
    del kept, view
    gc.collect()
    # With the mapping its connection goes too, and what was given there and not understood.
    assert stub.wait(lambda: not any(key[0] is first for book in (stub.leases, stub.mappings) for key in book))
    assert stub.wait(lambda: first.socket.fileno() == -1)
    newer.check()
    assert leased_once(stub)


# -- layouts, restarts, forks


def test_a_new_layout_is_mapped_and_the_old_one_let_go(pin, stub):
    with pin.latest() as view:
        kept = view["count"].to_numpy()
    double = stub.pins["users"]
    with stub.lock:
        double.lay_out(users().schema, 256)
        double.publish(users(7, rows=200))
    with pin.latest() as view:
        assert len(view) == 200
        assert view.to_arrow(declared=True).equals(users(7, rows=200))
    assert kept.tolist() == users().column("count").to_pylist()
    assert len(stub.mappings) == 2
    del view, kept
    assert stub.wait(lambda: len(stub.mappings) == 1)


def test_an_unpinned_pin_is_said_to_be_gone_and_its_views_stay(client, pin, stub):
    with pin.latest() as view:
        client.action("unpin", {"pin": pin.id})
        assert view.to_arrow(declared=True).equals(users())
    with pytest.raises(pinion.UnknownPin):
        pin.latest()


def test_unpin_takes_a_pin_or_a_name(client, stub):
    pin = client.pin("users")
    client.unpin(pin)
    assert stub.pins == {}
    assert stub.wait(lambda: not stub.mappings)
    with pytest.raises(pinion.UnknownPin):
        client.unpin("users")


def test_after_a_restart_old_numbers_are_not_believed(pin, stub):
    with pin.latest() as view:
        kept = view["count"].to_numpy()
        stub.restart({"users": TestPin(users(9), ["user"], slots=3)})
        with pytest.raises(pinion.LeaseGone):
            view.check()
    # The memory is still ours, and nobody writes it.
    assert kept.tolist() == users().column("count").to_pylist()
    with pin.latest() as view:
        view.check()
        assert view.to_arrow(declared=True).equals(users(9))
    assert [name for name, _ in stub.actions] == ["pin", "pin"]
    # The old lease ends beside a new one that has its number.
    with pin.latest() as newer:
        assert newer._hold.lease.id == kept.base.export.hold.lease.id + 1
        del view, kept
        assert not stub.wait(lambda: not stub.leases, 0.1)
        newer.verify()


def test_a_connection_that_broke_is_made_anew_for_the_same_pin(pin, stub):
    with pin.latest():
        pass
    stub.hang_up()
    with pin.latest() as view:
        assert view.to_arrow(declared=True).equals(users())
    assert [name for name, _ in stub.actions] == ["pin"]


def test_a_forked_child_is_told_and_the_parents_lease_is_not_touched(client, pin, stub):
    with pin.latest() as view:
        kept = view["count"].to_numpy()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for use in (pin.latest, view.to_arrow, lambda: pin.id):
                    try:
                        use()
                    except pinion.Forked:
                        code = 0
                    else:
                        os._exit(2)
                # A pin of its own, on the host.
                with client.pin("users").latest() as own:
                    if own.to_arrow(declared=True) != users():
                        code = 3
                del view, kept, pin
                gc.collect()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        # The child's own lease went with it; the parent's is there.
        assert stub.wait(lambda: len(stub.leases) == 1)
        assert kept.tolist() == users().column("count").to_pylist()
    del view, kept
    assert released(stub)


def test_a_slot_whose_place_is_not_in_it_is_refused(stub):
    double = stub.pins["users"]
    column = next(c for c in double.layout.columns if c["name"] == "count")
    column["node"]["values"] = double.layout.slot_bytes - 4
    with pinion.connect(stub.url) as client, client.pin("users").latest() as view:
        for read in (lambda: view["count"], lambda: view.to_arrow(["count"])):
            with pytest.raises(pinion.ProtocolError, match="of a slot of"):
                read()


def test_views_outside_the_heap_are_refused(pin, stub):
    double = stub.pins["users"]
    views = next(c for c in double.layout.columns if c["name"] == "name")["node"]["views"]
    # Row 1's offset, far behind the heap.
    double.regions[0].map[views + 16 + 12 : views + 32] = (1 << 29).to_bytes(4, "little")
    with pin.latest() as view, pytest.raises(pinion.ProtocolError, match="heap"):
        view.to_arrow(["name"])


# -- the end of the interpreter


def test_tensors_may_outlive_the_interpreter(stub):
    """Capsules, arrays and an unfinished view at exit: no deleter runs Python, nothing is printed, nothing hangs."""
    said = in_child(
        """
        import sys, builtins
        import numpy as np, pinion
        client = pinion.connect(sys.argv[1])
        pin = client.pin("users")
        view = pin.latest().__enter__()
        builtins.kept = [np.from_dlpack(view["count"]), view["count"].__dlpack__(), view.to_arrow(["name"]), view]
        builtins.kept.append(builtins.kept)
        print(builtins.kept[0][:3].tolist())
        """,
        stub.url,
    )
    assert said == "[0, 3, 6]\n"
    assert stub.wait(lambda: not stub.leases and not stub.mappings)


def test_a_killed_client_leaves_nothing(stub):
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pinion; v = pinion.connect(sys.argv[1]).pin('users').latest();"
            " print(1, flush=True); time.sleep(60)",
            stub.url,
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "python")},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"1\n" and leased(stub) == 1
    process.kill()
    process.wait()
    process.stdout.close()
    assert stub.wait(lambda: not stub.leases and not stub.mappings)


def test_a_device_that_is_not_here_is_refused_and_nothing_stays_mapped(stub):
    stub.pins["users"].device = {"kind": "cuda", "uuid": "GPU-00000000-0000-0000-0000-000000000000", "ordinal": 0}
    with pinion.connect(stub.url) as client:
        with pytest.raises(pinion.DeviceUnavailable) as refused:
            client.pin("users")
        assert refused.value.error in ("NO_DRIVER", "OTHER_DEVICE") or refused.value.error == "DEVICE"
        assert stub.wait(lambda: not stub.mappings)
