"""Operating the sources: moving positions, lost records, dead letters and their way back.

The fears: a seek that the running source overwrites a moment later; records that are read again and counted twice;
a lost position that is set anew without a word; a pause that a restart forgets; bad records that nobody can look at,
that fill the disk, or that come back as two rows when they are replayed; copies of them that are lost.
"""

import json
import time

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from support import flight as calls
from support.broker import Log
from support.ingest import wait_caught_up
from support.process import CommandFailed, pinion, pinion_json
from support.wait import until

pytestmark = pytest.mark.kafka

START = 1_700_000_000_000  # ms


def definition(name, topic, history="latest", dwell="int64", source=""):
    return f"""
[table]
name = "{name}"
entity = [{{ name = "user", type = "string" }}]
event_time = {{ name = "ts", type = "timestamp[ms, tz=UTC]" }}
history = "{history}"

[features]
dwell = "{dwell}"

[source.kafka]
topic = "{topic}"
{source}
"""


def produce(log, first, count, partition=0):
    """One user each, so that a latest table has a row per event."""
    for n in range(first, first + count):
        value = {"user": f"u{n}", "ts": START + n, "dwell": n}
        log.send(json.dumps(value).encode(), key=f"k{n}".encode(), partition=partition)
    log.flush()


def dwells(client, table):
    return sorted(calls.scan(client, table)["dwell"].to_pylist())


def position(client, table, topic, partition=0):
    return calls.scan_with_positions(client, table, limit=1)[1].get(topic, {}).get(partition)


def source_of(server, table):
    """What `pinion source list` says of a table."""
    for source in pinion_json("source", "list", "--server", server.flight):
        for entry in source["tables"]:
            if entry["table"] == table:
                return source, entry
    return None, None


def wait_state(server, table, state, seconds=30):
    """Waits for a table's state; gives its reason."""

    def reached():
        _, entry = source_of(server, table)
        return entry if entry and entry["state"] == state else None

    return until(reached, seconds, f"{table} being {state}").get("reason", "")


def source(server, *arguments, **options):
    return pinion("source", *arguments, "--server", server.flight, **options)


def letters(server, *arguments, **options):
    return pinion("dead-letters", *arguments, "--server", server.flight, **options)


def letters_json(server, table, limit=10_000):
    return pinion_json("dead-letters", "list", table, "--limit", limit, "--server", server.flight)


def test_a_seek_back_and_forth_takes_effect_while_the_table_is_read(store, kafka, serve):
    topic = kafka.topic("seek", partitions=1)
    store.apply(definition("latest", topic), definition("history", topic, history="all"))
    log = Log(kafka.producer(), topic)
    produce(log, 0, 100)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    for table in ("latest", "history"):
        wait_caught_up(server, client, table, log)

    # Forward: records in between are never read, by that table only.
    source(server, "pause", "--table", "latest")
    produce(log, 100, 100)
    wait_caught_up(server, client, "history", log)
    assert position(client, "latest", topic) == 100
    said = source(server, "seek", "latest", "--topic", topic, "--partition", 0, "--offset", 150).stdout
    assert "from 150 (was: 100)" in said, said
    source(server, "resume", "--table", "latest")
    wait_caught_up(server, client, "latest", log)
    assert dwells(client, "latest") == [*range(100), *range(150, 200)]
    assert dwells(client, "history") == list(range(200))

    # Back: what was left out comes, what was there stays once.
    before = source_of(server, "latest")[1]["rows"]
    said = source(server, "replay", "latest", "--from", "earliest").stdout
    assert "from 0 (was: 200)" in said, said
    until(lambda: source_of(server, "latest")[1]["rows"] == before + 200, what="200 records read again")
    assert dwells(client, "latest") == list(range(200))
    assert dwells(client, "history") == list(range(200))
    assert position(client, "latest", topic) == 200

    # A history table would hold them twice: only if that is said.
    with pytest.raises(CommandFailed, match="--allow-duplicates"):
        source(server, "replay", "history", "--from", "190", "--partition", 0)
    assert position(client, "history", topic) == 200
    source(server, "replay", "history", "--from", "190", "--partition", 0, "--allow-duplicates")
    until(lambda: len(dwells(client, "history")) == 210, what="ten versions twice")

    # Places that do not exist, and a restart keeps what a seek did.
    with pytest.raises(CommandFailed, match="does not exist"):
        source(server, "seek", "latest", "--partition", 0, "--offset", 999)
    with pytest.raises(CommandFailed, match="does not read topic"):
        source(server, "seek", "latest", "--topic", "other", "--latest")
    source(server, "pause", topic)
    source(server, "seek", "latest", "--timestamp", "1970-01-01T00:00:00Z")
    assert position(client, "latest", topic) == 0
    server.kill()
    server.start()
    client = calls.connect(server)
    assert position(client, "latest", topic) == 0
    wait_state(server, "latest", "paused")
    source(server, "resume", topic)
    wait_caught_up(server, client, "latest", log)
    assert dwells(client, "latest") == list(range(200))


