"""The Flight contract as a pyarrow client sees it, over TCP and over the Unix socket."""

import json
import socket
import subprocess
import time
import urllib.request
from datetime import UTC, datetime
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import flight

from oracle import NOT_FOUND, NULL_VALUE, OUTSIDE_MAX_AGE, PRESENT, Oracle, same_rows
from support import flight as calls
from support.process import binary, environment

PRICES = """
[table]
name = "prices"
description = "What an item cost, and when"
entity = [{ name = "shop", type = "string" }, { name = "item", type = "int64" }]
event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
history = "all"
ttl = "1h"

[[feature]]
name = "price"
type = "decimal128(10, 2)"
description = "In euros"

[features]
note = "string"
stock = "int32"
"""
ITEMS = """
[table]
name = "items"
entity = [{ name = "item", type = "int64" }]

[features]
price = "float64"
vector = "list<item: float>[8]"
"""
TEXTS = """
[table]
name = "texts"
entity = [{ name = "id", type = "int64" }]

[features]
text = "string"
"""
SCHEMA = pa.schema(
    [
        pa.field("shop", pa.string(), nullable=False),
        pa.field("item", pa.int64(), nullable=False),
        pa.field("at", pa.timestamp("us", tz="UTC"), nullable=False),
        ("price", pa.decimal128(10, 2)),
        ("note", pa.string()),
        ("stock", pa.int32()),
    ]
)
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)


