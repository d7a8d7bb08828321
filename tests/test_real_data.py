"""The whole path on public data: files, a real topic, and a pyarrow client, against the oracle.

The traps in this data: `NA` in numeric columns, a date format of its own, and flights of one origin in the
same minute, of which the later in the file must win.
"""

import csv
import json
import random
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from oracle import Oracle, same_rows
from support import flight as calls
from support.broker import Log
from support.ingest import wait_caught_up
from support.process import EXAMPLES, Server, pinion


def parsed(text, data_type):
    """A CSV cell as the column's type has it, in Python."""
    if text in ("", "NA"):
        return None
    if pa.types.is_integer(data_type):
        return int(text)
    if pa.types.is_floating(data_type):
        return float(text)
    if pa.types.is_timestamp(data_type):
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    return text


def csv_rows(path, schema):
    with open(path, newline="") as file:
        for cells in csv.DictReader(file):
            yield {name: parsed(cells[name], schema.field(name).type) for name in schema.names}


@pytest.fixture(scope="module")
def loaded(real_data, tmp_path_factory):
    """A server on a store with the three CSV files loaded."""
    data = tmp_path_factory.mktemp("real") / "data"
    pinion("init", "--data", data)
    pinion("apply", "--data", data, *(EXAMPLES / f"{name}.toml" for name in ("weather", "planes", "airports")))
    for name in ("weather", "planes", "airports"):
        pinion("load", "--data", data, name, real_data / "nyc" / f"{name}.csv")
    with Server(data) as server:
        yield server


def test_weather_by_scan_and_as_of_lookup(loaded, real_data, connect):
    client = connect(loaded)
    found = calls.whole(client, "weather")
    weather = Oracle(["origin"], "time_hour", history="all")
    for row in csv_rows(real_data / "nyc" / "weather.csv", found.schema):
        weather.upsert(row)
    assert found.num_rows == 26_115
    same_rows(found.to_pylist(), weather.rows())

    features = [name for name in found.schema.names if name not in ("origin", "time_hour")]
    keys = ["EWR", "JFK", "LGA", "SFO", "EWR"]
    generator = random.Random(2013)
    moments = [None] + [
        datetime(2012, 12, 31, tzinfo=UTC) + timedelta(minutes=generator.randrange(366 * 24 * 60)) for _ in range(40)
    ]
    for moment in moments:
        request = {} if moment is None else {"as_of": moment.isoformat()}
        reply = calls.lookup(client, [f"weather:{f}" for f in features], {"origin": keys}, status=True, **request)
        answers = weather.lookup([(key,) for key in keys], features, as_of=moment)
        for feature, (values, statuses) in answers.items():
            assert reply[feature].to_pylist() == values, (feature, moment)
            assert reply[f"{feature}__status"].to_pylist() == statuses, (feature, moment)


@pytest.mark.parametrize("table, key, rows", [("planes", "tailnum", 3_322), ("airports", "faa", 1_458)])
def test_latest_tables_by_scan_and_lookup(loaded, real_data, connect, table, key, rows):
    client = connect(loaded)
    found = calls.whole(client, table)
    oracle = Oracle([key])
    for row in csv_rows(real_data / "nyc" / f"{table}.csv", found.schema):
        oracle.upsert(row)
    assert found.num_rows == rows
    same_rows(found.to_pylist(), oracle.rows())
    features = [name for name in found.schema.names if name != key]
    keys = [k for (k,) in oracle.versions] + ["no such one", ""]
    random.Random(1).shuffle(keys)
    reply = calls.lookup(client, [f"{table}:{f}" for f in features], {key: keys}, status=True)
    for feature, (values, statuses) in oracle.lookup([(k,) for k in keys], features).items():
        assert reply[feature].to_pylist() == values, feature
        assert reply[f"{feature}__status"].to_pylist() == statuses, feature


def test_integers_with_missing_values_stay_integers(loaded):
    found = calls.whole(calls.connect(loaded), "planes")
    assert pa.types.is_integer(found.schema.field("year").type)
    assert found["year"].null_count > 0


