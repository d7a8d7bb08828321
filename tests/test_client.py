"""The Python client's lookups, over the local lane and over Flight: services, defaults, deadlines, limits.

The fears: an option that one of the two ways drops or reads otherwise; a value that was not read and is taken for
one that is not there; a mark that is missing, or that stays on the next reply; a wait
that is dropped, that reads too early, or that the next lookup inherits.
"""

import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pinion
import pyarrow as pa
import pytest
from pyarrow import flight

from pinion import NOT_FOUND, NOT_READ, NULL_VALUE, PRESENT
from pinion.barrier import members
from pinion.flight import Exchange, Flight, StreamEnded
from support.broker import Log

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
RANKING = """
[service]
name = "ranking"
features = ["users:visits", "users:score"]
"""
RANKING_2 = """
[service]
name = "ranking"
features = ["users:name"]
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
    store.apply(USERS, RANKING)
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


def asked(client, *arguments, **options):
    """The two ways to ask, which must answer alike: by `lookup` and by a prepared lookup."""
    keys = options.pop("keys")
    prepared = client.prepare(*arguments, **options)
    rows = client.lookup(*arguments, keys=keys, **options)
    assert prepared.lookup(keys).equals(rows, check_metadata=True)
    assert prepared(keys).equals(rows, check_metadata=True)
    return rows


# -- feature services


def test_a_service_answers_as_its_features_do(client):
    for ids in ([8], [COUNT - 1, 4, 4, 10**6, 9], range(COUNT), []):
        batch = keys(*ids)
        options = {"status": True, "event_time": True}
        by_service = asked(client, service="ranking", keys=batch, **options)
        by_name = asked(client, ["users:visits", "users:score"], keys=batch, **options)
        assert by_service.schema.names[:3] == ["id", "visits", "score"]
        assert by_service.equals(by_name)
        assert by_service["visits"].to_pylist() == [visits(i) if i < COUNT else None for i in ids]
        found = [NOT_FOUND if i >= COUNT else NULL_VALUE if visits(i) is None else PRESENT for i in ids]
        assert by_service["visits__status"].to_pylist() == found
    last = asked(client, service="ranking", keys=keys(8), event_time=True)
    assert last["score"].to_pylist() == [62.0] and last["score__event_time"].to_pylist() == [NOON + timedelta(minutes=1)]


def test_a_version_of_a_service_stays_what_it_was(client, operator):
    before = client.prepare(service="ranking")
    assert before(keys(1)).schema.names == ["id", "visits", "score"]
    operator.action("apply", {"definitions": [RANKING_2]})
    for service, columns in {
        "ranking@v1": ["id", "visits", "score"],
        "ranking@v2": ["id", "name"],
        "ranking": ["id", "name"],
    }.items():
        rows = client.prepare(service=service)(keys(1, 4))
        assert rows.schema.names == columns, service
        assert rows.to_pylist() == client.lookup([f"users:{column}" for column in columns[1:]], keys(1, 4)).to_pylist()
    # Whoever prepared the newest version keeps the one that was newest then.
    assert before(keys(1)).schema.names == ["id", "visits", "score"]


def test_a_lookup_by_the_name_of_a_service_follows_its_versions(client, operator, monkeypatch):
    monkeypatch.setattr("pinion.client.SERVICE_SECONDS", 0.2)
    for service in ("ranking", "ranking@v1"):
        assert client.lookup(service=service, keys=keys(1)).schema.names == ["id", "visits", "score"]
    operator.action("apply", {"definitions": [RANKING_2]})
    until = time.monotonic() + 10
    while client.lookup(service="ranking", keys=keys(1)).schema.names != ["id", "name"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert client.lookup(service="ranking@v1", keys=keys(1)).schema.names == ["id", "visits", "score"]


def test_a_service_that_is_not_there_is_named(client):
    for service in ("rankign", "ranking@v9"):
        with pytest.raises(pinion.PinionError, match="ranki") as refused:
            client.prepare(service=service)(keys(1))
        assert refused.value.error == "UNKNOWN_SERVICE"
    with pytest.raises(pinion.InvalidArgument):
        client.lookup(["users:score"], keys(1), service="ranking")
    assert client.lookup(keys=keys(1), service="ranking")["score"].to_pylist() == [0.25]


# -- puts


def test_a_table_in_one_chunk_larger_than_a_message_is_put(operator):
    many = users(range(COUNT, COUNT + 80_000), version=1)
    text = pa.array(["x" * 1000]).take(pa.array([0] * len(many)))
    many = many.set_column(many.schema.get_field_index("name"), "name", text)
    assert many.nbytes > 80_000_000 and many["name"].num_chunks == 1
    assert operator.put("users", many)["rows"] == 80_000
    found = operator.lookup(["users:name"], keys(COUNT, COUNT + 79_999))
    assert [len(name) for name in found["name"].to_pylist()] == [1000, 1000]
    assert operator.put("users", many.slice(0, 0))["rows"] == 0


# -- defaults


@pytest.mark.parametrize("features", [["score", "name", "visits"], ["score", "name", "visits", "group"]])
def test_defaults_stand_in_for_nulls_and_the_status_stays(client, features):
    """With a dictionary among them, values are read another way."""
    ids = [1, 2, 4, COUNT - 1, 10**6]
    names = [f"users:{feature}" for feature in features]
    plain = asked(client, names, keys=keys(*ids), status=True)
    with_defaults = asked(client, names, keys=keys(*ids), status=True, defaults=True)
    assert plain["name"].to_pylist() == ["user 1", "user 2", None, None, None]
    assert with_defaults["name"].to_pylist() == ["user 1", "user 2", "nobody", "nobody", "nobody"]
    assert with_defaults["visits"].to_pylist() == [3, 0, 12, 3 * (COUNT - 1), 0]
    assert with_defaults["score"].to_pylist() == [0.25, 0.5, 1.0, (COUNT - 1) / 4, None], "it has no default"
    if "group" in features:
        assert with_defaults["group"].to_pylist() == ["g1", "g2", "g1", f"g{(COUNT - 1) % 3}", "none"]
    for feature in features:
        assert with_defaults[f"{feature}__status"].equals(plain[f"{feature}__status"])
    assert with_defaults["name__status"].to_pylist() == [PRESENT, PRESENT, NULL_VALUE, NULL_VALUE, NOT_FOUND]


# -- deadlines


@pytest.mark.parametrize("feature", ["score", "group"])
def test_a_reply_past_its_deadline_is_partial_and_its_values_not_read(client, feature):
    ids = [1, 2, 3, 10**6]
    late = asked(client, [f"users:{feature}"], keys=keys(*ids), status=True, deadline_ms=0)
    assert pinion.is_partial(late)
    assert late["id"].to_pylist() == ids
    assert late[feature].null_count == len(ids)
    assert late[f"{feature}__status"].to_pylist() == [NOT_READ] * len(ids)
    for options in ({}, {"deadline_ms": 60_000}):
        whole = asked(client, [f"users:{feature}"], keys=keys(*ids), status=True, **options)
        assert not pinion.is_partial(whole)
        assert whole[f"{feature}__status"].to_pylist() == [PRESENT] * 3 + [NOT_FOUND]


def test_what_was_read_before_the_deadline_is_answered_as_ever(client):
    ids = [i % COUNT for i in range(300_000)]
    lookup = client.prepare(["users:score"], status=True, deadline_ms=1, max_message_bytes=64 << 20)
    rows = lookup(keys(*ids))
    assert rows.num_rows == len(ids)
    found = rows["score__status"].to_pylist()
    assert set(found) <= {PRESENT, NOT_READ}
    assert NOT_READ in found, "300,000 keys in a millisecond"
    assert pinion.is_partial(rows)
    scores = [62.0 if i == 8 else i / 4 for i in ids]
    expected = [score if status == PRESENT else None for score, status in zip(scores, found)]
    assert rows["score"].to_pylist() == expected
    # The next reply is another one.
    assert not pinion.is_partial(client.lookup(["users:score"], keys(1), deadline_ms=60_000))


def test_a_late_lookup_with_defaults_is_still_not_read(client):
    for features, values in ((["name"], ["nobody"]), (["name", "group"], ["nobody", "none"])):
        names = [f"users:{feature}" for feature in features]
        late = asked(client, names, keys=keys(1, 4), status=True, defaults=True, deadline_ms=0)
        assert pinion.is_partial(late)
        for feature, value in zip(features, values):
            assert late[feature].to_pylist() == [value] * 2
            assert late[f"{feature}__status"].to_pylist() == [NOT_READ] * 2


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


# -- waiting for what was written


class Report:
    """A delivery report as confluent-kafka's `Message` has it."""

    def __init__(self, topic, partition, offset):
        self.topic, self.partition, self.offset = (lambda: topic), (lambda: partition), (lambda: offset)