def at(minute):
    return NOON.replace(hour=12 + minute // 60, minute=minute % 60)


def price_rows():
    return [
        {
            "shop": shop,
            "item": item,
            "at": at(minute),
            "price": None if minute == 20 else Decimal(item * 100 + minute) / 100,
            "note": None if item % 2 else f"{shop} {minute}",
            "stock": item * minute,
        }
        for shop in ("north", "söuth", "")
        for item in range(20)
        for minute in (0, 10, 20, 20, 45)
    ]


@pytest.fixture
def prices(store, serve, connect):
    """A server with two tables, rows in `prices`, and the oracle that holds the same."""
    store.apply(PRICES, ITEMS)
    server = serve()
    client = connect(server)
    oracle = Oracle(["shop", "item"], "at", history="all")
    for row in price_rows():
        oracle.upsert(row)
    calls.put(client, "prices", pa.Table.from_pylist(price_rows(), SCHEMA))
    return server, client, oracle


def test_flights_are_listed_with_true_schema_rows_and_bytes(prices):
    _, client, _ = prices
    infos = {info.descriptor.path[0].decode(): info for info in client.list_flights()}
    assert set(infos) == {"prices", "items"}
    assert infos["items"].total_records == 0
    info = infos["prices"]
    assert info.schema.equals(SCHEMA)
    assert info.schema.field("price").metadata in (None, {b"description": b"In euros"})
    assert info.total_records == len(price_rows())
    assert info.total_bytes > 1_000
    assert client.get_schema(flight.FlightDescriptor.for_path("prices")).schema.equals(SCHEMA)


def test_the_whole_table_by_its_ticket(prices):
    _, client, oracle = prices
    same_rows(calls.whole(client, "prices").to_pylist(), oracle.rows())


def test_a_ticket_reads_the_snapshot_it_was_made_for(prices):
    _, client, oracle = prices
    info = client.get_flight_info(flight.FlightDescriptor.for_path("prices"))
    more = [{**row, "shop": "west"} for row in price_rows()]
    calls.put(client, "prices", pa.Table.from_pylist(more, SCHEMA))
    calls.action(client, "merge", table="prices")
    then = calls.read(client.do_get(info.endpoints[0].ticket))[0]
    same_rows(then.to_pylist(), oracle.rows())
    assert calls.whole(client, "prices").num_rows == 2 * len(price_rows())


def test_scans_project_filter_limit_and_choose_the_view(prices):
    _, client, oracle = prices
    found = calls.scan(client, "prices", features=["stock", "shop"])
    assert found.schema.names == ["stock", "shop"]
    found = calls.scan(client, "prices", filter="item >= 18 and shop = 'söuth' and price is not null")
    same_rows(
        found.to_pylist(),
        [r for r in oracle.rows() if r["item"] >= 18 and r["shop"] == "söuth" and r["price"] is not None],
    )
    found = calls.scan(client, "prices", filter="at between '2024-05-01T12:10:00Z' and '2024-05-01T12:20:00Z'")
    same_rows(found.to_pylist(), [r for r in oracle.rows() if at(10) <= r["at"] <= at(20)])
    same_rows(calls.scan(client, "prices", view="latest").to_pylist(), oracle.latest())
    same_rows(calls.scan(client, "prices", view="history").to_pylist(), oracle.rows())
    assert calls.scan(client, "prices", limit=7).num_rows == 7


def test_the_reply_names_its_snapshot_and_the_zero_copy_share(prices):
    _, client, _ = prices
    _, metadata = calls.read(client.do_get(calls.ticket(scan={"table": "prices"})))
    assert metadata[0]["snapshot"] and "positions" in metadata[0]
    assert 0 <= metadata[-1]["zero_copy_share"] <= 1
    again = calls.scan(client, "prices", snapshot=metadata[0]["snapshot"])
    assert again.num_rows == len(price_rows())


def test_a_clean_segment_goes_out_by_reference_and_aligned(prices):
    _, client, _ = prices
    calls.action(client, "merge", table="prices")
    table, metadata = calls.read(client.do_get(calls.ticket(scan={"table": "prices"})))
    table.validate(full=True)
    assert metadata[-1]["zero_copy_share"] > 0.5  # the bitmaps of few rows are copied beside others
    for column in table.columns:
        for chunk in column.chunks:
            assert all(buffer.address % 8 == 0 for buffer in chunk.buffers() if buffer is not None)


def test_a_default_client_is_served_over_the_unix_socket(prices):
    """gRPC's C++ library sends the socket's path, percent-encoded, as the HTTP/2 authority."""
    server, client, oracle = prices
    plain = flight.connect(f"grpc+unix://{server.uds}")
    for _ in range(3):  # later requests refer to the first one's header
        same_rows(calls.whole(plain, "prices").to_pylist(), oracle.rows())
    named = flight.connect(f"grpc+unix://{server.uds}", generic_options=[("grpc.default_authority", "localhost")])
    assert calls.whole(named, "prices").num_rows == len(price_rows())
    # A request whose headers are larger than the client's first read.
    options = flight.FlightCallOptions(headers=[(b"x-note", b"n" * 6000)])
    reader = plain.do_get(calls.ticket(scan={"table": "prices", "limit": 3}), options)
    assert reader.read_all().num_rows == 3


def test_lookups_on_one_stream_answer_each_batch_in_its_order(prices):
    _, client, oracle = prices
    batches = [
        {"item": [3, 3, 19, 77], "shop": ["north", "", "söuth", "north"]},
        {"item": [5], "shop": ["north"]},
        {"item": list(range(20)) * 3, "shop": ["north"] * 20 + [""] * 20 + ["nowhere"] * 20},
    ]
    features = ["prices:price", "prices:note", "prices:stock"]
    replies = calls.lookups(
        client, features, batches, status=True, event_time=True, keep_expired=True, as_of=at(45).isoformat()
    )
    for batch, reply in zip(batches, replies):
        keys = list(zip(batch["shop"], batch["item"]))
        assert reply.schema.names[:5] == ["item", "shop", "price", "note", "stock"]
        assert reply["item"].to_pylist() == batch["item"]
        answers = oracle.lookup(keys, ["price", "note", "stock"], as_of=at(45))
        for feature, (values, statuses) in answers.items():
            assert reply[feature].to_pylist() == values
            assert reply[f"{feature}__status"].type == pa.uint8()
            assert reply[f"{feature}__status"].to_pylist() == statuses
        rows = [oracle.winner(key, at(45)) for key in keys]
        assert reply["price__event_time"].to_pylist() == [row and row["at"] for row in rows]


def test_every_status_and_the_inclusive_bound_of_ttl(prices):
    _, client, _ = prices
    keys = {"shop": ["north", "north"], "item": [2, 99]}

    def ask(minute, feature, **more):
        reply = calls.lookup(client, [f"prices:{feature}"], keys, status=True, as_of=at(minute).isoformat(), **more)
        return list(zip(reply[feature].to_pylist(), reply[f"{feature}__status"].to_pylist()))

    assert ask(0, "stock") == [(0, PRESENT), (None, NOT_FOUND)]
    assert ask(20, "price")[0] == (None, NULL_VALUE)
    assert ask(45 + 60, "stock")[0] == (90, PRESENT)
    assert ask(46 + 60, "stock")[0] == (None, OUTSIDE_MAX_AGE)
    assert ask(46 + 60, "stock", keep_expired=True)[0] == (90, OUTSIDE_MAX_AGE)


def test_keys_in_a_ticket_answer_by_do_get(prices):
    _, client, _ = prices
    request = {
        "features": ["prices:stock"],
        "keys": {"shop": ["north", "x"], "item": [4, 4]},
        "as_of": at(45).isoformat(),
        "status": True,
    }
    found = calls.read(client.do_get(calls.ticket(lookup=request)))[0]
    assert found["stock"].to_pylist() == [180, None]
    assert found["stock__status"].to_pylist() == [PRESENT, NOT_FOUND]
    info = client.get_flight_info(calls.command(lookup=request))
    assert info.total_records == 2
    assert calls.read(client.do_get(info.endpoints[0].ticket))[0].equals(found)


def test_equal_feature_names_are_refused_and_the_way_out_is_named(prices):
    _, client, _ = prices
    keys = {"shop": ["north"], "item": [1]}
    features = ["prices:price", "items:price"]
    with pytest.raises(pa.ArrowInvalid, match="full_feature_names"):
        calls.lookup(client, features, keys)
    reply = calls.lookup(client, features, keys, full_feature_names=True)
    assert reply.schema.names == ["shop", "item", "prices__price", "items__price"]


def test_a_put_acknowledges_progress_and_then_durability(prices):
    _, client, _ = prices
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([n / 2 for n in range(80)], pa.float32()), 8)
    rows = pa.table({"item": range(10), "price": [n * 1.5 for n in range(10)], "vector": vectors})
    replies = calls.put(client, "items", rows, id="first")
    assert replies[-1]["durable"] is True and replies[-1]["applied"] is True and replies[-1]["rows"] == 10
    assert all(reply["durable"] is False for reply in replies[:-1])
    token = replies[-1]["token"]
    reply = calls.lookup(client, ["items:vector"], {"item": [3]}, token=token, timeout_ms=1_000)
    assert reply["vector"].to_pylist() == [[n / 2 for n in range(24, 32)]]


