"""Pins as torch tensors on the host, and the trainer's batches. Skipped where torch is not installed.

The fears: a batch that misses or repeats a row; a mask that belongs to another column; a tensor that lets the
lease go while it lives; a gather whose missing rows read as row 0.
"""

import contextlib
import threading

import numpy as np
import pinion
import pyarrow as pa
import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)

import pinion.torch
from pinion.view import View
from support.pinned import ROWS, client, in_child, pin, released, stub, users  # noqa: F401  (fixtures)
from support.pins import StubServer, TestPin

TENSORS = {"user", "age", "score", "rank", "half", "count", "on", "at", "hash", "embedding"}


def column(name, version=0):
    return users(version).column(name).to_pylist()


def plain(tensor):
    """NaN as None."""
    return [None if value != value else value for value in tensor.tolist()]


def test_all_columns_that_have_a_tensor_are_given_with_masks(pin):
    with pin.latest() as view:
        values, masks = view.to_torch(mask=True)
        assert set(values) == set(masks) == TENSORS
        for name in TENSORS - {"embedding", "hash", "half", "at"}:
            expected = [np.float32(v).item() if isinstance(v, float) else v for v in column(name)]
            read = [v if ok else None for v, ok in zip(values[name].tolist(), masks[name].tolist())]
            assert read == expected, name
        assert values["embedding"].shape == (ROWS, 4) and values["hash"].shape == (ROWS, 16)
        assert values["on"].dtype == torch.bool and values["half"].dtype == torch.float16
        assert masks["count"].all() and masks["count"].shape == (ROWS,)


def test_tensors_are_the_slot_itself_and_keep_the_lease(pin, stub):
    with pin.latest() as view:
        score = view.to_torch(["score"])["score"]
        assert score.data_ptr() == view["score"]._address
        part = score[4:9]
    del view, score
    for version in (1, 2, 3):
        assert stub.publish("users", users(version))
    assert plain(part) == column("score")[4:9]
    assert not stub.wait(lambda: not stub.leases, 0.1)
    del part
    assert released(stub)


def test_null_ints_are_refused_without_a_mask(pin):
    with pin.latest() as view:
        with pytest.raises(pinion.HasNulls):
            view.to_torch(["age"])
        with pytest.raises(pinion.HasNulls):
            view.to_torch()
        values, masks = view.to_torch(["age"], mask=True)
        assert values["age"][3] == 0 and not masks["age"][3]
        with pytest.raises(pinion.NoTensor):
            view.to_torch(["name"])


def test_a_matrix_is_one_strided_tensor_of_the_slot(pin):
    with pin.latest() as view:
        matrix = view.to_torch(["score", "rank"], matrix=True)
        assert matrix.shape == (ROWS, 2) and matrix.data_ptr() == view["score"]._address
        assert matrix.stride() == (1, matrix.stride(1)) and matrix.stride(1) > ROWS
        assert plain(matrix[:, 0]) == column("score") and plain(matrix[:, 1]) == column("rank")
        weights = torch.tensor([2.0, -1.0])
        expected = [None if a is None or b is None else 2 * a - b for a, b in zip(column("score"), column("rank"))]
        assert plain(matrix @ weights) == expected
        _, masks = view.to_torch(["score", "rank"], matrix=True, mask=True)
        assert masks[:, 1].tolist() == [v is not None for v in column("rank")]


def test_a_matrix_of_everything_needs_equal_types_and_leaves_keys_out():
    table = pa.table(
        {"id": pa.array(range(6), pa.int64()), **{f"f{i}": pa.array([i + r / 10 for r in range(6)]) for i in range(12)}}
    )
    server = StubServer({"t": TestPin(table, ["id"]), "users": TestPin(users(), ["user"])})
    with pinion.connect(server.url) as client:
        with client.pin("t").latest() as view:
            matrix = view.to_torch(matrix=True)
            assert view.matrix_columns() == [f"f{i}" for i in range(12)]
            assert matrix.tolist() == [[i + r / 10 for i in range(12)] for r in range(6)]
        with client.pin("users").latest() as view, pytest.raises(pinion.NoTensor, match="age: int32"):
            view.to_torch(matrix=True, mask=True)
    server.stop()