def test_features_of_two_tables_in_one_lookup(loaded, real_data):
    client = calls.connect(loaded)
    keys = {"origin": ["EWR", "JFK"], "tailnum": ["N10156", "N102UW"]}
    reply = calls.lookup(client, ["weather:temp", "planes:seats"], keys)
    assert reply.schema.names == ["origin", "tailnum", "temp", "seats"]
    assert reply["seats"].to_pylist() == [55, 182]
    full = calls.lookup(client, ["weather:temp", "planes:seats"], keys, full_feature_names=True)
    assert full.schema.names == ["origin", "tailnum", "weather__temp", "planes__seats"]


def test_the_command_line_gives_the_same_answer(loaded, real_data):
    done = pinion("get", "--server", loaded.flight, "planes", "N10156", "--features", "seats,model", "--output", "json")
    (row,) = json.loads(done.stdout)
    assert row["seats"] == 55 and row["model"] == "EMB-145XR"
    assert "EMB-145XR" in pinion("get", "--server", loaded.flight, "planes", "N10156").stdout


@pytest.mark.kafka
@pytest.mark.parametrize("partitions", [1, 3])
def test_flights_from_a_real_topic(real_data, kafka, store, serve, partitions):
    topic = kafka.topic("flights", partitions=partitions)
    definition = (EXAMPLES / "airport_delays.toml").read_text()
    assert 'topic = "flights"' in definition
    store.apply(definition.replace('topic = "flights"', f'topic = "{topic}"'))
    flights = json.loads((real_data / "flights" / "flights-20k.json").read_text())
    log = Log(kafka.producer(), topic)
    oracle = Oracle(["origin"], "time", history="all")
    for flight in flights:
        # Keyed by origin: flights of one origin keep their order, whatever the number of partitions.
        log.send(json.dumps(flight).encode(), key=flight["origin"].encode())
        moment = datetime.strptime(flight["date"], "%Y/%m/%d %H:%M").replace(tzinfo=UTC)
        oracle.upsert(
            {"origin": flight["origin"], "time": moment}
            | {name: flight[name] for name in ("delay", "distance", "destination")}
        )
    server = serve(brokers=kafka.bootstrap)
    client = calls.connect(server)
    wait_caught_up(server, client, "airport_delays", log)

    found = calls.whole(client, "airport_delays")
    assert found.num_rows == 20_000
    same_rows(found.to_pylist(), oracle.rows())
    origins = sorted(key for (key,) in oracle.versions) + ["???"]
    features = ["delay", "distance", "destination"]
    generator = random.Random(2001)
    for moment in [None] + [
        datetime(2001, 1, 1, tzinfo=UTC) + timedelta(minutes=generator.randrange(90 * 24 * 60)) for _ in range(20)
    ]:
        request = {} if moment is None else {"as_of": moment.isoformat()}
        reply = calls.lookup(
            client, [f"airport_delays:{f}" for f in features], {"origin": origins}, status=True, **request
        )
        answers = oracle.lookup([(key,) for key in origins], features, as_of=moment)
        for feature, (values, statuses) in answers.items():
            assert reply[feature].to_pylist() == values, (feature, moment)
            assert reply[f"{feature}__status"].to_pylist() == statuses, (feature, moment)


def test_an_arrow_file_that_others_wrote_loads(real_data, store):
    """No key column of its own fits, so the row's decimal time serves: what counts is that the file is read."""
    file = real_data / "flights" / "flights-200k.arrow"
    with pa.memory_map(str(file)) as source:
        theirs = pa.ipc.open_file(source).read_all()
    key = next(f for f in theirs.schema if pa.types.is_integer(f.type))
    others = [f for f in theirs.schema if f.name != key.name]
    features = "\n".join(f'{f.name} = "{f.type}"' for f in others)
    store.apply(f"""
[table]
name = "flights"
entity = [{{ name = "{key.name}", type = "{key.type}" }}]

[features]
{features}
""")
    store.run("load", "flights", file)
    last = {row[key.name]: row for row in theirs.to_pylist()}
    rows = json.loads(store.run("scan", "flights", "--output", "json").stdout)
    assert len(rows) == len(last)
    for row in rows[:1000]:
        assert row == pytest.approx(last[row[key.name]])
