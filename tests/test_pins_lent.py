"""Pins that are lent: the table's own files instead of a copy of them.

The fears: a copy that calls itself none; a row that is not in the snapshot, or is another's by its number; a value under
a null, in another batch or another file; a file that is gone while somebody has it mapped, or stays when nobody has; a
table that is not clean and is lent all the same.
"""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pinion
import pyarrow as pa
import pytest
from pinion.segments import Files
from support.wait import until
from test_lane import HISTORY, LATEST, WIDER, calls_metrics, connect, items, leases, python_environment, usage
from test_pins_server import (
    HEADER,
    HOLD,
    ROOM,
    Raw,
    assert_equal_to_flight,
    comparable,
    devices,
    held,
    listed,
    pins,
    run,
)  # fmt: skip
from test_segments import MIXED, rows

ROWS = 3000


@pytest.fixture
def server(store, serve):
    store.apply(LATEST)
    return serve(env=ROOM)


@pytest.fixture
def client(server):
    with connect(server) as both:
        yield both


@pytest.fixture
def clean(client):
    """A table of two segments, as a load or a flush leaves it."""
    for part in (range(ROWS // 2), range(ROWS // 2, ROWS)):
        client.put("items", items(part))
        client.action("flush", {"table": "items"})
    return client


def lend(client, table="items", *arguments, **options):
    return client.pin(table, *arguments, device="host", mode="frozen", layout="segments", **options)


def copy(client, table="items", *arguments, **options):
    return client.pin(table, *arguments, device="host", mode="frozen", layout="columns", name="copy", **options)


def arrow_files(server):
    """Inode and length of the segments' Arrow files that have a name."""
    found = server.data.rglob("*.arrow")
    return {(status.st_ino, status.st_size) for status in (path.stat() for path in found)}


def mapped_inodes(pid="self"):
    """Inodes that a process has mapped, of files that end with .arrow, with a name or not."""
    with open(f"/proc/{pid}/maps") as maps:
        lines = [line.split(None, 5) for line in maps]
    return {int(fields[4]) for fields in lines if len(fields) == 6 and ".arrow" in fields[5]}


def memory(server):
    """Bytes of a server's own memory: private, and shared without a file."""
    with open(f"/proc/{server.process.pid}/status") as status:
        sizes = dict(line.split(":", 1) for line in status if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(size.split()[0]) * 1024 for size in sizes.values())


# -- nothing is copied


def test_what_is_lent_are_the_segments_themselves(server, clean):
    pin = lend(clean)
    assert pin.form == "segments" and pin.mode == "frozen" and pin.row_count == ROWS
    files = arrow_files(server)
    assert len(files) == 2
    with Raw(server) as lane:
        lane.socket.sendall(frame(9, {"pin": {"pin": "items"}}))
        pinned, descriptors = receive_with_files(lane.socket)
        try:
            status = [os.fstat(number) for number in descriptors]
            assert {(file.st_ino, file.st_size) for file in status} == files
            parts = pinned["layout"]["parts"]
            assert [part["bytes"] for part in parts] == [file.st_size for file in status]
            assert [part["descriptor"] for part in parts] == [0, 1]
            assert sum(part["rows"] for part in parts) == ROWS and all(part["dirty"] == 0 for part in parts)
            assert pinned["mapping"]["bytes"] == sum(file.st_size for file in status)
            for number in descriptors:
                with pytest.raises(OSError):
                    os.write(number, b"x")
        finally:
            for number in descriptors:
                os.close(number)
    # The client maps these files, and its table lies in them.
    assert {inode for inode, _ in files} <= mapped_inodes()
    [told] = pins(server)
    assert told["form"] == "segments" and told["form_reason"] == "lent: 0 bytes copied"
    assert told["device_bytes"] == 0 and told["load"]["bytes"] == 0 and told["host_bytes"] == 0
    assert told["files"] == {"files": 2, "bytes": sum(size for _, size in files), "stale_bytes": 0}
    assert devices(server)[0]["used_bytes"] == 0


def frame(kind, body):
    payload = json.dumps(body).encode()
    return HEADER.pack(len(payload), kind, 0, 0, 1, 0) + payload


def receive_with_files(connection):
    """PINNED's JSON and its descriptors."""
    header, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 253)
    size, kind, _, _, _, detail = HEADER.unpack(header)
    assert kind == 137
    data = b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    return json.loads(data[:detail]), descriptors


def test_the_server_s_memory_does_not_grow_by_a_table_that_is_lent(store, serve):
    store.apply(LATEST.replace('name = "string"', "\n".join(f'f{i} = "float64"' for i in range(16))))
    server = serve(env=ROOM)
    count = 400_000
    with connect(server) as client:
        schema = client.scan("items", local=False).schema
        for start in range(0, count, 100_000):
            ids = np.arange(start, start + 100_000)
            columns = {"item": pa.array(ids), "at": pa.array(np.full(len(ids), 10**15), pa.timestamp("us", tz="UTC"))}
            columns |= {"price": pa.array(ids, pa.int32()), "code": pa.array(["c"] * len(ids))}
            columns |= {f"f{i}": pa.array(ids + i / 16) for i in range(16)}
            table = pa.table({name: columns[name] for name in schema.names})
            client.put("items", table)
        client.action("merge", {"table": "items"})
        table_bytes = count * 16 * 8
        keys = np.random.default_rng(1).integers(0, count, 50_000)

        def grown(pin):
            before = memory(server)
            with pin(client).latest() as view:
                found = view.row_ids(keys)
                taken = view.take(found, ["f3"])
                assert np.asarray(taken["f3"]).tolist() == (keys + 3 / 16).tolist()
                view.verify()
            return memory(server) - before

        # The log's rows go some time after the merge; then nothing else moves.
        until(lambda: memory(server) == (time.sleep(0.5) or memory(server)), seconds=30)
        assert grown(lend) < table_bytes / 8
        assert grown(copy) > table_bytes * 0.9


# -- the same rows


def test_every_type_of_a_lent_pin_equals_the_flight_scan_and_the_copy(store, serve):
    store.apply(MIXED)
    server = serve(env=ROOM)
    with connect(server) as client:
        schema = client.scan("mixed", local=False).schema
        for seed, ids in ((1, range(2000)), (2, range(2000, 3000))):
            client.put("mixed", pa.Table.from_pylist(rows(seed, ids, 10**15), schema=schema))
            client.action("flush", {"table": "mixed"})
        lent, copied = lend(client, "mixed"), copy(client, "mixed")
        with lent.latest() as view, copied.latest() as other:
            assert view.rows == other.rows == 3000 and lent.key == ["id", "kind"]
            assert view.snapshot == other.snapshot and view.positions == other.positions
            assert_equal_to_flight(client, view, "mixed")
            assert_equal_to_flight(client, other, "mixed")
            assert lent.schema == copied.schema
            assert_same_arrays(view, other)
            assert view.verify()["bytes"] == sum(part["bytes"] for part in lent._mapped().layout["parts"])
        assert lent.verify()["number"] == 1


def arrays(view, **options):
    """What has a tensor, nulls as the view gives them."""
    names = [name for name in view.columns if pinion.columns.has_tensor(view._field(name).type)]
    found = {}
    for name in names:
        try:
            found[name] = view.take(np.arange(view.rows), [name], mask=True, **options)
        except pinion.HasNulls as refused:
            found[name] = refused.message.partition(":")[0]
    return found


def assert_same_arrays(view, other):
    """Equal values at equal keys, in every way in which they are read."""
    key = {name: other.to_arrow([name], declared=True)[name].combine_chunks() for name in other.mapping.info["key"]}
    # From a row of the one to the row of the other.
    order = np.asarray(view.row_ids(pa.record_batch(key)))
    assert sorted(order.tolist()) == list(range(view.rows))
    back = {name: view.to_arrow([name], declared=True)[name].combine_chunks() for name in key}
    assert np.asarray(other.row_ids(pa.record_batch(back)))[order].tolist() == list(range(view.rows))
    ours, theirs = arrays(view), arrays(other)
    assert list(ours) == list(theirs) and len(ours) > 5
    for name, (values, masks) in ((n, v) for n, v in ours.items() if not isinstance(v, str)):
        wanted, wanted_masks = theirs[name]
        assert np.asarray(values[name]).dtype == np.asarray(wanted[name]).dtype
        np.testing.assert_array_equal(np.asarray(values[name])[order], np.asarray(wanted[name]), name)
        np.testing.assert_array_equal(np.asarray(masks[name])[order], np.asarray(wanted_masks[name]), name)
        # The whole column, as one array.
        if view[name].valid is None or view[name].is_float:
            np.testing.assert_array_equal(view[name].to_numpy()[order], other[name].to_numpy(), name)
            np.testing.assert_array_equal(np.from_dlpack(view[name])[order], other[name].to_numpy(), name)
    refused = {name: words for name, words in ours.items() if isinstance(words, str)}
    assert refused == {name: words for name, words in theirs.items() if isinstance(words, str)}


def test_a_matrix_and_its_masks_are_those_of_the_copy(store, serve):
    floats = LATEST.replace('price = "int32"', "\n".join(f'f{i} = "float32"' for i in range(6)))
    store.apply(floats)
    server = serve(env=ROOM)
    with connect(server) as client:
        schema = client.scan("items", local=False).schema
        for part in (range(700), range(700, 1000)):
            table = [
                {"item": i, "at": 10**15, "name": "x", "code": "y"}
                | {f"f{k}": None if (i + k) % 9 == 0 else i + k / 8 for k in range(6)}
                for i in part
            ]
            client.put("items", pa.Table.from_pylist(table, schema=schema))
            client.action("flush", {"table": "items"})
        features = ["f1", "f4", "f2", "item"]
        lent, copied = lend(client, "items", features), copy(client, "items", features)
        assert lent.schema.names == features
        with lent.latest() as view, copied.latest() as other:
            assert sorted(view.matrix_columns()) == sorted(other.matrix_columns())
            names = other.matrix_columns()
            keys = np.concatenate([np.random.default_rng(2).permutation(1000), [5000, -3]])
            ours, theirs = view.row_ids(keys), other.row_ids(keys)
            values, masks = view.take(ours, names, matrix=True, mask=True)
            wanted, wanted_masks = other.take(theirs, names, matrix=True, mask=True)
            np.testing.assert_array_equal(np.asarray(values), np.asarray(wanted))
            np.testing.assert_array_equal(np.asarray(masks), np.asarray(wanted_masks))
            assert not np.asarray(masks)[-2:].any() and np.isnan(np.asarray(values)[-2:]).all()
            # Into what the caller has, and as a whole.
            out = np.zeros((len(keys), len(names)), np.float32)
            view.take(ours, names, matrix=True, out=out)
            np.testing.assert_array_equal(out, np.asarray(wanted))
            whole = view.matrix(names).to_numpy()
            assert whole.shape == (1000, 3) and whole.strides[0] == 4
            found = np.asarray(ours)[:1000]
            np.testing.assert_array_equal(whole[found], np.asarray(wanted)[:1000])
            with pytest.raises(pinion.NoTensor):
                view.matrix(["f1", "item"])


def test_row_numbers_are_places_among_the_rows(server, clean):
    generator = random.Random(8)
    with lend(clean).latest() as view:
        column = view.to_arrow(["item"])["item"].to_pylist()
        keys = [generator.randrange(-50, ROWS + 50) for _ in range(5000)]
        place = {item: row for row, item in enumerate(column)}
        assert np.asarray(view.row_ids(pa.array(keys))).tolist() == [place.get(key, -1) for key in keys]
        assert np.asarray(view.row_ids({"item": pa.array([7, 7, 9000], pa.int16())})).tolist() == [place[7], place[7], -1]
        for wrong in ({"item": ["a"]}, {"other": [1]}):
            with pytest.raises(pinion.InvalidArgument) as refused:
                view.row_ids(wrong)
            assert refused.value.error == "KEYS"


def test_an_empty_table_is_lent_and_has_no_rows(client):
    pin = lend(client)
    with pin.latest() as view:
        assert view.rows == 0 and view.to_arrow(declared=True).num_rows == 0
        assert view.to_arrow(declared=True).schema.names == ["item", "at", "price", "name", "code"]
        assert np.asarray(view.row_ids([1, 2])).tolist() == [-1, -1]
        values, masks = view.take([-1, 0], ["price"], mask=True)
        assert np.asarray(values["price"]).tolist() == [0, 0] and not np.asarray(masks["price"]).any()
        assert view["price"].to_numpy().shape == (0,)
        assert view.verify()["bytes"] == 0


def test_a_column_in_one_batch_without_nulls_is_given_out_where_it_lies(server, client):
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})
    pin = lend(client)
    files = pin._mapped().files
    start, size = files._addresses[0], len(files._maps[0])
    with pin.latest() as view:
        lies = lambda array: start <= array.ctypes.data < start + size
        assert lies(view["item"].to_numpy()) and lies(view.to_numpy(["item"])["item"])
        assert lies(np.from_dlpack(view["item"]))
        # Nulls read as 0, which the file need not have there.
        masked = view["price"]
        assert not lies(masked.to_numpy()) and masked.to_numpy() is not None
        with pytest.raises(pinion.HasNulls):
            view.to_numpy(["price"])
        for chunk in view.to_arrow()["name"].chunks:
            assert all(start <= buffer.address < start + size for buffer in chunk.buffers() if buffer is not None)
        with pytest.raises((ValueError, TypeError)):
            view["item"].to_numpy()[0] = 1
    with pytest.raises(pinion.FailedPrecondition):
        view["item"].to_numpy()