def test_rows_are_taken_by_key_and_missing_ones_are_marked(pin):
    with pin.latest() as view:
        rows = pin.rows(torch.tensor([50, 7, 0, 30]))
        assert rows.dtype == torch.int64 and rows.tolist() == [5, -1, 0, 3]
        values, masks = pin.take(rows, features=["age", "score", "count", "on", "embedding"], mask=True)
        assert [v if ok else None for v, ok in zip(values["age"].tolist(), masks["age"].tolist())] == [5, None, 0, None]
        assert plain(values["score"]) == [1.25, None, 0.0, None]
        assert values["count"].tolist() == [15, 0, 0, 9] and values["count"].dtype == torch.uint16
        assert masks["count"].tolist() == [True, False, True, True]
        assert values["on"].tolist()[:2] == [False, False]
        assert values["embedding"][1].isnan().all() and values["embedding"][2, 1] == pytest.approx(0.1)
        matrix = view.take(rows, ["score", "rank"], matrix=True)
        assert matrix.is_contiguous() and plain(matrix[:, 1]) == [-5.0, None, 0.0, None]


def test_rows_are_taken_into_tensors_that_are_given(pin):
    with pin.latest() as view:
        rows = torch.tensor([2, -1, 4])
        out = {"count": torch.empty(3, dtype=torch.uint16), "rank": torch.empty(3)}
        taken = view.take(rows, ["count", "rank"], out=out)
        assert taken["rank"] is out["rank"] and out["count"].tolist() == [6, 0, 12]
        matrix = torch.empty(3, 2)
        assert view.take(rows, ["score", "rank"], matrix=True, out=matrix) is matrix
        assert plain(matrix[:, 0]) == [0.5, None, 1.0]


@pytest.mark.parametrize("matrix", [False, True])
def test_torch_and_our_own_gather_take_the_same(pin, matrix):
    """Out of range included: a row number of another generation gives a missing row, by either."""
    rows = torch.tensor([5, -1, 0, ROWS, 5, 10**9, -(2**63), 19])
    features = ["score", "rank"] if matrix else None
    with pin.latest() as view:
        by_torch = view.take(rows, features, matrix=matrix, mask=True)
        ours = view.take(rows, features, matrix=matrix, mask=True, kernel=True)
        for theirs, mine in zip(by_torch, ours):
            pairs = [(theirs, mine)] if matrix else [(theirs[name], mine[name]) for name in theirs]
            assert matrix or set(theirs) == set(mine) == TENSORS
            for one, other in pairs:
                assert one.dtype == other.dtype and one.shape == other.shape
                np.testing.assert_array_equal(one.numpy(), other.numpy())
        out = {"count": torch.empty(2, dtype=torch.uint16)}
        assert view.take(rows[:2], ["count"], out=out, kernel=True)["count"] is out["count"]
        assert out["count"].tolist() == [15, 0]


def test_what_was_taken_does_not_keep_the_lease(pin, stub):
    with pin.latest() as view:
        taken = view.take(torch.tensor([1, 2]), ["count"])
    del view
    assert released(stub)
    assert taken["count"].tolist() == [3, 6]


class Noted(torch.Tensor):
    """A tensor that passes for one on a GPU, and notes the streams that are said to work on it."""

    is_cuda = True

    def record_stream(self, stream):
        self.__dict__.setdefault("streams", []).append(stream)


class Stream:
    cuda_stream = 77

    def wait_stream(self, other):
        pass