def test_seeks_in_the_middle_of_the_stream_lose_and_double_nothing(store, kafka, serve):
    topic = kafka.topic("seeks", partitions=2)
    store.apply(definition("latest", topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    produced = 0
    for _ in range(6):
        for partition in (0, 1):
            produce(log, produced, 2_000, partition)
            produced += 2_000
        calls.action(client, "source", action="seek", table="latest", to="earliest")
    wait_caught_up(server, client, "latest", log)
    assert dwells(client, "latest") == list(range(produced))


def test_a_pause_outlives_a_restart_until_it_is_resumed(store, kafka, serve):
    topic = kafka.topic("pause", partitions=1)
    store.apply(definition("clicks", topic))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    produce(log, 0, 10)
    wait_caught_up(server, client, "clicks", log)
    source(server, "pause", topic)
    server.stop()
    produce(log, 10, 10)
    server.start()
    client = calls.connect(server)
    wait_state(server, "clicks", "paused")
    time.sleep(1)
    assert position(client, "clicks", topic) == 10
    source(server, "resume", topic)
    wait_caught_up(server, client, "clicks", log)
    with pytest.raises(CommandFailed, match="no table reads topic"):
        source(server, "pause", "no-such-topic")


def recreate(kafka, topic, partitions):
    kafka.delete(topic)

    def made():
        try:
            kafka.create(topic, partitions)
            return True
        except Exception:  # the deletion is still under way
            return False

    until(made, what="the topic being made again")


def test_after_a_topic_was_made_again_a_seek_reads_the_new_one(store, kafka, serve):
    topic = kafka.topic("again", partitions=2)
    store.apply(
        definition("stops", topic),
        definition("goes_on", topic, source='on_lost = "earliest"'),
    )
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    produce(log, 0, 50)
    wait_caught_up(server, client, "stops", log)
    wait_caught_up(server, client, "goes_on", log)
    server.stop()
    recreate(kafka, topic, 2)
    new = Log(kafka.producer(), topic)
    produce(new, 50, 60)
    server.start()
    client = calls.connect(server)
    reason = wait_state(server, "stops", "stopped")
    assert "re-created" in reason and "pinion source seek stops" in reason, reason
    # The other table's policy lets it go on, and says so.
    wait_caught_up(server, client, "goes_on", new)
    assert dwells(client, "goes_on") == list(range(110))
    assert source_of(server, "goes_on")[1]["resets"] == 1
    assert "set to the earliest by on_lost" in server.log_text(20_000)
    assert dwells(client, "stops") == list(range(50)), "nothing of the new topic came in by itself"
    with pytest.raises(CommandFailed, match="all partitions"):
        source(server, "seek", "stops", "--partition", 0, "--offset", 0)
    source(server, "seek", "stops", "--earliest")
    wait_caught_up(server, client, "stops", new)
    assert dwells(client, "stops") == list(range(110))
    wait_state(server, "stops", "running")


def test_records_removed_before_they_were_read_stop_the_table_until_a_seek(store, kafka, serve):
    topic = kafka.topic("removed", partitions=1)
    store.apply(definition("stops", topic), definition("latest", topic, source='on_lost = "latest"'))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    produce(log, 0, 10)
    for table in ("stops", "latest"):
        wait_caught_up(server, client, table, log)
    server.stop()
    produce(log, 10, 30)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    for done in admin.delete_records([TopicPartition(topic, 0, 25)]).values():
        done.result(30)
    server.start()
    client = calls.connect(server)
    reason = wait_state(server, "stops", "stopped")
    assert f"offset 10 of {topic} partition 0, is gone" in reason and "starts at 25" in reason, reason
    until(lambda: position(client, "latest", topic) == 40, what="the other table going to the end")
    assert dwells(client, "latest") == list(range(10))
    produce(log, 40, 5)
    wait_caught_up(server, client, "latest", log)
    assert dwells(client, "latest") == [*range(10), *range(40, 45)]
    assert position(client, "stops", topic) == 10, "never set anew in silence"
    source(server, "seek", "stops", "--earliest")
    wait_caught_up(server, client, "stops", log)
    assert dwells(client, "stops") == [*range(10), *range(25, 45)]


def poison(n):
    """Eight kinds of records that no row can be made of."""
    good = {"user": f"p{n}", "ts": START + n, "dwell": n}
    kinds = [
        b"{cut off",
        b"",
        b"\xff\xfe\x00",
        json.dumps([good]).encode(),
        json.dumps({**good, "dwell": n + 0.5}).encode(),
        json.dumps({**good, "ts": "yesterday"}).encode(),
        json.dumps({"ts": START, "dwell": 1}).encode(),
        json.dumps({**good, "ts": 2**62}).encode(),
    ]
    return kinds[n % len(kinds)]


# The kind that a wider definition reads: dwell with a fraction.
REPAIRED = 4


def test_one_percent_poison_all_good_rows_and_every_bad_one_with_its_reason_and_back(store, kafka, serve):
    topic = kafka.topic("poison", partitions=2)
    table = definition("clicks", topic, history="all")
    store.apply(table)
    log = Log(kafka.producer(), topic)
    total, bad = 8_000, []
    for n in range(total):
        partition = n % 2
        if n % 100 == 7:
            number = n // 100
            bad.append(number)
            log.send(poison(number), key=f"k{n}".encode(), partition=partition, headers=[("trace", b"\x01\xff")])
        else:
            value = {"user": f"u{n}", "ts": START + n, "dwell": n}
            log.send(json.dumps(value).encode(), partition=partition)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_caught_up(server, client, "clicks", log)
    good = [n for n in range(total) if n % 100 != 7]
    assert dwells(client, "clicks") == good

    found = letters_json(server, "clicks")
    assert len(found) == len(bad)
    errors = {letter["key"]: letter["error"] for letter in found}
    reasons = ["JSON", "JSON", "JSON", "", "dwell", "ts", "user", ""]
    for number in bad:
        error = errors[f"k{number * 100 + 7}"]
        assert error and reasons[number % 8] in error, (number % 8, error)
    assert all(letter["headers"] == [["trace", {"base64": "Af8="}]] for letter in found)
    one = found[-1]
    shown = letters(server, "show", "clicks", one["id"]).stdout
    assert one["error"] in shown and f"offset     {one['offset']}" in shown and "0x01ff" in shown, shown

    # Replayed by the definition that refused them, all fail again.
    said = letters(server, "replay", "clicks").stdout
    assert f"0 of {len(bad)} dead letters passed, {len(bad)} still fail" in said, said

    # dwell must be an int: no definition may change that. A column beside it may read the field.
    wider = table.replace('dwell = "int64"', 'dwell = "int64"\nseconds = "float64"').replace(
        "[source.kafka]", '[source.kafka]\nfields = { dwell = "whole", seconds = "dwell" }'
    )
    calls.action(client, "apply", definitions=[wider])
    repaired = [n for n in bad if n % 8 == REPAIRED]
    said = letters(server, "replay", "clicks").stdout
    assert f"{len(repaired)} of {len(bad)} dead letters passed" in said, said
    left = len(bad) - len(repaired)
    assert len(letters_json(server, "clicks")) == left
    rows = calls.scan(client, "clicks", features=["user", "seconds"])
    seconds = sorted(s for s in rows["seconds"].to_pylist() if s is not None)
    assert seconds == [n + 0.5 for n in repaired]

    # Settled is settled: after a crash, a flush and a merge, and a second replay.
    server.kill()
    server.start()
    client = calls.connect(server)
    assert len(letters_json(server, "clicks")) == left
    calls.action(client, "flush", table="clicks")
    calls.action(client, "merge", table="clicks")
    assert f"0 of {left} dead letters passed" in letters(server, "replay", "clicks").stdout
    assert len(calls.scan(client, "clicks")) == len(good) + len(repaired)

    # Without a server too, and given up at last.
    server.stop()
    assert len(pinion_json("dead-letters", "list", "clicks", "--limit", 1000, "--data", store.data)) == left
    assert f"0 of {left} dead letters passed" in store.run("dead-letters", "replay", "clicks").stdout
    said = store.run("dead-letters", "discard", "clicks", "--all").stdout
    assert said == f"discarded {left} dead letters\n"
    assert store.run("check").returncode == 0
    assert not list(store.data.rglob("*.dead"))


def test_too_many_bad_records_stop_the_table_and_the_rest_goes_on(store, kafka, serve):
    topic = kafka.topic("rate", partitions=1)
    limits = 'dead_letters = { max_rate = "5%" }'
    store.apply(definition("strict", topic, source=limits), definition("lenient", topic))
    log = Log(kafka.producer(), topic)
    produce(log, 0, 1_000)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    for table in ("strict", "lenient"):
        wait_caught_up(server, client, table, log)
    for _ in range(100):
        log.send(b"{broken", partition=0)
    produce(log, 1_000, 10)
    reason = wait_state(server, "strict", "stopped")
    assert "max_rate (5%)" in reason and "dead-letters list strict" in reason, reason
    wait_caught_up(server, client, "lenient", log)
    assert dwells(client, "lenient") == list(range(1_010))
    stopped_at = position(client, "strict", topic)
    assert 1_000 < stopped_at <= 1_110
    # A command to another table on the topic does not start it again.
    source(server, "seek", "lenient", "--earliest")
    wait_caught_up(server, client, "lenient", log)
    assert wait_state(server, "strict", "stopped") == reason
    assert position(client, "strict", topic) == stopped_at
    # What stopped it is there to be looked at, each once, and resuming goes on behind it.
    assert len(letters_json(server, "strict")) == min(stopped_at - 1_000, 100)
    source(server, "resume", "--table", "strict")
    until(lambda: position(client, "strict", topic) == 1_110, what="the rest being read")
    assert dwells(client, "strict") == list(range(1_010))
    assert len(letters_json(server, "strict")) == 100


def test_a_dead_letter_log_at_its_size_stops_the_table_before_it_grows(store, kafka, serve):
    topic = kafka.topic("size", partitions=1)
    store.apply(definition("clicks", topic, source='dead_letters = { max_bytes = "64 KiB" }'))
    log = Log(kafka.producer(), topic)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    for _ in range(100):
        log.send(b"x" * 1_000, partition=0)
        log.flush()
    produce(log, 0, 10)
    reason = wait_state(server, "clicks", "stopped")
    assert "max_bytes (64 KiB)" in reason, reason
    kept = len(letters_json(server, "clicks"))
    assert 0 < kept <= 64
    assert position(client, "clicks", topic) == kept, "nothing was passed over without a trace"
    letters(server, "discard", "clicks", "--all")
    source(server, "resume", topic)
    until(
        lambda: position(client, "clicks", topic) == 110 or source_of(server, "clicks")[1]["state"] == "stopped",
        what="reading on",
    )
    if position(client, "clicks", topic) != 110:
        letters(server, "discard", "clicks", "--all")
        source(server, "resume", topic)
    wait_caught_up(server, client, "clicks", log)
    assert dwells(client, "clicks") == list(range(10))


def copies(kafka, topic, count):
    """The records of a topic, once there are so many."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": f"test-{topic}"})
    consumer.assign([TopicPartition(topic, 0, 0)])
    found = []
    deadline = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} copies in {topic}"
        message = consumer.poll(0.5)
        if message is not None and message.error() is None:
            found.append(message)
    consumer.close()
    return found


def test_dead_letters_are_copied_to_a_topic_at_least_once_and_never_hold_up_the_table(store, kafka, serve):
    topic = kafka.topic("copied", partitions=1)
    dead = f"{topic}-dead"
    store.apply(definition("clicks", topic, source=f'dead_letter_topic = "{dead}"'))
    log = Log(kafka.producer(), topic)
    for n in range(300):
        log.send(f"{{broken {n}".encode(), key=f"k{n}".encode(), partition=0, timestamp_millis=START + n)
    produce(log, 0, 10)
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    # The topic is not there yet: the table reads on, the copies wait.
    wait_caught_up(server, client, "clicks", log)
    assert dwells(client, "clicks") == list(range(10))
    assert source_of(server, "clicks")[1]["forwarding"]["waiting"] == 300
    kafka.create(dead, 1)
    first = copies(kafka, dead, 300)
    by_offset = {}
    for message in first:
        headers = dict(message.headers())
        by_offset.setdefault(int(headers["pinion.offset"]), message)
        assert headers["pinion.topic"] == topic.encode() and headers["pinion.partition"] == b"0"
        assert headers["pinion.table"] == b"clicks" and b"JSON" in headers["pinion.error"]
    assert sorted(by_offset) == list(range(300))
    assert by_offset[7].value() == b"{broken 7" and by_offset[7].key() == b"k7"
    assert by_offset[7].timestamp()[1] == START + 7
    until(lambda: source_of(server, "clicks")[1]["forwarding"]["waiting"] == 0, what="the mark")

    # A restart goes on behind the mark.
    server.stop()
    server.start()
    client = calls.connect(server)
    log.send(b"{one more", partition=0)
    log.flush()
    again = copies(kafka, dead, 301)
    offsets = [int(dict(m.headers())["pinion.offset"]) for m in again]
    assert offsets[-1] == 310 and len(offsets) == len(first) + 1


def test_a_dead_letter_too_large_for_its_topic_is_copied_without_its_value(store, kafka, serve):
    topic = kafka.topic("large", partitions=1)
    dead = kafka.topic("small", partitions=1, max_message_bytes="20000")
    store.apply(definition("clicks", topic, source=f'dead_letter_topic = "{dead}"'))
    log = Log(kafka.producer(), topic)
    sizes = [10, 10, 100_000, 10, 100_000, 9_000, 9_000, 9_000, 10]
    for n, size in enumerate(sizes):
        log.send(b"{" * size, key=f"k{n}".encode(), partition=0, headers=[("kind", b"broken")])
    log.flush()
    server = serve(brokers=kafka.bootstrap)
    wait_caught_up(server, calls.connect(server), "clicks", log)
    until(lambda: source_of(server, "clicks")[1]["forwarding"]["waiting"] == 0, what="every letter being copied")
    found = {}
    for message in copies(kafka, dead, len(sizes)):
        found[int(dict(message.headers())["pinion.offset"])] = message
    for n, size in enumerate(sizes):
        message, headers = found[n], dict(found[n].headers())
        assert message.key() == f"k{n}".encode() and b"JSON" in headers["pinion.error"]
        if size < 20_000:
            assert message.value() == b"{" * size and headers["kind"] == b"broken" and "pinion.cut" not in headers
        else:
            assert message.value() is None and headers["pinion.cut"] == str(size).encode() and "kind" not in headers


def test_monitors_see_the_positions_as_a_groups_offsets(store, kafka, serve):
    topic = kafka.topic("monitored", partitions=2)
    store.apply(definition("clicks", topic))
    log = Log(kafka.producer(), topic)
    produce(log, 0, 30, partition=0)
    produce(log, 30, 12, partition=1)
    serve(brokers=kafka.bootstrap, env={"PINION__KAFKA__INSTANCE": "blue", "PINION__KAFKA__MONITORS": "true"})
    monitor = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": "pinion.blue.clicks"})

    def seen():
        wanted = [TopicPartition(topic, 0), TopicPartition(topic, 1)]
        try:
            return [p.offset for p in monitor.committed(wanted, timeout=10)] == [30, 12]
        except KafkaException as error:
            # A young broker has no coordinator yet.
            assert error.args[0].code() == KafkaError.NOT_COORDINATOR, error
            return False

    until(seen, 30, "offsets of the group")
    monitor.close()


def test_a_secret_that_is_missing_is_named_and_counts_once_it_is_there(store, kafka, serve):
    topic = kafka.topic("secret", partitions=1)
    options = '[source.kafka.options]\n"sasl.password" = "${file:password}"'
    store.apply(definition("clicks", topic, source=options))
    secrets = store.folder / "secrets"
    secrets.mkdir()
    log = Log(kafka.producer(), topic)
    produce(log, 0, 5)
    server = serve(brokers=kafka.bootstrap, env={"PINION__KAFKA__SECRETS_DIR": secrets})
    client = calls.connect(server)

    def missing():
        sources = pinion_json("source", "list", "--server", server.flight)
        return next((s["reason"] for s in sources if s["state"] == "degraded"), None)

    reason = until(missing, what="the missing secret being named")
    assert "sasl.password" in reason and str(secrets) in reason, reason
    (secrets / "password").write_text("hidden-word\n")
    wait_caught_up(server, client, "clicks", log)
    told = json.dumps(pinion_json("describe", "clicks", "--server", server.flight)) + server.log_text(100_000)
    assert "hidden-word" not in told
