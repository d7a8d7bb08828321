"""The Python client's lookups, over the local lane and over Flight: the size of replies.

The fear: an option that one of the two ways drops or reads otherwise.
"""

from datetime import UTC, datetime, timedelta

import pinion
import pyarrow as pa
import pytest

USERS = """
[table]
name = "users"
entity = [{ name = "id", type = "int64" }]
event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
history = "latest"
lookup = "rows"

[[feature]]
name = "score"
type = "float64"

[[feature]]
name = "name"
type = "string"
default = "nobody"

[[feature]]
name = "visits"
type = "int32"
default = 0

[[feature]]
name = "group"
type = "dictionary<values=string, indices=int16, ordered=0>"
default = "none"
"""
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
COUNT = 2000


def users(ids, version=0):
    """Rows of `users`; some names and visits are null."""
    ids = list(ids)
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "at": pa.array([NOON + timedelta(seconds=version)] * len(ids), pa.timestamp("us", tz="UTC")),
            "score": pa.array([i / 4 + version for i in ids]),
            "name": pa.array([name(i) for i in ids]),
            "visits": pa.array([visits(i) for i in ids], pa.int32()),
            "group": pa.array([f"g{i % 3}" for i in ids]),
        }
    )


def name(i):
    return None if i % 5 == 4 else f"user {i}"


def visits(i):
    return None if i % 7 == 2 else i * 3


def keys(*ids):
    return pa.record_batch({"id": pa.array(ids, pa.int64())})


@pytest.fixture
def server(store, serve):
    """Most rows in a packed segment, some in the log, one key replaced."""
    store.apply(USERS)
    server = serve()
    with pinion.connect(server.flight) as writer:
        writer.put("users", users(range(COUNT - 10)))
        writer.action("flush", {"table": "users"})
        writer.put("users", users(range(COUNT - 10, COUNT)))
        writer.put("users", users([8], version=60))
    return server


@pytest.fixture(params=["lane", "flight"])
def client(server, request):
    way = {"lane": {"lane": f"lane://{server.lane}"}, "flight": {"flight": server.flight}}[request.param]
    with pinion.connect(**way) as client:
        yield client


@pytest.fixture
def operator(server):
    with pinion.connect(server.flight) as operator:
        yield operator


# -- the size of replies


def test_a_reply_over_the_callers_limit_is_refused_with_both_sizes(client):
    many, few = keys(*range(COUNT), *range(COUNT)), keys(*range(100))
    lookup = client.prepare(["users:score", "users:name", "users:visits"], max_message_bytes=65_536)
    assert lookup(few).num_rows == 100
    for ask in (
        lambda: lookup(many),
        lambda: client.lookup(["users:score", "users:name", "users:visits"], many, max_message_bytes=65_536),
    ):
        with pytest.raises(pinion.ResourceExhausted, match="max_message_bytes") as refused:
            ask()
        details = refused.value.details
        assert details["limit_bytes"] == 65_536 < details["bytes"]
    assert lookup(few).num_rows == 100
    assert client.prepare(["users:score", "users:name"])(many).num_rows == 2 * COUNT


def test_the_limit_of_a_reply_can_be_raised(client, operator):
    operator.put("users", users([1], version=1).set_column(3, "name", pa.array(["x" * 100_000])))
    many = keys(*[1] * 60)
    if client._lane is None:
        with pytest.raises(pinion.ResourceExhausted, match="max_message_bytes"):
            client.prepare(["users:name"])(many)
    rows = client.prepare(["users:name"], max_message_bytes=8 << 20)(many)
    assert rows["name"].to_pylist() == ["x" * 100_000] * 60
    assert client.lookup(["users:name"], many, max_message_bytes=8 << 20).equals(rows)


@pytest.mark.parametrize("limit", [0, 5, 1 << 40])
def test_a_limit_that_no_reply_can_have_is_refused(client, limit):
    with pytest.raises(pinion.InvalidArgument, match="max_message_bytes"):
        client.prepare(["users:score"], max_message_bytes=limit)(keys(1))