class Metadata:
    """A delivery report as kafka-python and aiokafka have it."""

    def __init__(self, topic, partition, offset):
        self.topic, self.partition, self.offset = topic, partition, offset


def test_offsets_are_gathered_from_delivery_reports():
    seen = pinion.Offsets()
    assert not seen
    for report in (Report("a", 0, 5), Report("a", 0, 3), Metadata("a", 2, 0), Report("b", 1, 7)):
        seen.add(report)
    seen.delivered(None, Report("b", 1, 9))
    seen.delivered("it failed", Report("b", 1, 11))
    assert seen
    assert seen.token() == {"a": {"0": 5, "2": 0}, "b": {"1": 9}}
    # Through JSON, and through a pickle, into another process.
    assert pinion.Offsets(json.loads(json.dumps(seen.token()))).token() == seen.token()
    assert pickle.loads(pickle.dumps(seen)).token() == seen.token()
    with pytest.raises(ValueError, match="acks=0"):
        seen.add(Report("a", 0, -1001))


def test_topics_may_have_the_names_of_an_acknowledgements_members():
    for topics in (["durable"], ["token"], ["durable", "token"], ["durable", "token", "snapshot"]):
        offsets = {topic: {"0": 5} for topic in topics}
        for wait in (offsets, pinion.Offsets(offsets), [offsets]):
            assert members(wait, None) == {"at_least": offsets}, wait
    token = {"table": "users", "snapshot": "1-2"}
    acknowledged = {"rows": 1, "applied": True, "durable": True, "token": token}
    assert members([acknowledged, {"durable": {0: 5}}], None) == {"at_least": {"durable": {"0": 5}}, "token": [token]}
    assert members({**acknowledged, "token": None}, None) == {}


