"""What brokers, producers and clocks do to a stream, one test for each fear (docs/testing.md numbers them).

The fears: an offset that somebody committed at the broker is believed; records that retention took before they were read are
skipped in silence; one broken record among many stops the line or is lost; a changed producer's values end up in the
wrong column; the order of arrival shows in the answer; a wild timestamp wins for ever; a clock that steps back stops
commits or turns their order; an open transaction shows, or what follows it; two servers that share a topic read a
record twice, or not at all.
"""

import json
import os
import random
import shutil
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient

from conftest import Store
from oracle import Oracle, same_rows
from support import flight as calls
from support.broker import Log
from support.ingest import wait_caught_up
from support.process import Server
from support.wait import until

pytestmark = pytest.mark.kafka

START = 1_700_000_000_000  # ms
HOUR = 3_600_000


def events(topic, name="events", table="", source="", dwell="int64"):
    """Every record of a topic, with where it came from; further settings of the table and of the source."""
    return f"""
[table]
name = "{name}"
entity = [{{ name = "user", type = "string" }}]
event_time = {{ name = "ts", type = "timestamp[ms, tz=UTC]" }}
history = "all"
{table}

[[feature]]
name = "dwell"
type = "{dwell}"

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
{source}
"""


def event(number, **other):
    return {"user": f"u{number % 50}", "ts": START + number, "dwell": number, **other}


def send(log, numbers, partitions=1, **other):
    for number in numbers:
        log.send(json.dumps(event(number, **other)).encode(), partition=number % partitions)
    log.flush()


def offsets(client, table="events"):
    """Where the rows came from: (partition, offset), sorted, each as often as it is there."""
    rows = calls.scan(client, table)
    return sorted(zip(rows["source_partition"].to_pylist(), rows["source_offset"].to_pylist()))


def every(log):
    """(partition, offset) of all that was sent."""
    return sorted((partition, offset) for partition, offset, *_ in log.in_order())


def letters(client, table="events"):
    """The dead letters: {(partition, offset): error}."""
    (result,) = calls.action(client, "dead_letters", table=table, limit=10_000)
    return {(letter["partition"], letter["offset"]): letter["error"] for letter in result["dead_letters"]}


def plain(table, times=("ts",)):
    """Rows as dicts, times as numbers."""
    for name in times:
        index = table.schema.get_field_index(name)
        table = table.set_column(index, name, table[name].cast("int64"))
    return table.to_pylist()


def source(client, topic):
    (result,) = calls.action(client, "source", action="list")
    return next((source for source in result["sources"] if source["topic"] == topic), None)


def why_stopped(client, topic):
    """The reason that the topic's source gives, once it has stopped."""
    state = source(client, topic)
    return state["reason"] if state is not None and state["state"] == "stopped" else None


# -- 18: what is committed at the broker does not count


@pytest.mark.parametrize("moved", ["to the start", "to the end"])
def test_offsets_that_somebody_commits_at_the_broker_are_ignored(store, kafka, serve, moved):
    topic = kafka.topic("groups", partitions=2)
    store.apply(events(topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    send(log, range(400), 2)
    wait_caught_up(server, client, "events", log)
    # Die with a commit in the log that no broker was told of.
    server.stop()
    server.start(env={"PINION_FAIL": "commit.appended=3"})
    for number in range(400, 4_000, 20):
        send(log, range(number, number + 20), 2)
        if server.wait_dead(0.01):
            break
    assert not server.alive(), "the fail point was never reached"
    send(log, range(10_000, 10_100), 2)

    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    groups = {group.group_id for group in admin.list_consumer_groups().result(30).valid}
    ours = {"pinion.default", "pinion.default.events"} | {group for group in groups if group.startswith("pinion")}
    for group in sorted(ours):
        there = [
            TopicPartition(topic, partition, 0 if moved == "to the start" else end)
            for partition, end in log.ends().items()
        ]
        for done in admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, there)]).values():
            done.result(30)

    server.start()
    client = calls.connect(server)
    wait_caught_up(server, client, "events", log)
    send(log, range(20_000, 20_100), 2)
    wait_caught_up(server, client, "events", log)
    assert offsets(client) == every(log)