def test_a_put_with_an_id_seen_before_is_acknowledged_and_not_applied(prices):
    _, client, _ = prices

    def send(price):
        rows = pa.table({"item": [1], "price": [price]})
        return calls.put(client, "items", rows, id="the same")[-1]

    assert send(1.0)["applied"] is True
    again = send(2.0)
    assert again["applied"] is False and again["durable"] is True
    assert calls.scan(client, "items", features=["price"])["price"].to_pylist() == [1.0]


def test_deletes_by_put_hide_the_key_from_their_time(prices):
    _, client, _ = prices
    keys = pa.Table.from_pylist(
        [{"shop": "north", "item": 2, "at": at(30)}],
        schema=pa.schema([SCHEMA.field(n) for n in ("shop", "item", "at")]),
    )
    assert calls.put(client, "prices", keys, mode="delete")[-1]["rows"] == 1

    def stock(minute):
        return calls.lookup(client, ["prices:stock"], {"shop": ["north"], "item": [2]}, as_of=at(minute).isoformat())[
            "stock"
        ].to_pylist()[0]

    for _ in ("log", "segment"):
        assert stock(29) == 40 and stock(30) is None and stock(44) is None and stock(45) == 90
        calls.action(client, "merge", table="prices")


def test_actions_are_listed_and_answer_json(prices):
    _, client, _ = prices
    names = {action.type for action in client.list_actions()}
    assert names >= {
        "apply",
        "drop",
        "flush",
        "merge",
        "stats",
        "source",
        "dead_letters",
        "pin",
        "unpin",
        "pins",
        "leases",
    }
    (stats,) = calls.action(client, "stats", table="prices")
    assert stats["tables"][0]["rows"] == len(price_rows())
    (flushed,) = calls.action(client, "flush", table="prices")
    assert flushed["stats"]["log_rows"] == 0 and len(flushed["stats"]["segments"]) == 1
    assert calls.action(client, "dead_letters", table="prices")[0]["dead_letters"] == []
    assert calls.action(client, "leases")[0]["leases"] == []
    assert calls.action(client, "pins")[0]["pins"] == []
    (pinned,) = calls.action(client, "pin", table="prices", mode="frozen", device="host")
    assert pinned["generation"]["rows"] == len({(row["shop"], row["item"]) for row in price_rows()})
    assert calls.action(client, "pin", table="prices", mode="frozen", device="host")[0]["pin"] == pinned["pin"]
    calls.action(client, "unpin", pin=pinned["pin"])
    assert calls.action(client, "pins")[0]["pins"] == []