@pytest.fixture
def streams(monkeypatch):
    """As if torch had a GPU: a current stream, and that of a block."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())


def noted(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype).as_subclass(Noted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_stream_that_takes_is_known_to_the_memory_of_its_arguments(pin, streams, dtype):
    """They may be let go of at once: torch would give their memory away before the stream has come to the gather."""
    stream, rows = Stream(), noted([2, -1, 4], dtype)
    outs = {"score": noted([0] * 3, torch.float32), "count": noted([0] * 3, torch.uint16)}
    masks = {name: noted([True] * 3, torch.bool) for name in outs}
    with pin.latest() as view:
        view.take(rows, ["score", "count"], out=(outs, masks), mask=True, stream=stream)
        assert view.hold().lease.named == {77}
        matrix = noted([[0] * 2] * 3, torch.float32)
        view.take([2, -1, 4], ["score", "rank"], matrix=True, out=matrix, stream=stream)
    for tensor in (rows, matrix, *outs.values(), *masks.values()):
        assert tensor.streams == [stream]
    assert outs["count"].tolist() == [6, 0, 12]


def test_a_stream_that_our_own_gather_takes_on_is_known_to_the_row_numbers(monkeypatch, streams):
    """Those that are no int64 are read on it, and only what comes of them is kept."""
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    stream, rows = Stream(), noted([2, -1, 4], torch.int32)
    places, chosen = pinion.torch.on_stream(rows, stream, 0)
    assert (places.tolist(), places.dtype, chosen) == ([2, -1, 4], torch.int64, stream)
    assert rows.streams == [stream]


def test_no_rows_to_take_from_are_all_missing():
    server = StubServer({"users": TestPin(users(rows=0), ["user"])})
    with pinion.connect(server.url) as client, client.pin("users").latest() as view:
        taken = view.take(view.row_ids([1, 2]), ["score", "count"])
        assert plain(taken["score"]) == [None, None] and taken["count"].tolist() == [0, 0]
    server.stop()


# -- batches


def test_every_epoch_reads_each_row_once_in_another_order(pin, stub):
    loader = pinion.torch.batches(pin, 6, features=["count", "score"], seed=4)
    assert len(loader) == 4
    orders = []
    for _ in range(3):
        batches = list(loader)
        assert [len(batch["count"]) for batch in batches] == [6, 6, 6, 2]
        order = torch.cat([batch["count"].to(torch.int32) for batch in batches]).tolist()
        scores = [v for batch in batches for v in plain(batch["score"])]
        assert scores == [column("score")[count // 3] for count in order]
        assert sorted(order) == column("count")
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert released(stub)
    again = pinion.torch.batches(pin, 6, features=["count"], seed=4)
    again.epoch = 2
    assert torch.cat([b["count"].to(torch.int32) for b in again]).tolist() == orders[2]


def test_batches_in_order_drop_the_last_and_may_be_matrices(pin):
    loader = pinion.torch.batches(pin, 8, shuffle=False, drop_last=True, features=["score", "rank"], matrix=True)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    assert plain(torch.cat(batches)[:, 0]) == column("score")[:16]
    values, masks = next(iter(pinion.torch.batches(pin, 5, shuffle=False, features=["age"], mask=True)))
    assert [v if ok else None for v, ok in zip(values["age"].tolist(), masks["age"].tolist())] == column("age")[:5]


def test_ranks_share_the_rows_of_an_epoch(pin):
    parts = [
        torch.cat([b["count"].to(torch.int32) for b in pinion.torch.batches(
            pin, 4, features=["count"], seed=1, global_rank=rank, global_size=3)]).tolist()
        for rank in range(3)
    ]  # fmt: skip
    assert [len(part) for part in parts] == [6, 6, 6]
    assert len({row for part in parts for row in part}) == 18


def test_an_epoch_is_of_one_generation_and_the_next_of_the_newest(pin, stub):
    loader = pinion.torch.batches(pin, 5, features=["count"], shuffle=False)
    seen = []
    for number, batch in enumerate(loader):
        stub.publish("users", users(number + 1))
        seen += batch["count"].tolist()
    assert seen == column("count")
    assert torch.cat([b["count"].to(torch.int32) for b in loader]).tolist() == column("count", 4)


def test_every_stream_on_which_a_batch_is_gathered_is_waited_for(pin, monkeypatch):
    """The consumer may be on another stream for each batch."""
    current = iter(range(101, 200))
    monkeypatch.setattr(pinion.torch, "_current_stream", lambda view: next(current))
    named = []
    monkeypatch.setattr(View, "use", lambda view, stream: named.append(stream))
    for number, _ in enumerate(pinion.torch.batches(pin, 5, features=["count"])):
        assert named == list(range(101, 102 + number))
    assert len(named) == 4


def test_an_epoch_that_is_left_ends_its_lease(pin, stub):
    for batch in pinion.torch.batches(pin, 5, features=["count"]):
        break
    assert released(stub)
    assert len(batch["count"]) == 5


def test_a_dataloader_without_workers_passes_batches_through(pin):
    loader = pinion.torch.batches(pin, 5, features=["count"])
    assert sum(len(b["count"]) for b in torch.utils.data.DataLoader(loader, batch_size=None)) == ROWS


def test_a_dataloader_with_workers_is_told_where_batches_are_read(pin):
    batches = pinion.torch.batches(pin, 5, features=["count"])
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=2)
    with pytest.raises(Exception, match="num_workers=0"):
        list(loader)
    # The workers, forked here, took nothing from the parent.
    with pin.latest() as view:
        assert len(view.to_torch(["count"])["count"]) == ROWS


def test_tensors_of_other_threads_end_their_lease(pin, stub):
    kept = []

    def work():
        with pin.latest() as view:
            kept.append(view.to_torch(["score"])["score"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert plain(kept[0]) == column("score")
    assert not stub.wait(lambda: not stub.leases, 0.1)
    kept.clear()
    assert released(stub)


def test_torch_tensors_may_outlive_the_interpreter(stub):
    said = in_child(
        """
        import sys, builtins
        import torch, pinion
        view = pinion.connect(sys.argv[1]).pin("users").latest()
        builtins.kept = [view, view.to_torch(["count"]), torch.from_dlpack(view["score"])]
        builtins.kept.append(builtins.kept)
        print(builtins.kept[2][:2].tolist())
        """,
        stub.url,
    )
    assert said == "[0.0, 0.25]\n"
    assert stub.wait(lambda: not stub.leases and not stub.mappings)