def test_what_a_put_returned_can_be_waited_for(client, operator):
    operator.put("users", users([1], version=1))
    prepared = client.prepare(["users:score"])
    for version in range(2, 12):
        acknowledged = operator.put("users", users([1], version=version))
        expected = [0.25 + version]
        for wait in (acknowledged, acknowledged["token"], [acknowledged["token"], acknowledged], json.loads(json.dumps(acknowledged))):
            assert client.lookup(["users:score"], keys(1), wait=wait)["score"].to_pylist() == expected
            assert prepared(keys(1), wait=wait)["score"].to_pylist() == expected
            assert client.prepare(["users:score"], wait=wait)(keys(1))["score"].to_pylist() == expected
            assert client.scan("users", wait=wait)["score"].to_pylist().count(expected[0]) >= 1


def test_a_wait_ends_at_its_timeout_and_the_next_lookup_waits_for_nothing(client, operator):
    acknowledged = operator.put("users", users([1], version=1))
    never = {"table": "users", "snapshot": acknowledged["token"]["snapshot"].split("-")[0] + "-999999"}
    prepared = client.prepare(["users:score"])
    for ask in (
        lambda: client.lookup(["users:score"], keys(1), wait=never, wait_timeout=0.02),
        lambda: prepared(keys(1), wait=[acknowledged, never], wait_timeout=0.02),
        lambda: client.prepare(["users:score"], wait=never, wait_timeout=0.02)(keys(1)),
        lambda: client.scan("users", wait=never, wait_timeout=0.02),
    ):
        with pytest.raises(pinion.DeadlineExceeded) as late:
            ask()
        assert late.value.error == "BARRIER_TIMEOUT"
        assert prepared(keys(1))["score"].to_pylist() == [1.25]
        assert client.lookup(["users:score"], keys(1))["score"].to_pylist() == [1.25]
    with pytest.raises(TypeError):
        client.lookup(["users:score"], keys(1), wait="users")
    with pytest.raises(TypeError):
        client.scan("users", wait={"topic": 5})
    with pytest.raises(pinion.InvalidArgument):
        client.lookup(["users:score"], keys(1), wait=never, wait_timeout=-1)