# -- 20: offsets that are gone


def test_records_that_were_taken_before_they_were_read_stop_the_source(store, kafka, serve):
    topic = kafka.topic("retention", partitions=2)
    store.apply(events(topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    send(log, range(200), 2)
    wait_caught_up(server, client, "events", log)
    before = every(log)

    # What was read may go: reading goes on.
    server.stop()
    delete_below(kafka, topic, {0: 100, 1: 40})
    server.start()
    client = calls.connect(server)
    send(log, range(200, 300), 2)
    wait_caught_up(server, client, "events", log)
    assert offsets(client) == every(log)
    before = every(log)

    # What was not read may not.
    server.stop()
    send(log, range(300, 500), 2)
    delete_below(kafka, topic, {0: 200})
    server.start()
    client = calls.connect(server)
    reason = until(lambda: why_stopped(client, topic), what="the source stopping")
    for word in (topic, "150", "200"):
        assert word in reason, reason
    # Nothing of partition 0 was skipped over; what partition 1 still gave is no gap either.
    found = offsets(client)
    assert [row for row in found if row[0] == 0] == [row for row in before if row[0] == 0]
    ones = [offset for partition, offset in found if partition == 1]
    assert ones == list(range(len(ones))) and len(ones) >= 150

    # Resuming it does not make the records come back, and a restart does not forget.
    calls.action(client, "source", action="resume", topic=topic)
    time.sleep(0.5)
    assert until(lambda: why_stopped(client, topic), what="the source stopping again")
    server.stop()
    server.start()
    client = calls.connect(server)
    assert until(lambda: why_stopped(client, topic), what="the source stopping after a restart")
    assert [row for row in offsets(client) if row[0] == 0] == [row for row in before if row[0] == 0]


def delete_below(kafka, topic, ends):
    """Deletes the records below {partition: offset}."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    there = [TopicPartition(topic, partition, end) for partition, end in ends.items()]
    for done in admin.delete_records(there).values():
        done.result(30)


@pytest.mark.xfail(strict=True, reason="records of the new topic are taken for the old one's until the next look at its id")
def test_a_topic_made_again_while_it_is_read_stops_the_source(store, kafka, serve):
    topic = kafka.topic("again", partitions=1)
    store.apply(events(topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    send(log, range(100))
    wait_caught_up(server, client, "events", log)
    kafka.delete(topic)
    until(lambda: made_again(kafka, topic, 1), what="the topic being made again")
    # More than before: the old position would be in range.
    send(Log(kafka.producer(), topic), range(1_000, 1_300))
    reason = until(lambda: why_stopped(client, topic), 60, what="the source stopping")
    assert "re-created" in reason, reason
    assert offsets(client) == every(log)


def made_again(kafka, topic, partitions):
    try:
        kafka.create(topic, partitions)
        return True
    except Exception:  # the deletion is still under way
        return False


# -- 21: poison


def test_of_a_topic_with_broken_records_every_good_one_is_visible_and_every_bad_one_kept(store, kafka, serve):
    good, share = 20_000, 100
    topic = kafka.topic("poison", partitions=3, max_message_bytes=str(4 << 20))
    store.apply(events(topic, table='unknown_fields = "ignore"', source='key = "string"', dwell="int32"))
    generator = random.Random(21)
    whole = json.dumps(event(7)).encode()
    broken = {
        "no JSON": (b"{nothing: of the sort}", "JSON"),
        "cut short": (whole[:-9], "JSON"),
        "wrong type": (json.dumps({**event(7), "dwell": "five"}).encode(), "dwell"),
        "out of range": (json.dumps({**event(7), "dwell": 2**40}).encode(), "dwell"),
        "unknown magic byte": (b"\x7f\x00\x00\x00\x09" + whole, "JSON"),
        "not UTF-8": (b'{"user": "\xff\xfe", "ts": 1, "dwell": 1}', "JSON"),
        "null key": (json.dumps({**event(7), "user": None}).encode(), "user"),
        "oversize": (json.dumps({**event(7), "text": "x" * (1 << 20)}).encode(), "bytes"),
    }
    log = Log(kafka.producer(**{"message.max.bytes": 4 << 20}), topic)
    oracle = Oracle(["user"], "ts", history="all")
    bad = {}
    deletes = 0
    kinds = [kind for kind in broken for _ in range(good // share // len(broken))]
    at = set(generator.sample(range(good), len(kinds)))
    generator.shuffle(kinds)
    for number in range(good):
        if number in at:
            kind = kinds.pop()
            value = broken[kind][0]
            log.send(value, key=kind.encode(), partition=number % 3)
        if number % 500 == 499:
            # No value is no broken record: it deletes its key.
            log.send(None, key=f"u{number % 50}".encode(), partition=number % 3, timestamp_millis=START + number)
            deletes += 1
        log.send(json.dumps(event(number)).encode(), key=f"u{number % 50}".encode(), partition=number % 3)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_caught_up(server, client, "events", log, 120)

    for partition, offset, key, value, timestamp in log.in_order():
        if key.decode() in broken:
            bad[partition, offset] = key.decode()
        elif value is None:
            oracle.delete((key.decode(),), timestamp)
        else:
            oracle.upsert({**json.loads(value), "source_partition": partition, "source_offset": offset})
    assert len(bad) == 200 and deletes == 40
    same_rows(plain(calls.scan(client, "events")), oracle.rows())
    found = letters(client)
    assert sorted(found) == sorted(bad)
    for where, kind in bad.items():
        assert broken[kind][1] in found[where], (kind, found[where])
    # A letter is the record, byte for byte.
    (result,) = calls.action(client, "dead_letters", table="events", limit=10_000)
    for letter in result["dead_letters"]:
        kind = bad[letter["partition"], letter["offset"]]
        value = letter["value"]
        assert letter["topic"] == topic and letter["key"] == kind
        if isinstance(value, str):
            assert value.encode() == broken[kind][0]
    server.kill()
    server.start()
    client = calls.connect(server)
    assert letters(client) == found


# -- 23: producers that change


def test_new_fields_wait_for_apply_and_incompatible_values_are_named(store, kafka, serve):
    topic = kafka.topic("drift", partitions=1)
    store.apply(events(topic, dwell="int32"))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    # A producer that is ahead: a field that the table does not have yet, and numbers that do not fit yet.
    send(log, range(10))
    send(log, range(10, 20), country="fi")
    log.send(json.dumps(event(20, dwell=2**40)).encode(), partition=0)
    wait_caught_up(server, client, "events", log)
    assert offsets(client) == [(0, offset) for offset in range(20)]
    assert "country" not in calls.scan(client, "events").schema.names
    assert list(letters(client)) == [(0, 20)]
    assert "dwell" in letters(client)[0, 20], letters(client)

    added = events(topic, dwell="int64").replace(
        '[source.kafka]', '[[feature]]\nname = "country"\ntype = "string"\n\n[source.kafka]'
    )
    calls.action(client, "apply", definitions=[added])
    send(log, range(21, 30), country="se")
    log.send(json.dumps(event(30, dwell=2**40, country=None)).encode(), partition=0)
    # One that is behind: without the field.
    send(log, range(31, 35))
    # And one that is wrong.
    log.send(json.dumps(event(35, country={"name": "no"})).encode(), partition=0)
    log.send(json.dumps(event(36, dwell=1.5)).encode(), partition=0)
    log.send(json.dumps(event(37, dwell="37")).encode(), partition=0)
    log.send(json.dumps(event(38, country="dk")).encode(), partition=0)
    wait_caught_up(server, client, "events", log)
    rows = {row["source_offset"]: row for row in plain(calls.scan(client, "events"))}
    assert sorted(rows) == [offset for offset in range(39) if offset not in (20, 35, 36, 37)]
    for offset, row in rows.items():
        assert row["dwell"] == (2**40 if offset == 30 else offset)
        assert row["country"] == ("se" if 21 <= offset < 30 else "dk" if offset == 38 else None), row
    refused = letters(client)
    assert sorted(refused) == [(0, 20), (0, 35), (0, 36), (0, 37)]
    assert "country" in refused[0, 35] and "dwell" in refused[0, 36] and "dwell" in refused[0, 37], refused

    # A type that would narrow is refused, by its name, and nothing stops.
    with pytest.raises(pa.ArrowInvalid, match="dwell"):
        calls.action(client, "apply", definitions=[added.replace('"int64"', '"int16"', 1)])
    send(log, range(39, 45), country="is")
    wait_caught_up(server, client, "events", log)
    assert len(offsets(client)) == 45 - 4


def test_a_table_that_refuses_unknown_fields_names_them(store, kafka, serve):
    topic = kafka.topic("strict", partitions=1)
    store.apply(events(topic, table='unknown_fields = "refuse"'))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    send(log, range(3))
    send(log, [3], contry="fi")
    send(log, [4])
    wait_caught_up(server, client, "events", log)
    assert offsets(client) == [(0, 0), (0, 1), (0, 2), (0, 4)]
    assert "contry" in letters(client)[0, 3]


# -- 24: any order of arrival


def arrivals(topic, name, history):
    return f"""
[table]
name = "{name}"
entity = [{{ name = "user", type = "string" }}]
event_time = {{ name = "ts", type = "timestamp[ms, tz=UTC]" }}
history = "{history}"

[features]
dwell = "int64"

[source.kafka]
topic = "{topic}"
format = "json"
key = "string"
"""


def test_the_order_of_arrival_does_not_show(store, kafka, serve):
    """The same events in several orders, over three partitions, some twice, some deletes: one answer."""
    seed = int(os.environ.get("PINION_TEST_SEED", time.time_ns() % 2**32))
    print(f"PINION_TEST_SEED={seed}")
    generator = random.Random(seed)
    users = [f"u{n}" for n in range(40)]
    # No two different events of a user have one time: of those the later commit wins, by promise.
    facts = []
    for user in users:
        for ts in generator.sample(range(1_000), generator.randrange(1, 30)):
            deletes = generator.random() < 0.15
            facts.append((user, START + ts, None if deletes else generator.randrange(2**60)))
    oracle = Oracle(["user"], "ts", history="all")
    for user, ts, dwell in sorted(facts, key=lambda fact: fact[1]):
        if dwell is None:
            oracle.delete((user,), ts)
        else:
            oracle.upsert({"user": user, "ts": ts, "dwell": dwell})
    twice = generator.sample(facts, len(facts) // 5)

    orders = 5
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    logs = []
    for order in range(orders):
        topic = kafka.topic(f"order{order}", partitions=3)
        definitions = [arrivals(topic, f"latest{order}", "latest"), arrivals(topic, f"all{order}", "all")]
        calls.action(client, "apply", definitions=definitions)
        log = Log(kafka.producer(), topic)
        arriving = facts + twice
        if order == 0:
            arriving.sort(key=lambda fact: fact[1])
        elif order == 1:
            arriving.sort(key=lambda fact: -fact[1])
        else:
            generator.shuffle(arriving)
        for number, (user, ts, dwell) in enumerate(arriving):
            value = None if dwell is None else json.dumps({"user": user, "ts": ts, "dwell": dwell}).encode()
            log.send(value, key=user.encode(), partition=generator.randrange(3), timestamp_millis=ts)
            if number % 200 == 199 and order % 2 == 0:
                # In several batches: what comes later also meets what is stored.
                log.flush()
                time.sleep(0.02)
        logs.append(log)

    keys = [(user,) for user in [*users, "nobody"]]
    for order, log in enumerate(logs):
        for table in (f"latest{order}", f"all{order}"):
            wait_caught_up(server, client, table, log)
        for stage in ("log", "merged"):
            if stage == "merged":
                for table in (f"latest{order}", f"all{order}"):
                    calls.action(client, "flush", table=table)
                    calls.action(client, "merge", table=table)
            same_rows(plain(calls.scan(client, f"latest{order}")), oracle.latest())
            rows = {(row["user"], row["ts"]): row["dwell"] for row in plain(calls.scan(client, f"all{order}"))}
            assert rows == {(row["user"], row["ts"]): row["dwell"] for row in oracle.rows()}, (order, stage)
            for at in (None, *(START + n for n in range(-1, 1_001, 143))):
                as_of = {} if at is None else {"as_of": moment(at)}
                values, statuses = oracle.lookup(keys, ["dwell"], as_of=at)["dwell"]
                for table in [f"all{order}"] + ([f"latest{order}"] if at is None else []):
                    reply = calls.lookup(
                        client, [f"{table}:dwell"], {"user": [key for (key,) in keys]}, status=True, **as_of
                    )
                    assert reply["dwell"].to_pylist() == values, (order, stage, table, at)
                    assert reply["dwell__status"].to_pylist() == statuses, (order, stage, table, at)


def moment(millis):
    return datetime.fromtimestamp(millis / 1000, UTC).isoformat(timespec="milliseconds")


def test_rows_later_than_the_bound_are_dead_letters_whatever_came_with_them(store, kafka, serve):
    topic = kafka.topic("late", partitions=1)
    store.apply(events(topic, table='late_bound = "1h"'))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)

    def at(millis):
        log.send(json.dumps({"user": "a", "ts": START + millis, "dwell": millis}).encode(), partition=0)

    at(0)
    at(2 * HOUR)
    log.flush()
    wait_caught_up(server, client, "events", log)
    at(HOUR)  # just inside
    at(HOUR - 1)  # just outside
    at(3 * HOUR)
    at(-HOUR)
    at(2 * HOUR)
    wait_caught_up(server, client, "events", log)
    refused = letters(client)
    assert sorted(refused) == [(0, 3), (0, 5)], refused
    assert all("late" in reason for reason in refused.values()), refused
    assert offsets(client) == [(0, 0), (0, 1), (0, 2), (0, 4), (0, 6)]


# -- 25: wild times, keys and clocks


def test_wild_times_and_keys_are_refused_with_the_reason(store, kafka, serve):
    topic = kafka.topic("wild", partitions=1)
    number = '[[feature]]\nname = "score"\ntype = "float64"\n\n[source.kafka]'
    store.apply(events(topic).replace("[source.kafka]", number))
    now = time.time_ns() // 1_000_000
    good = {"user": "a", "ts": now, "dwell": 1}

    def text(**changed):
        return json.dumps({**good, **changed}).encode()

    script = [
        (text(), None),
        (text(ts=now + HOUR // 2), None),
        (text(ts=now + 2 * HOUR), "future"),
        (text(ts=2**63 - 1), "ts|future"),
        (text(ts=2**63), "ts"),
        (text(ts=-(2**63) - 1), "ts"),
        (text(ts=1.5), "ts"),
        (text(ts="soon"), "ts"),
        (text(ts=None), "ts"),
        (text(user=None), "user"),
        (text(user=5), "user"),
        (b'{"user": "a", "ts": NaN, "dwell": 1}', "JSON"),
        (b'{"user": "a", "ts": %d, "dwell": 1, "score": NaN}' % now, "JSON"),
        (b'{"user": "a", "ts": %d, "dwell": 1, "score": 1e999}' % now, "score|JSON|range"),
        (b'{"user": "a", "ts": %d, "dwell": 1, "score": "NaN"}' % now, "score"),
        (b'{"ts": %d, "dwell": 1}' % now, "user"),
        (b'{"user": "a", "dwell": 1}', "ts"),
        (b'[{"user": "a", "ts": 1}]', "object"),
        (b'""', "object"),
        (b"", "JSON"),
        (text(ts=now + 1), None),
    ]
    log = Log(kafka.producer(), topic)
    for value, _ in script:
        log.send(value, partition=0)
    # The least time there is: as far as it is a time, it is an old row, and wins over nothing.
    log.send(text(user="old", ts=-(2**63)), partition=0)
    log.send(text(user="old", ts=now), partition=0)
    # No value and no key: there is nothing to delete.
    log.send(None, partition=0)
    # A key that is no UTF-8 text.
    log.send(None, key=b"\xff\xfe", partition=0)
    log.send(text(ts=now + 2), partition=0)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_caught_up(server, client, "events", log)
    refused = letters(client)
    for offset, (value, words) in enumerate(script):
        reason = refused.get((0, offset))
        if words is None:
            assert reason is None, (value, reason)
        else:
            assert reason is not None, f"{value!r} was taken"
            assert any(word in reason for word in words.split("|")), (value, reason)
    assert "key" in refused[0, len(script) + 2] and "key" in refused[0, len(script) + 3], refused
    assert (0, len(script) + 1) not in refused and (0, len(script) + 4) not in refused
    reply = calls.lookup(client, ["events:dwell"], {"user": ["a", "old"]}, event_time=True)
    times = reply["dwell__event_time"].cast("int64").to_pylist()
    assert times == [now + HOUR // 2, now], "a refused time won"


@pytest.mark.xfail(strict=True, reason="the table's own max_future is judged too: a source cannot be more patient")
def test_a_source_may_be_more_patient_than_its_table(store, kafka, serve):
    topic = kafka.topic("patient", partitions=1)
    store.apply(events(topic, source='max_future = "1d"'))
    now = time.time_ns() // 1_000_000
    log = Log(kafka.producer(), topic)
    for ts in (now + 2 * HOUR, now + 23 * HOUR, now + 25 * HOUR):
        log.send(json.dumps({"user": "a", "ts": ts, "dwell": 1}).encode(), partition=0)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_caught_up(server, client, "events", log)
    assert offsets(client) == [(0, 0), (0, 1)]
    assert "max_future" in letters(client)[0, 2]


def test_record_timestamps_of_any_kind_are_taken_or_refused(store, kafka, serve):
    """The event time is the record's timestamp, which producers set as they like."""
    limits = {"message_timestamp_before_max_ms": str(2**63 - 1), "message_timestamp_after_max_ms": str(2**63 - 1)}
    topic = kafka.topic("stamped", partitions=1, **limits)
    store.apply(
        events(topic).replace(
            'name = "ts", type = "timestamp[ms, tz=UTC]"', 'name = "ts", type = "timestamp[ns, tz=UTC]", from = "$timestamp"'
        )
    )
    now = time.time_ns() // 1_000_000
    log = Log(kafka.producer(), topic)
    value = json.dumps({"user": "a", "dwell": 1}).encode()
    stamps = [1, now - HOUR, now + HOUR // 2, now + 2 * HOUR, 2**62, 9_223_372_036_854, now]
    for stamp in stamps:
        log.send(value, partition=0, timestamp_millis=stamp)
    # Deletes take the record's timestamp too: one far ahead would hide its key for ever.
    log.send(None, key=b'"a"', partition=0, timestamp_millis=now + 2 * HOUR)
    log.send(None, key=b'"a"', partition=0, timestamp_millis=2**62)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_caught_up(server, client, "events", log)
    refused = letters(client)
    assert sorted(offset for _, offset in refused) == [3, 4, 5, 7, 8], refused
    reply = calls.lookup(client, ["events:dwell"], {"user": ["a"]}, event_time=True)
    assert reply["dwell__event_time"].cast("int64").to_pylist() == [(now + HOUR // 2) * 1_000_000]


@pytest.fixture
def shifted_clock(tmp_path):
    """(environment for a server, function that moves its wall clock by so many seconds)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("a clock that can be moved needs a C compiler; a time namespace moves other clocks only")
    library = tmp_path / "shifted_clock.so"
    text = Path(__file__).parent / "support" / "shifted_clock.c"
    built = subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, text], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    shift = tmp_path / "shift"

    def move(seconds):
        # In one step: a reader sees the old or the new.
        fresh = tmp_path / "shift.new"
        fresh.write_text(str(seconds))
        fresh.rename(shift)

    move(0)
    return {"LD_PRELOAD": str(library), "SHIFTED_CLOCK_FILE": str(shift)}, move


def test_a_clock_that_steps_back_changes_no_order_and_stops_nothing(store, kafka, serve, shifted_clock):
    environment, move = shifted_clock
    topic = kafka.topic("clock", partitions=1)
    timeless = f"""
[table]
name = "timeless"
entity = [{{ name = "user", type = "string" }}]
history = "latest"

[features]
dwell = "int64"

[source.kafka]
topic = "{topic}"
format = "json"
"""
    store.apply(timeless, events(topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap, env=environment)
    client = calls.connect(server)
    day = 86_400
    now = time.time_ns() // 1_000_000
    sent = 0

    def step(shift, ts, kept):
        """Moves the clock, sends one row for the key, and reads it back through a barrier."""
        nonlocal sent
        move(shift)
        log.send(json.dumps({"user": "a", "ts": ts, "dwell": sent}).encode(), partition=0)
        log.flush()
        barrier = {"at_least": {topic: {"0": sent}}, "timeout_ms": 10_000}
        assert calls.lookup(client, ["timeless:dwell"], {"user": ["a"]}, **barrier)["dwell"].to_pylist() == [sent]
        calls.scan(client, "events", limit=1, **barrier)
        assert ((0, sent) in offsets(client)) == kept, f"row {sent} at {ts}, clock moved by {shift} s: {letters(client)}"
        sent += 1

    step(0, now, True)
    step(2 * day, now + 36 * HOUR, True)  # the clock is ahead: so may the row be
    step(2 * day, now + 72 * HOUR, False)
    step(-2 * day, now - 48 * HOUR, True)  # and back by four days: only what is ahead of it is refused
    step(-2 * day, now, False)
    step(-400 * day, now - 300 * day * 1_000, False)
    step(-400 * day, START, True)
    step(0, now + 1, True)
    # Through merges and a restart under the earlier clock the newest commit still wins.
    move(-3 * day)
    for table in ("timeless", "events"):
        calls.action(client, "flush", table=table)
        calls.action(client, "merge", table=table)
    server.kill()
    server.start()
    client = calls.connect(server)
    step(-3 * day, now - 96 * HOUR, True)
    wait = {"at_least": {topic: {"0": 10_000}}, "timeout_ms": 300}
    began = time.monotonic()
    with pytest.raises(pa.ArrowException):
        calls.scan(client, "events", **wait)
    assert 0.25 < time.monotonic() - began < 5, "a timeout is no matter of the wall clock"
    last = calls.lookup(client, ["events:dwell"], {"user": ["a"]}, event_time=True)
    assert last["dwell__event_time"].cast("int64").to_pylist() == [now + 36 * HOUR]


# -- 26: transactions


def test_an_open_transaction_and_what_follows_it_shows_only_once_it_ends(store, kafka, serve):
    topic = kafka.topic("open", partitions=2)
    store.apply(events(topic))
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    producer = kafka.producer(**{"transactional.id": f"open-{topic}", "linger.ms": 0})
    producer.init_transactions(30)
    beside = Log(kafka.producer(), topic)
    expected = []
    end = {0: 0, 1: 0}
    for number, commits in enumerate([True, False, True, True, False, False]):
        producer.begin_transaction()
        for n in range(5):
            producer.produce(topic, json.dumps(event(n)).encode(), partition=0)
        assert producer.flush(30) == 0
        # Behind it in its partition, and in another one.
        for n in range(3):
            beside.send(json.dumps(event(n)).encode(), partition=0)
            beside.send(json.dumps(event(n)).encode(), partition=1)
        beside.flush()
        other = calls.scan(client, "events", at_least={topic: {"1": end[1] + 2}}, timeout_ms=10_000)
        time.sleep(0.1)
        _, reached = calls.scan_with_positions(client, "events")
        assert reached[topic].get(0, 0) <= end[0], "a position past the start of an open transaction"
        assert sorted(other.filter(pa.compute.equal(other["source_partition"], 0))["source_offset"].to_pylist()) == expected
        if commits:
            producer.commit_transaction(30)
            expected += range(end[0], end[0] + 5)
        else:
            producer.abort_transaction(30)
        expected += range(end[0] + 5, end[0] + 8)
        end[0] += 9  # five records, three beside them, the marker
        end[1] += 3
        # The marker comes last: a barrier on it is met, and the position is the end.
        barrier = {"at_least": {topic: {"0": end[0] - 1}}, "timeout_ms": 10_000}
        rows, reached = calls.scan_with_positions(client, "events", **barrier)
        assert reached[topic][0] == end[0], (number, reached)
        rows = rows.filter(pa.compute.equal(rows["source_partition"], 0))
        assert sorted(rows["source_offset"].to_pylist()) == expected
    until(lambda: source(client, topic)["lag"] == 0, what="the lag returning to 0")
    server.kill()
    server.start()
    client = calls.connect(server)
    _, reached = calls.scan_with_positions(client, "events", at_least={topic: {"0": end[0] - 1}}, timeout_ms=10_000)
    assert reached[topic] == end


# -- two servers, one topic


class Steady(threading.Thread):
    """Produces to all partitions until told to stop."""

    def __init__(self, log, partitions):
        super().__init__(daemon=True)
        self.log, self.partitions = log, partitions
        self.stopping = threading.Event()

    def run(self):
        number = 0
        while not self.stopping.wait(0.01):
            for _ in range(20):
                self.log.send(json.dumps(event(number)).encode(), partition=number % self.partitions)
                number += 1

    def stop(self):
        self.stopping.set()
        self.join(30)
        self.log.flush()


def test_of_two_servers_that_share_a_topic_one_may_die_and_come_back(tmp_path, kafka):
    topic = kafka.topic("shared", partitions=4)
    shares = {"one": [0, 1], "two": [2, 3]}
    stores = {}
    for name, partitions in shares.items():
        (tmp_path / name).mkdir()
        stores[name] = Store(tmp_path / name)
        stores[name].apply(events(topic, source=f"partitions = {partitions}"))
    log = Log(kafka.producer(), topic)
    steady = Steady(log, 4)
    options = {"brokers": kafka.bootstrap}
    with (
        Server(stores["one"].data, **options, env={"PINION__KAFKA__INSTANCE": "one"}) as one,
        Server(stores["two"].data, **options, env={"PINION__KAFKA__INSTANCE": "two"}) as two,
    ):
        client = calls.connect(one)
        steady.start()
        try:
            for _ in range(3):
                time.sleep(0.5)
                two.kill()
                # The other goes on with all of its share, while nobody reads the rest.
                time.sleep(0.3)
                ends = log.ends()
                until(lambda: reads_to(client, topic, {p: ends[p] for p in shares["one"]}), what="the other going on")
                two.start()
        finally:
            steady.stop()
        clients = {"one": client, "two": calls.connect(two)}
        ends = log.ends()
        found = []
        for name, partitions in shares.items():
            share = {p: ends[p] for p in partitions}
            until(lambda: reads_to(clients[name], topic, share), what=f"{name} reading {share}")
            _, reached = calls.scan_with_positions(clients[name], "events", limit=1)
            assert sorted(reached[topic]) == partitions, "a share is what the list says"
            found += offsets(clients[name])
        assert sorted(found) == every(log)
        assert len(found) > 1_000


def reads_to(client, topic, ends):
    _, reached = calls.scan_with_positions(client, "events", limit=1)
    return all(reached.get(topic, {}).get(partition, 0) >= end for partition, end in ends.items())