def ipc_file(path, batches):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def test_columns_of_every_form_are_read_over_batches_and_files(tmp_path):
    """Against plain lists: fixed sizes of bools and bytes, nulls at every depth, batches of any length."""
    generator = random.Random(12)
    nulls = 0.2

    def maybe(value):
        return None if generator.random() < nulls else value

    def pair(value):
        return maybe([maybe(value()) for _ in range(2)])

    types = {
        "plain": pa.int64(),
        "half": pa.float16(),
        "bits": pa.bool_(),
        "hash": pa.binary(5),
        "pairs": pa.list_(pa.float32(), 2),
        "flags": pa.list_(pa.bool_(), 2),
        "deep": pa.list_(pa.list_(pa.float64(), 3), 2),
        "day": pa.date32(),
        "hidden": pa.list_(pa.int32(), 2),
    }
    fields = [pa.field(name, type, nullable=name != "plain") for name, type in types.items()]
    schema = pa.schema(fields)

    def some(count):
        lists = {
            "plain": [generator.randrange(10**9) for _ in range(count)],
            "half": [maybe(generator.randrange(100) / 4) for _ in range(count)],
            "bits": [maybe(generator.random() < 0.5) for _ in range(count)],
            "hash": [maybe(generator.randbytes(5)) for _ in range(count)],
            "pairs": [pair(lambda: generator.randrange(99)) for _ in range(count)],
            "flags": [pair(lambda: generator.random() < 0.5) for _ in range(count)],
            "deep": [maybe([maybe([maybe(1.5) for _ in range(3)]) for _ in range(2)]) for _ in range(count)],
            "day": [maybe(generator.randrange(20_000)) for _ in range(count)],
        }
        arrays = {name: pa.array(given, types[name]) for name, given in lists.items()}
        # Values that lie under a null list, and are no nulls themselves.
        hidden = pa.array([maybe(0) is None for _ in range(count)])
        items = pa.array([maybe(n + 1) for n in range(2 * count)], pa.int32())
        arrays["hidden"] = pa.FixedSizeListArray.from_arrays(items, type=types["hidden"], mask=hidden)
        return pa.record_batch([arrays[name] for name in types], schema=schema)

    batches = [[some(n) for n in lengths] for lengths in ([64, 1, 300, 7], [13], [256, 256])]
    nulls = 0
    batches[2].insert(1, some(100))
    paths = [tmp_path / f"{number}.arrow" for number in range(3)]
    for path, of_file in zip(paths, batches):
        ipc_file(path, of_file)
    ended = []
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    parts = [
        {"kind": "mapped", "descriptor": n, "bytes": path.stat().st_size, "rows": sum(map(len, of)), "dirty": 0}
        for n, (path, of) in enumerate(zip(paths, batches))
    ]
    files = Files(descriptors, parts, schema, lambda: ended.append(1))
    for number in descriptors:
        os.close(number)
    table = pa.Table.from_batches([batch for of_file in batches for batch in of_file])
    assert files.table.equals(table) and files.rows == table.num_rows

    def value(expected, shape, fill):
        if not shape:
            return fill if expected is None else expected
        below = [None] * shape[0] if expected is None else expected
        return [value(item, shape[1:], fill) for item in below]

    for name, type in types.items():
        source = files.column(name)
        fill = math.nan if source.typestr[1] == "f" else 0
        given = table[name].to_pylist()
        if name == "hash":
            given = [None if v is None else list(v) for v in given]
        if name == "day":
            given = table[name].cast(pa.int32()).to_pylist()
        expected = np.array([value(v, source.shape, fill) for v in given], source.typestr)
        valid = [v is not None for v in given]
        np.testing.assert_array_equal(source.joined(), expected, name)
        assert source.valid().tolist() == valid
        assert source.has_nulls == (not all(valid))
        for some_rows in (
            np.array([generator.randrange(-5, files.rows + 5) for _ in range(500)]),
            np.arange(70, 300), np.array([files.rows - 1]), np.array([], np.int64),
        ):  # fmt: skip
            place = files.locate(some_rows)
            present = ~place.missing
            assert present.tolist() == [0 <= row < files.rows for row in some_rows]
            out = np.empty((len(some_rows), *source.shape), source.typestr)
            mask = np.empty(len(some_rows), np.bool_)
            source.take_into(place, out)
            source.take_valid_into(place, mask)
            np.testing.assert_array_equal(out[present], expected[some_rows[present]], name)
            assert mask[present].tolist() == [valid[row] for row in some_rows[present]]
    # The mapping ends with the last thing that lies in it.
    kept = files.column("plain")._chunk(0)
    before = kept.tolist()
    del files, source
    assert not ended and kept.tolist() == before
    del kept
    assert ended == [1]