@pytest.mark.kafka
def test_records_of_a_topic_can_be_waited_for(store, kafka, serve):
    topic = kafka.topic("visits", partitions=2)
    store.apply(USERS + f"""
[source.kafka]
topic = "{topic}"
format = "json"
""")
    server = serve(brokers=kafka.bootstrap)
    log = Log(kafka.producer(**{"linger.ms": 0}), topic)
    at = NOON.isoformat()
    ways = [pinion.connect(f"lane://{server.lane}"), pinion.connect(server.flight)]
    prepared = [way.prepare(["users:visits"]) for way in ways]
    for n in range(30):
        value = {"id": 1, "at": at, "visits": n}
        seen = pinion.Offsets()
        log.producer.produce(topic, json.dumps(value).encode(), partition=n % 2, on_delivery=seen.delivered)
        log.flush()
        ((partition, offset),) = seen.token()[topic].items()
        for way, lookup in zip(ways, prepared):
            for wait in (seen, {topic: {int(partition): offset}}, seen.token()):
                asks = {
                    "lookup": lambda: way.lookup(["users:visits"], keys(1), wait=wait),
                    "prepared": lambda: lookup(keys(1), wait=wait, wait_timeout=10),
                    "prepare": lambda: way.prepare(["users:visits"], wait=wait)(keys(1)),
                    "scan": lambda: way.scan("users", ["visits"], wait=wait),
                    "batches": lambda: way.scan_batches("users", ["visits"], wait=wait).read_all(),
                }
                for name, ask in asks.items():
                    # The first to wait is another one each time.
                    assert ask()["visits"].to_pylist() == [n], (n, name)
        assert ways[0].map("users", wait=seen).table["visits"].to_pylist() == [n]
    with pytest.raises(pinion.DeadlineExceeded) as late:
        ways[0].lookup(["users:visits"], keys(1), wait={topic: {0: 1_000}}, wait_timeout=0.05)
    assert late.value.details["positions"][topic] == {"0": 15, "1": 15}
    with pytest.raises(pinion.FailedPrecondition) as unknown:
        ways[1].lookup(["users:visits"], keys(1), wait={"elsewhere": {0: 0}})
    assert unknown.value.error == "UNKNOWN_TOPIC"
    for way in ways:
        way.close()


# -- streams of lookups that threads share


def test_threads_that_share_a_lookup_over_flight_share_its_stream(server, monkeypatch):
    opened, failures = [], []
    exchange = Flight.exchange

    def count(*arguments):
        opened.append(arguments)
        return exchange(*arguments)

    monkeypatch.setattr(Flight, "exchange", count)
    with pinion.connect(server.flight) as client:
        lookup = client.prepare(["users:score"])

        def work(seed):
            try:
                for i in range(150):
                    assert lookup(keys(seed, 100 + i))["score"].to_pylist() == [seed / 4, 25 + i / 4]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(opened) == 1


def test_a_lookup_that_is_closed_by_one_thread_goes_on_in_the_others(server):
    failures = []
    with pinion.connect(server.flight) as client:
        lookup = client.prepare(["users:score"])

        def work():
            try:
                for _ in range(100):
                    assert lookup(keys(4))["score"].to_pylist() == [1]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            lookup.close()
            time.sleep(0.005)
    assert failures == []


class Stream:
    """A writer and a reader of Flight. The first write fails, when it is let."""

    def __init__(self):
        self.writing, self.let = threading.Event(), threading.Event()
        self.writes = 0

    def do_exchange(self, *_):
        return self, self

    def begin(self, schema):
        pass

    def write_batch(self, batch):
        self.writes += 1
        self.writing.set()
        self.let.wait(10)
        raise flight.FlightInternalError("could not write")

    def read_chunk(self):
        raise StopIteration


def test_a_stream_that_ends_is_said_to_be_and_nothing_is_written_on_it_after():
    stream = Stream()
    exchange = Exchange(stream, b"", keys().schema, None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(exchange.lookup, keys(1))
        assert stream.writing.wait(5) and not exchange.broken
        second = pool.submit(exchange.lookup, keys(1))
        time.sleep(0.05)
        stream.let.set()
        with pytest.raises(pinion.ConnectionLost, match="ended the stream") as failed:
            first.result()
        assert not isinstance(failed.value, StreamEnded)
        with pytest.raises(StreamEnded):
            second.result()
    assert exchange.broken and stream.writes == 1


def test_a_reply_that_was_never_read_is_not_taken_for_the_next_one():
    stream = Stream()
    exchange = Exchange(stream, b"", keys().schema, None)
    # As an interruption leaves it that comes before anything could be noted.
    exchange._pending = True
    with pytest.raises(StreamEnded):
        exchange.lookup(keys(1))
    assert exchange.broken and stream.writes == 0