def test_evolution_adds_and_widens_without_rewriting_files(prices, store):
    _, client, _ = prices
    calls.action(client, "flush", table="prices")
    before = store.segments()
    newer = PRICES.replace('stock = "int32"', 'stock = "int64"\nstars = "int8"')
    calls.action(client, "apply", definitions=[newer])
    found = calls.scan(client, "prices")
    assert found.schema.field("stock").type == pa.int64()
    assert found["stars"].null_count == found.num_rows == len(price_rows())
    assert store.segments() == before
    with pytest.raises((pa.ArrowInvalid, flight.FlightError, pa.ArrowException), match="price"):
        calls.action(client, "apply", definitions=[newer.replace("decimal128(10, 2)", "int32")])


def test_a_dropped_table_is_gone_and_its_name_is_free(prices):
    _, client, _ = prices
    ticket = client.get_flight_info(flight.FlightDescriptor.for_path("prices")).endpoints[0].ticket
    calls.action(client, "drop", table="prices")
    with pytest.raises(KeyError):
        calls.whole(client, "prices")
    calls.action(client, "apply", definitions=[PRICES])
    assert calls.whole(client, "prices").num_rows == 0
    # A ticket names the table, not its name: it never reads the namesake.
    with pytest.raises((KeyError, pa.ArrowException)):
        calls.read(client.do_get(ticket))


def test_as_of_joins_say_that_they_are_not_served_yet(prices):
    _, client, _ = prices
    with pytest.raises(NotImplementedError, match="asof"):
        calls.read(client.do_get(calls.ticket(asof={"features": ["prices:stock"]})))


def test_messages_stay_under_four_mebibytes(store, serve, connect):
    store.apply(ITEMS)
    server = serve()
    client = connect(server)
    count = 300_000
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * (count * 8), pa.float32()), 8)
    rows = pa.table({"item": range(count), "price": [0.0] * count, "vector": vectors})
    calls.put(client, "items", rows)
    for stage in ("log", "segment"):
        reader = client.do_get(calls.ticket(scan={"table": "items"}))
        total = 0
        for chunk in reader:
            size = chunk.data.get_total_buffer_size()
            assert size < 4 << 20, (stage, size)
            total += chunk.data.num_rows
        assert total == count
        calls.action(client, "merge", table="items")


