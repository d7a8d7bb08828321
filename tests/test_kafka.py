"""From a real Kafka broker into tables: every record once, whatever is killed when.

The fears: a row applied twice or not at all because a position and its rows were written apart; two tables
on one topic that drift when one is added later; a restart that trusts Kafka's committed offsets; a topic
that was deleted and made again under the same name; a poison record that stops the line.
"""

import json
import random
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from pyarrow import flight

from oracle import NOT_FOUND, Oracle, same_rows
from support import flight as calls
from support.broker import Log
from support.ingest import wait_caught_up
from support.wait import until

pytestmark = pytest.mark.kafka

START = 1_700_000_000_000  # ms


def clicks(topic):
    """Latest row per user; the key comes from the value."""
    return f"""
[table]
name = "clicks"
entity = [{{ name = "user", type = "string" }}]
event_time = {{ name = "ts", type = "timestamp[ms, tz=UTC]" }}
history = "latest"

[features]
page = "string"
dwell = "int64"

[source.kafka]
topic = "{topic}"
format = "json"
"""


def visits(topic):
    """Every event of a (page, user), with where it came from."""
    return f"""
[table]
name = "visits"
entity = [{{ name = "page", type = "string" }}, {{ name = "user", type = "string" }}]
event_time = {{ name = "ts", type = "timestamp[ms, tz=UTC]" }}
history = "all"

[features]
dwell = "int64"

[[feature]]
name = "source_partition"
type = "int32"
from = "$partition"

[[feature]]
name = "source_offset"
type = "int64"
from = "$offset"

[source.kafka]
topic = "{topic}"
format = "json"
"""


def event(generator):
    return {
        "user": f"u{generator.randrange(200)}",
        "page": generator.choice(["home", "cart", "", "söök"]),
        "ts": START + generator.randrange(100_000),
        "dwell": generator.choice([None, generator.randrange(2**60)]),
    }


def produce(log, generator, count):
    """Events keyed by user, so that those of one user keep their order."""
    for _ in range(count):
        value = event(generator)
        log.send(json.dumps(value).encode(), key=value["user"].encode())


def expected(log):
    """What both tables must hold, from what the broker acknowledged."""
    latest = Oracle(["user"], "ts")
    history = Oracle(["page", "user"], "ts", history="all")
    for partition, offset, _, value, _ in log.in_order():
        row = json.loads(value)
        latest.upsert({name: row[name] for name in ("user", "ts", "page", "dwell")})
        history.upsert({**row, "source_partition": partition, "source_offset": offset})
    return latest, history


def plain(table):
    """Rows as dicts, times as milliseconds."""
    index = table.schema.get_field_index("ts")
    table = table.set_column(index, "ts", table["ts"].cast("int64"))
    return table.to_pylist()


def compare(client, log):
    """Both tables, by scan and by lookup, against the oracle."""
    latest, history = expected(log)
    same_rows(plain(calls.scan(client, "clicks")), latest.rows())
    same_rows(plain(calls.scan(client, "visits")), history.rows())
    users = [f"u{n}" for n in range(210)]
    reply = calls.lookup(client, ["clicks:page", "clicks:dwell"], {"user": users}, status=True)
    answers = latest.lookup([(user,) for user in users], ["page", "dwell"])
    for feature, (values, statuses) in answers.items():
        assert reply[feature].to_pylist() == values
        assert reply[f"{feature}__status"].to_pylist() == statuses
    keys = [(page, user) for page in ("home", "", "nowhere") for user in users]
    reply = calls.lookup(
        client, ["visits:dwell"], {"user": [u for _, u in keys], "page": [p for p, _ in keys]}, status=True
    )
    values, statuses = history.lookup(keys, ["dwell"])["dwell"]
    assert reply["dwell"].to_pylist() == values
    assert reply["dwell__status"].to_pylist() == statuses