def test_a_server_that_lends_other_files_than_it_says_is_not_believed(tmp_path):
    path = tmp_path / "a.arrow"
    batch = pa.record_batch({"x": pa.array([1, 2, 3])})
    ipc_file(path, [batch])
    size, ended = path.stat().st_size, []
    good = {"kind": "mapped", "descriptor": 0, "bytes": size, "rows": 3, "dirty": 0}
    with open(path, "rb") as file:
        for wrong in ({"rows": 4}, {"dirty": 1}, {"descriptor": 1}, {"kind": "sent"}):
            with pytest.raises(pinion.ProtocolError):
                Files([file.fileno()], [good | wrong], batch.schema, lambda: ended.append(1))
        assert len(ended) == 4


# -- what is not clean


def test_rows_in_the_log_and_replaced_rows_are_refused_or_copied_and_say_so(server, clean):
    clean.put("items", items(range(ROWS, ROWS + 12)))
    with pytest.raises(pinion.FailedPrecondition) as refused:
        lend(clean)
    assert refused.value.error == "PIN_NOT_CLEAN"
    assert refused.value.details["cause"] == "log" and refused.value.details["rows"] == 12
    assert "12 rows in the log" in refused.value.message and "pinion flush items" in refused.value.message
    clean.put("items", items(range(ROWS // 2 - 500, ROWS // 2 + 734), 1))
    with pytest.raises(pinion.FailedPrecondition) as refused:
        lend(clean)
    assert refused.value.details["cause"] == "superseded" and refused.value.details["rows"] == 1234
    assert "1234 superseded rows in 2 segments" in refused.value.message and "pinion merge items" in refused.value.message
    assert pins(server) == []

    pin = clean.pin("items", device="host", mode="frozen")
    assert pin.form == "columns"
    [told] = pins(server)
    assert told["form_reason"] == "copied: 1234 superseded rows in 2 segments"
    assert told["files"] is None and told["device_bytes"] > 0
    with pin.latest() as view:
        assert_equal_to_flight(clean, view, "items")
    assert "copied: 1234 superseded rows in 2 segments" in server.log_text()
    clean.unpin(pin)

    clean.action("merge", {"table": "items"})
    pin = clean.pin("items", device="host", mode="frozen")
    assert pin.form == "segments"
    with pin.latest() as view:
        assert view.rows == ROWS + 12
        assert_equal_to_flight(clean, view, "items")
    assert "lent: 0 bytes copied" in server.log_text()


def test_what_no_table_could_make_possible_is_refused(server, clean):
    for body, error, words in (
        ({"mode": "fresh", "layout": "segments"}, "PIN_REQUEST", "a fresh pin changes"),
        ({"mode": "frozen", "layout": "segment"}, "ACTION_BODY", "segment"),
    ):
        with pytest.raises(pinion.InvalidArgument) as refused:
            clean.action("pin", {"table": "items", "device": "host", **body})
        assert refused.value.error == error and words in refused.value.message
    fresh = clean.action("pin", {"table": "items", "name": "fresh"})
    assert fresh["form"] == "columns" and fresh["form_reason"] == "copied: a fresh pin changes, files do not"
    pin = lend(clean)
    assert clean.pin("items", device="host", mode="frozen").id == pin.id
    with pytest.raises(pinion.FailedPrecondition) as refused:
        clean.pin("items", device="host", mode="frozen", layout="columns")
    assert refused.value.error == "PIN_DIFFERS" and refused.value.details["differs"] == ["layout"]


def test_columns_that_came_later_are_copied_and_the_others_lent(server, clean):
    clean.action("apply", {"definitions": [WIDER]})
    with pytest.raises(pinion.FailedPrecondition) as refused:
        lend(clean)
    assert refused.value.details["cause"] == "definition" and '"rating"' in refused.value.message
    pin = lend(clean, "items", ["name", "item"])
    with pin.latest() as view:
        assert view.columns == ["name", "item"]
        assert_equal_to_flight(clean, view, "items")
        column = view.to_arrow(["item"])["item"].to_pylist()
        assert np.asarray(view.row_ids([5, ROWS])).tolist() == [column.index(5), -1]


def test_a_history_table_is_lent_while_each_key_has_one_version(store, serve):
    store.apply(HISTORY)
    with connect(serve(env=ROOM)) as client:
        client.put("prices", items(range(500)))
        client.action("flush", {"table": "prices"})
        with lend(client, "prices").latest() as view:
            assert_equal_to_flight(client, view, "prices")
        client.unpin("prices")
        client.put("prices", items(range(20), 1))
        client.action("merge", {"table": "prices"})
        with pytest.raises(pinion.FailedPrecondition) as refused:
            lend(client, "prices")
        assert refused.value.details["cause"] == "versions" and refused.value.details["rows"] == 20
        assert client.pin("prices", device="host", mode="frozen").row_count == 500


# -- who holds what


def test_a_lent_pin_stays_as_it_was_while_its_table_is_written_and_merged(server, clean):
    pin = lend(clean)
    with pin.latest() as view:
        before = view.to_arrow(declared=True)
        plain = comparable(before)
        numbers = np.asarray(view.row_ids(np.arange(ROWS))).tolist()
    stop = threading.Event()

    def write():
        with connect(server) as writer:
            version = 0
            while not stop.is_set():
                version += 1
                writer.put("items", items(range(0, 2 * ROWS, 3), version))
                writer.delete("items", {"item": pa.array([version], pa.int64())})
                writer.action("merge" if version % 2 else "flush", {"table": "items"})

    thread = threading.Thread(target=write)
    thread.start()
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with pin.latest() as view:
                assert view.generation == 1 and view.rows == ROWS
                assert np.asarray(view.row_ids(np.arange(ROWS))).tolist() == numbers
                taken = view.take(numbers, ["item"])["item"]
                assert np.asarray(taken).tolist() == list(range(ROWS))
                view.verify()
    finally:
        stop.set()
        thread.join()
    [told] = pins(server)
    assert told["files"]["stale_bytes"] > told["files"]["bytes"]
    assert comparable(before) == plain
    # Its files have no name any more, and can be had all the same.
    with connect(server) as other:
        again = lend(other)
        with again.latest() as view:
            assert comparable(view.to_arrow(declared=True)) == plain
    metrics = calls_metrics(server)
    assert f'pinion_pin_stale_file_bytes{{pin="items",table="items"}} {told["files"]["stale_bytes"]}' in metrics


def server_maps_deleted(server):
    """Whether a server maps or holds open a segment's file that has no name any more."""
    with open(f"/proc/{server.process.pid}/maps") as maps:
        if any(".arrow (deleted)" in line for line in maps):
            return True
    folder = f"/proc/{server.process.pid}/fd"
    for number in os.listdir(folder):
        try:
            if ".arrow (deleted)" in os.readlink(f"{folder}/{number}"):
                return True
        except FileNotFoundError:
            pass
    return False


def test_an_unpinned_pin_s_files_stay_until_its_last_mapping_is_gone(server, clean):
    files = {inode for inode, _ in arrow_files(server)}
    pin = lend(clean)
    view = pin.latest()
    table = view.to_arrow(declared=True)
    before = comparable(table)
    clean.put("items", items(range(ROWS), 5))
    clean.action("merge", {"table": "items"})
    clean.action("unpin", {"pin": pin.id})
    [told] = pins(server)
    assert told["retired"] == "unpinned" and [note["pid"] for note in told["mappings"]] == [os.getpid()]
    assert np.asarray(view.row_ids([0, 1])).tolist() == [0, 1]
    assert view.verify()["number"] == 1
    with pytest.raises(pinion.UnknownPin):
        pin.latest()
    view.close()
    pin.close()
    # The table that was given out holds the mapping, and with it the pin.
    del view, pin
    time.sleep(0.3)
    assert held(server) == [[], [os.getpid()]] and server_maps_deleted(server) and files <= mapped_inodes()
    assert comparable(table) == before
    del table
    until(lambda: pins(server) == [], seconds=5)
    until(lambda: not files & mapped_inodes() and not server_maps_deleted(server), seconds=5)


@pytest.mark.parametrize("workers", [0, 4])
def test_a_consumer_that_is_killed_holds_nothing_a_second_later(server, clean, workers):
    clean.action("pin", {"table": "items", "mode": "frozen", "layout": "segments"})
    threads, descriptors = usage(server)
    script = HOLD.replace("c.pin('items').latest()", "c.pin('items', mode='frozen', layout='segments').latest()")
    assert script != HOLD
    command = [sys.executable, "-c", script, str(server.lane), str(workers)]
    consumer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=python_environment())
    children = [int(n) for n in consumer.stdout.readline().split()]
    try:
        assert len(children) == workers
        assert held(server) == [[consumer.pid], [consumer.pid]]
        assert [(lease["pid"], lease["pin"]) for lease in leases(server)] == [(consumer.pid, "items")]
        consumer.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: held(server) == [[], []] and leases(server) == [], seconds=1, every=0.01)
        assert time.monotonic() - killed < 1
        consumer.wait()
        until(lambda: usage(server) <= (threads, descriptors))
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_files_stay_readable_when_the_server_is_killed_and_a_new_one_is_found(server):
    client = pinion.connect(f"grpc+unix://{server.uds}", lane=f"lane://{server.lane}")
    client.put("items", items(range(1000)))
    client.action("flush", {"table": "items"})
    pin = client.pin("items", device="host", mode="frozen")
    first = pin.id
    with pin.latest() as view:
        table = view.to_arrow(["item", "name"])
        before = table.to_pylist()
        server.kill()
        assert table.to_pylist() == before
        assert np.asarray(view.take([3], ["item"])["item"]).tolist() == [before[3]["item"]]
        server.start()
        with pytest.raises(pinion.LeaseGone):
            view.check()
    with pin.latest() as view:
        assert pin.id != first and pin.form == "segments"
        assert_equal_to_flight(client, view, "items")
    assert table.to_pylist() == before
    client.put("items", items(range(500), 1))
    with pin.latest() as view:
        assert view.rows == 1000
    until(lambda: held(server) == [[], [os.getpid()]])
    client.close()


def test_merged_away_files_of_lent_pins_are_bounded_and_none_that_is_held_goes(store, serve):
    store.apply(LATEST)
    server = serve(env={**ROOM, "PINION__GDS__STALE_MAX_BYTES": "1 KiB"})
    with connect(server) as client:
        client.put("items", items(range(ROWS)))
        client.action("flush", {"table": "items"})
        body = {"table": "items", "mode": "frozen", "device": "host", "layout": "segments"}
        client.action("pin", {**body, "name": "unheld"})
        mine = lend(client, name="held")
        view = mine.latest()
        time.sleep(1.2)
        assert {pin["name"] for pin in pins(server)} == {"unheld", "held"}
        client.put("items", items(range(ROWS), 1))
        client.action("merge", {"table": "items"})
        until(lambda: {pin["name"] for pin in pins(server)} == {"held"}, seconds=10)
        time.sleep(1.2)
        view.verify()
        assert pins(server)[0]["retired"] is None and devices(server)[0]["evictions"] == 1
        view.close()
        mine.close()
        del view, mine
        until(lambda: pins(server) == [] and not server_maps_deleted(server), seconds=10)


def test_what_clients_map_counts_among_the_leases_of_files_and_once(store, serve):
    store.apply(LATEST)
    server = serve(env={**ROOM, "PINION__LANE__LEASED_MAX_BYTES": "200 KiB"})
    with connect(server) as client:
        client.put("items", items(range(ROWS)))
        client.action("flush", {"table": "items"})
        pin = lend(client)
        files = pins(server)[0]["files"]["bytes"]
        assert 100 << 10 < files < 200 << 10, files
        listing = client.action("leases")
        assert listing["bytes"] == files and listing["leases"][0]["pin"] == "items"
        assert listing["leases"][0]["overdue"] is False
        # The same file by MAP: counted once.
        mapped = client.map("items")
        assert client.action("leases")["bytes"] == files
        shown = run(server, "leases")
        assert shown.returncode == 0 and "pin items" in shown.stdout
        client.put("items", items(range(ROWS), 1))
        client.action("merge", {"table": "items"})
        with pytest.raises(pinion.ResourceExhausted) as refused:
            lend(client, name="second")
        assert refused.value.error == "LEASED_MAX_BYTES" and refused.value.details["holder_pid"] == os.getpid()
        del mapped
        pin.close()
        del pin
        until(lambda: leases(server) == [])
        assert lend(client, name="second").row_count == ROWS


# -- the command line


def test_the_command_line_asks_for_a_layout_and_says_what_it_became(server, clean):
    made = run(server, "pin", "items", "--frozen", "--device", "host", "--name", "epoch-7", "--layout", "segments")
    assert made.returncode == 0, made.stderr
    assert "lent: 0 bytes copied" in made.stdout and "0 B" in made.stdout
    text = listed(server)
    assert "LAYOUT" in text and "segments" in text
    copied = run(server, "pin", "items", "--frozen", "--device", "host", "--name", "copy", "--layout", "columns")
    assert copied.returncode == 0 and "copied: columns were asked for" in copied.stdout
    clean.put("items", items([1], 1))
    refused = run(server, "pin", "items", "--frozen", "--device", "host", "--name", "third", "--layout", "segments")
    assert refused.returncode == 1 and "1 superseded row in 1 segment" in refused.stderr
    assert "pinion merge items" in refused.stderr