def test_stored_batches_share_messages_as_large_as_the_client_takes(store, serve, connect):
    store.apply(ITEMS)
    client = connect(serve())
    count = 300_000
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * (count * 8), pa.float32()), 8)
    prices = [None if i % 7 == 0 else i / 3 for i in range(count)]
    calls.put(client, "items", pa.table({"item": range(count), "price": prices, "vector": vectors}))
    calls.action(client, "merge", table="items")
    scan = {"table": "items", "features": ["price", "item"]}
    for limit, most in ((None, 4 << 20), (65_536, 65_536), (32 << 20, 32 << 20), ((2 << 30) - 1, 32 << 20)):
        chunks = [chunk.data for chunk in client.do_get(calls.ticket(scan=scan | ({"max_message_bytes": limit} if limit else {})))]
        sizes = [chunk.get_total_buffer_size() for chunk in chunks]
        assert max(sizes) < most
        # Each of two is longer than the limit, or the first two, which wait for nothing.
        assert all(one + other > most / 2 for one, other in zip(sizes[2:], sizes[3:-1], strict=False)), (limit, sizes)
        assert len(chunks) <= 4 + sum(sizes) * 2 // most, (limit, sizes)
        found = pa.Table.from_batches(chunks).sort_by("item")
        assert found.column("price").to_pylist() == prices


def test_rows_survive_an_orderly_restart_and_the_command_line_sees_them(prices, store):
    server, _, oracle = prices
    via_server = json.loads(
        subprocess.run(
            [str(binary()), "scan", "--server", server.flight, "prices", "--output", "json"],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    server.stop()
    direct = json.loads(store.run("scan", "prices", "--output", "json").stdout)
    assert direct == via_server and len(direct) == len(oracle.rows())
    server.start()
    assert calls.whole(calls.connect(server), "prices").num_rows == len(oracle.rows())


def test_the_admin_port_tells_health_and_figures(prices):
    server, _, _ = prices

    def get(path):
        with urllib.request.urlopen(server.admin + path, timeout=5) as reply:
            return reply.status, reply.read().decode()

    assert get("/livez")[0] == 200
    assert get("/readyz")[0] == 200
    status, text = get("/metrics")
    assert status == 200 and "prices" in text


def test_exchange_with_nothing_written_ends_cleanly(prices):
    _, client, _ = prices
    writer, reader = client.do_exchange(calls.command(lookup={"features": ["prices:stock"]}))
    writer.begin(pa.schema([("shop", pa.string()), ("item", pa.int64())]))
    writer.done_writing()
    assert reader.read_all().num_rows == 0
    writer.close()


def test_replies_that_nobody_reads_hold_a_bounded_amount_of_memory(store, serve, connect):
    """Each request of 96 KB asks for one reply of 49 MB, as large as the client may ask for: of nine, two are made."""
    store.apply(TEXTS)
    server = serve()
    client = connect(server)
    calls.put(client, "texts", pa.table({"id": pa.array([1], pa.int64()), "text": ["x" * 4096]}))
    keys = pa.record_batch({"id": pa.array([1] * 12_000, pa.int64())})
    command = json.dumps({"lookup": {"features": ["texts:text"], "max_message_bytes": (2 << 30) - 1}})
    before = anonymous_bytes(server.process.pid)
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command.encode()))
    writer.begin(keys.schema)
    for _ in range(9):
        writer.write_batch(keys)
    time.sleep(2)
    held = anonymous_bytes(server.process.pid) - before
    assert held < 180e6, f"{held / 1e6:.0f} MB are held for a client that reads nothing"
    writer.done_writing()
    replies = [chunk.data for chunk in reader if chunk.data is not None]
    assert [reply.num_rows for reply in replies if reply.num_rows] == [12_000] * 9


def test_a_stopping_server_does_not_wait_for_clients_that_never_spoke(serve):
    server = serve()
    host, port = server.flight.removeprefix("grpc://").split(":")
    with socket.create_connection((host, int(port))), socket.create_connection((host, int(port))) as half:
        half.sendall(b"PRI * HTTP/2.0")
        time.sleep(0.2)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 5
    assert "cut off" not in server.log_text()


def anonymous_bytes(pid):
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