# Commits of the two tables alternate: an even count dies after one table's append, an odd one after the other's.
@pytest.mark.parametrize("passes", [7, 8, 15, 30])
def test_two_tables_on_one_topic_survive_a_kill_between_their_commits(store, kafka, serve, passes):
    generator = random.Random(passes)
    topic = kafka.topic("events", partitions=3)
    log = Log(kafka.producer(), topic)
    store.apply(clicks(topic))
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    produce(log, generator, 500)
    wait_caught_up(server, client, "clicks", log)

    # The second table comes later and starts at the beginning, while the first goes on.
    calls.action(client, "apply", definitions=[visits(topic)])
    produce(log, generator, 500)
    wait_caught_up(server, client, "visits", log)
    wait_caught_up(server, client, "clicks", log)
    compare(client, log)

    server.stop()
    server.start(env={"PINION_FAIL": f"commit.appended={passes}"})
    for _ in range(400):
        produce(log, generator, 20)
        log.flush()
        if server.wait_dead(0.01):
            break
    assert not server.alive(), "the fail point was never reached"

    produce(log, generator, 500)
    server.start()
    client = calls.connect(server)
    wait_caught_up(server, client, "clicks", log)
    wait_caught_up(server, client, "visits", log)
    compare(client, log)
    server.stop()
    assert store.run("check").returncode == 0


def test_tombstones_delete_until_a_newer_event(store, kafka, serve):
    topic = kafka.topic("profiles", partitions=2)
    store.apply(f"""
[table]
name = "profiles"
entity = [{{ name = "id", type = "string", from = "$key" }}]
event_time = {{ name = "at", type = "timestamp[ms, tz=UTC]", from = "$timestamp" }}
history = "all"

[features]
score = "int32"

[source.kafka]
topic = "{topic}"
format = "json"
key = "string"
""")
    log = Log(kafka.producer(), topic)
    oracle = Oracle(["id"], "at", history="all")
    script = [("a", 10, 1), ("b", 10, 2), ("a", 20, None), ("b", 15, None), ("b", 30, 3), ("c", 5, None), ("d", 7, 4)]
    for key, at, score in script:
        value = None if score is None else json.dumps({"score": score}).encode()
        log.send(value, key=key.encode(), partition=0, timestamp_millis=START + at)
        if score is None:
            oracle.delete((key,), START + at)
        else:
            oracle.upsert({"id": key, "at": START + at, "score": score})
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_caught_up(server, client, "profiles", log)
    keys = ["a", "b", "c", "d"]
    for stage in ("log", "segment", "merged"):
        for at in (None, 9, 10, 15, 19, 20, 29, 30):
            as_of = None if at is None else START + at
            request = (
                {}
                if at is None
                else {"as_of": datetime.fromtimestamp(as_of / 1000, UTC).isoformat(timespec="milliseconds")}
            )
            reply = calls.lookup(client, ["profiles:score"], {"id": keys}, status=True, **request)
            values, statuses = oracle.lookup([(k,) for k in keys], ["score"], as_of=as_of)["score"]
            assert reply["score"].to_pylist() == values, (stage, at)
            assert reply["score__status"].to_pylist() == statuses, (stage, at)
        if stage == "log":
            calls.action(client, "flush", table="profiles")
        elif stage == "segment":
            calls.action(client, "merge", table="profiles")


def test_a_poison_record_becomes_a_dead_letter_and_the_line_goes_on(store, kafka, serve):
    topic = kafka.topic("poison", partitions=1)
    store.apply(clicks(topic))
    log = Log(kafka.producer(), topic)
    good = {"user": "a", "page": "home", "ts": START, "dwell": 1}
    bad = {
        1: b"{not json",
        2: json.dumps({**good, "dwell": "five"}).encode(),
        3: json.dumps({**good, "ts": 2**62}).encode(),
        4: json.dumps({"page": "home", "ts": START}).encode(),
        5: b"\xff\xfe",
    }
    for offset in range(7):
        log.send(bad.get(offset, json.dumps({**good, "ts": START + offset}).encode()), partition=0)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_caught_up(server, client, "clicks", log)
    assert [row["ts"] for row in plain(calls.scan(client, "clicks"))] == [START + 6]
    letters = letters_of(client, "clicks")
    assert sorted(letter["offset"] for letter in letters) == sorted(bad)
    assert all(letter["topic"] == topic and letter["partition"] == 0 for letter in letters)
    by_offset = {letter["offset"]: letter["error"] for letter in letters}
    assert "dwell" in by_offset[2], by_offset[2]
    assert "user" in by_offset[4], by_offset[4]

    # They survive a restart, as the position does.
    server.kill()
    server.start()
    client = calls.connect(server)
    wait_caught_up(server, client, "clicks", log)
    assert len(letters_of(client, "clicks")) == len(bad)


