"""What the Python client reads of a pin, against a test double of the server: shared host memory, no GPU.

The fears: a value read from the wrong place, a null taken for a value, a copy that calls itself none.
"""

import numpy as np
import pinion
import pyarrow as pa
import pytest
from pinion import arrow
from support.pinned import ROWS, client, pin, released, stub, users  # noqa: F401  (fixtures)
from support.pins import StubServer, TestPin


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