def letters_of(client, table):
    """The dead letters of a table."""
    (result,) = calls.action(client, "dead_letters", table=table)
    return result["dead_letters"]


def test_aborted_transactions_are_never_visible(store, kafka, serve):
    topic = kafka.topic("transactions", partitions=1)
    store.apply(clicks(topic))
    producer = kafka.producer(**{"transactional.id": f"t-{topic}"})
    producer.init_transactions(30)
    for round in range(6):
        producer.begin_transaction()
        for n in range(10):
            value = {"user": f"u{round}-{n}", "page": "p", "ts": START, "dwell": round}
            producer.produce(topic, json.dumps(value).encode(), partition=0)
        producer.flush(30)
        if round % 2:
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    # 60 records and 6 control records: the position passes the trailing aborted ones too.
    until(
        lambda: calls.scan_with_positions(client, "clicks")[1].get(topic, {}).get(0) == 66,
        what="the position passing the control records",
    )
    rows = plain(calls.scan(client, "clicks"))
    assert sorted({row["dwell"] for row in rows}) == [0, 2, 4] and len(rows) == 30


def test_a_broker_killed_and_restarted_loses_and_doubles_nothing(store, kafka, serve):
    generator = random.Random(5)
    topic = kafka.topic("restart", partitions=3)
    store.apply(clicks(topic), visits(topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    produce(log, generator, 1_000)
    wait_caught_up(server, client, "visits", log)
    kafka.kill()
    produce(log, generator, 500)
    kafka.start()
    wait_caught_up(server, client, "visits", log)
    wait_caught_up(server, client, "clicks", log)
    compare(client, log)


def test_a_topic_made_again_under_its_name_stops_the_source_with_the_reason(store, kafka, serve):
    generator = random.Random(6)
    topic = kafka.topic("again", partitions=3)
    store.apply(clicks(topic), visits(topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    produce(log, generator, 300)
    wait_caught_up(server, client, "clicks", log)
    wait_caught_up(server, client, "visits", log)
    server.stop()
    kafka.delete(topic)
    until(lambda: recreated(kafka, topic), what="the topic being made again")
    produce(Log(kafka.producer(), topic), generator, 600)
    server.start()
    client = calls.connect(server)
    state = until(lambda: stopped(client, topic), what="the source stopping")
    assert "topic" in state.lower() and "id" in state.lower(), state
    compare(client, log)  # and nothing of the new topic came in


def recreated(kafka, topic):
    try:
        kafka.create(topic, 3)
        return True
    except Exception:  # the deletion is still under way
        return False


def stopped(client, topic):
    """The state of the topic's source as text, once it is stopped."""
    (result,) = calls.action(client, "source", action="list")
    for source in result["sources"]:
        text = json.dumps(source)
        if topic in text and "stopped" in text.lower():
            return text
    return None


def test_a_read_can_wait_for_an_offset(store, kafka, serve):
    topic = kafka.topic("barrier", partitions=1)
    store.apply(clicks(topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    for n in range(20):
        value = {"user": "a", "page": "p", "ts": START + n, "dwell": n}
        log.send(json.dumps(value).encode(), partition=0)
        log.flush()
        barrier = {"at_least": {topic: {"0": n}}, "timeout_ms": 10_000}
        reply = calls.lookup(client, ["clicks:dwell"], {"user": ["a"]}, **barrier)
        assert reply["dwell"].to_pylist() == [n]
    with pytest.raises(flight.FlightTimedOutError):
        calls.scan(client, "clicks", at_least={topic: {"0": 1_000}}, timeout_ms=100)
    with pytest.raises(pa.ArrowInvalid, match="no-such-topic"):
        calls.scan(client, "clicks", at_least={"no-such-topic": {"0": 0}}, timeout_ms=100)
    assert calls.lookup(client, ["clicks:page"], {"user": ["z"]}, status=True)["page__status"].to_pylist() == [
        NOT_FOUND
    ]
