"""Kafka to visible rows, on a real Apache Kafka: how soon, how many, and what lookups and scans notice of it.

Parts, each optional:
- `freshness`: events of 200 bytes at 1,000, 10,000 and 50,000 a second; one in a hundred carries the time just before it
  was produced and is looked up, with its offset as barrier, by another process; beside it a bare consumer;
- `throughput`: a topic filled beforehand, 20 features, random updates of 1 M keys, in every format; against consuming and
  decoding alone, and against a Python consumer that writes to Redis;
- `beside`: p99 of lookups and GB/s of scans at 50,000 events a second, with the source paused and reading;
- `backlog`: 2 GB to catch up with: the server's memory, and lookups until they are as before.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import stream_fill
from harness import (
    DATA,
    RESULTS,
    Span,
    Unmeasured,
    cpu_seconds,
    machine,
    median,
    pinion,
    rss_anon,
    save_part,
    show_part,
    versions,
)
from serve_for import RAISED, Pinion, example, native
from stream_report import REPORTS

from support import flight as calls

from support import broker as brokers
from support.wait import until

EVENTS = """
[table]
name = "events"
entity = [{ name = "id", type = "string" }]
event_time = { name = "ts", type = "timestamp[us, tz=UTC]" }
history = "latest"

[features]
n = "int64"
x = "float64"
stamp = "int64"
pad = "string"

[source.kafka]
topic = "%s"
"""
PARTITIONS = 4


def main():
    parts = {"freshness": freshness, "throughput": throughput, "beside": beside, "backlog": backlog}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help=" ".join(parts))
    parser.add_argument("--seconds", type=float, default=60, help="of freshness and beside; fewer write no results")
    parser.add_argument("--warm", type=float, default=30)
    # The highest first: by the others the broker's code is compiled, which at first takes a core of the two.
    parser.add_argument("--rates", type=int, nargs="+", default=[50_000, 10_000, 1_000])
    parser.add_argument("--events", type=int, default=1_000_000, help="rows of throughput; fewer write no results")
    parser.add_argument("--formats", nargs="+", default=list(stream_fill.FORMATS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backlog-mb", type=int, default=2_000, help="fewer write no results")
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md again from the results")
    options = parser.parse_args()
    if options.render:
        for name, found in json.loads((RESULTS / "stream.json").read_text())["parts"].items():
            show_part("stream", name, found, *REPORTS[name](found))
        return
    if example("stream_watch") is None:
        raise SystemExit("build the examples of pinion-client first")
    trial = options.seconds < 60 or options.events < 1_000_000 or options.backlog_mb < 2_000
    for name in options.parts:
        here = machine()
        try:
            with Span() as span, kafka(name) as broker:
                found = parts[name](broker, options)
        except Unmeasured as why:
            print(f"\n== {name} is not measured: {why}")
            continue
        here |= {"span": span.found, "versions": versions("confluent-kafka")}
        found = {"machine": here, **found}
        if trial:
            body, *plots = REPORTS[name](found)
            print(f"\n== {name} (a trial: nothing is written)\n{body}\n{here['span']}")
        else:
            save_part("stream", name, found, *REPORTS[name](found))


@contextmanager
def kafka(part):
    """A broker of its own for a part, with the memory and the collector's aims of Kafka's own start script. The parts that
    last a minute and more leave the optimizing compiler time to be done; in the seconds of a run of `throughput` it would
    take a quarter of two cores (perf)."""
    options = "-Xms1g -Xmx1g -XX:MaxGCPauseMillis=20 -XX:InitiatingHeapOccupancyPercent=35"
    if part == "throughput":
        options += " -XX:TieredStopAtLevel=1"
    brokers.ENVIRONMENT = {**os.environ, "PINION_KAFKA_JAVA_OPTIONS": options}
    folder = tempfile.mkdtemp(prefix="pinion-bench-", dir=DATA)
    broker = brokers.Broker(f"{folder}/kafka")
    try:
        yield broker
    finally:
        broker.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def served(broker, definition, **options):
    """A server that reads a topic into a new store."""
    folder = Path(tempfile.mkdtemp(prefix="pinion-bench-", dir=DATA))
    try:
        (folder / "table.toml").write_text(definition)
        data = folder / "data"
        pinion("init", "--data", data)
        pinion("apply", "--data", data, folder / "table.toml")
        with Pinion(data, brokers=broker.bootstrap, **options) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def broker_pid(broker):
    return int((Path(broker.folder) / "pid").read_text())


def run(name, *arguments):
    return subprocess.Popen(
        [str(example(name)), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process):
    output, errors = process.communicate(timeout=600)
    if process.returncode != 0:
        raise RuntimeError(f"{process.args} exited {process.returncode}\n{errors[-2000:]}")
    return json.loads(output.splitlines()[-1])


# -- how soon


def freshness(broker, options):
    return {"warm": options.warm, "seconds": options.seconds, "rates": {r: at_rate(broker, r, options) for r in options.rates}}


def at_rate(broker, rate, options):
    topic = broker.topic("events", partitions=PARTITIONS)
    whole = options.warm + options.seconds
    with served(broker, EVENTS % topic) as server:
        until(lambda: source(server)["state"] == "running", 30, "the source reads")
        common = ("--brokers", broker.bootstrap, "--topic", topic)
        watch = run(
            "stream_watch", *common, "--lane", f"lane://{server.lane}", "--partitions", PARTITIONS,
            "--warm", options.warm, "--seconds", whole,
        )
        assert watch.stdout.readline().strip() == "ready"
        pids = {"server": server.pid, "broker": broker_pid(broker)}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        produced = result(run("stream_produce", *common, "--rate", rate, "--seconds", whole + 1))
        found = result(watch)
        cpu = {name: (cpu_seconds(pid) - before[name]) / (whole + 1) for name, pid in pids.items()}
        cpu |= {"producer": produced["cpu_seconds"] / (whole + 1), "watcher": found["cpu_seconds"] / whole}
        assert found["wrong"] == 0 and produced["failed"] == 0, (found, produced)
        return {"produced": produced, "found": found, "cpu_cores": cpu, "table": source(server)["tables"][0]}


def source(server):
    client = calls.connect(server)
    sources = calls.action(client, "source", action="list")[0]["sources"]
    return sources[0] if sources else {"state": "absent"}


# -- how many


def throughput(broker, options, keys=1_000_000):
    found = {"formats": {}, "keys": keys}
    if example("stream_decode") is None:
        raise Unmeasured("build the examples of pinion-ingest first")
    for name in options.formats:
        _, each = stream_fill.FORMATS[name]
        # A message of one row holds the schema too: a fifth of the rows make as many bytes.
        rows = options.events // (5 if name == "arrow-1" else 1)
        topic = broker.topic(name, partitions=PARTITIONS, max_message_bytes="20000000")
        filled = subprocess.run(
            [sys.executable, stream_fill.__file__, broker.bootstrap, topic, name, str(rows), str(keys)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        size = json.loads(filled.stdout)["bytes"]
        runs = {"pinion": [], "ceiling": []}
        for number in range(options.rounds + 1):
            ours, alone = into_pinion(broker, name, topic, rows), ceiling(broker, name, topic, rows)
            if number:
                runs["pinion"].append(ours)
                runs["ceiling"].append(alone)
        found["formats"][name] = {"rows": rows, "bytes": size, "rows_per_message": each, **runs}
        if name == "json":
            found["redis"] = redis_peer(broker, topic, min(rows, 200_000), options.rounds)
        broker.delete(topic)
    return found


def into_pinion(broker, name, topic, rows):
    """From the source's first row to the last, in a new store."""
    with served(broker, stream_fill.definition(name, topic)) as server:
        client = calls.connect(server)

        def sequence():
            return calls.action(client, "stats", table="wide")[0]["tables"][0]["next_sequence"]

        until(lambda: sequence() > 0, 60, "the first rows", every=0.002)
        began, cpu, first = time.monotonic(), cpu_seconds(server.pid), sequence()
        until(lambda: sequence() >= rows, 300, "all rows", every=0.01)
        seconds, cpu = time.monotonic() - began, cpu_seconds(server.pid) - cpu
        return rate_of(rows - first, seconds, cpu)


def ceiling(broker, name, topic, rows):
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(stream_fill.definition(name, topic))
        file.flush()
        run = native("stream_decode", broker.bootstrap, topic, file.name, rows)[0]
    return rate_of(run["rows"], run["seconds"], run["cpu_seconds"])


def rate_of(rows, seconds, cpu):
    return {"rows_per_second": rows / seconds, "cpu_micros_per_row": cpu / rows * 1e6}


def redis_peer(broker, topic, rows, rounds):
    from peers import Redis

    found = []
    for _ in range(rounds):
        with Redis(DATA / "stream-redis" / "none.rdb") as redis:
            found.append(stream_fill.into_redis(broker.bootstrap, topic, rows, str(redis.uds)))
    return found


# -- what others notice


def beside(broker, options, rate=50_000, keys=1_000_000):
    """Rounds with the source paused and reading; broker and producer run all the time."""
    topic = broker.topic("events", partitions=PARTITIONS)
    seconds = max(2.0, options.seconds / 6)
    rounds = options.rounds
    with served(broker, EVENTS % topic, env=RAISED) as server:
        client = calls.connect(server)
        fill = result(
            run("stream_produce", "--brokers", broker.bootstrap, "--topic", topic, "--rate", 200_000, "--seconds",
                keys * 3 / 200_000, "--keys", keys, "--sentinel-every", 0)
        )
        assert fill["failed"] == 0
        caught_up(server)
        calls.action(client, "merge", table="events")
        rows = calls.action(client, "stats", table="events")[0]["tables"][0]["rows"]
        last = rounds * 2 * (seconds * 2 + 8) + 10
        producer = run("stream_produce", "--brokers", broker.bootstrap, "--topic", topic, "--rate", rate,
                       "--seconds", last, "--keys", keys, "--sentinel-every", 0)  # fmt: skip
        try:
            found = {"paused": [], "reading": []}
            for number in range(rounds + 1):
                for state in ("paused", "reading"):
                    if state == "paused":
                        calls.action(client, "source", action="pause", topic=topic)
                    else:
                        calls.action(client, "source", action="resume", topic=topic)
                        caught_up(server, most=rate)
                    time.sleep(0.5)
                    lookups = native(
                        "lane_bench", "--lane", f"lane://{server.lane}", "--features", "events:n,events:x,events:stamp",
                        "--key-format", "k{}", "--key-to", keys, "--missing", "true", "--keys", 100, "--rate", 1_000,
                        "--seconds", seconds,
                    )[0]  # fmt: skip
                    began = time.monotonic()
                    passes = native("scan_bench", "--url", server.unix, "--table", "events", "--passes", 3)
                    scan = sorted(p["bytes"] / p["seconds"] / 1e9 for p in passes)[1]
                    if number:
                        found[state].append(
                            {
                                "p50_micros": lookups["p50_micros"],
                                "p99_micros": lookups["p99_micros"],
                                "scan_gb_per_second": scan,
                                "scan_seconds": time.monotonic() - began,
                            }
                        )
            stats = calls.action(client, "stats", table="events")[0]["tables"][0]
        finally:
            producer.kill()
            producer.communicate()
    superseded = sum(s["superseded_rows"] for s in stats["segments"]) / max(1, sum(s["rows"] for s in stats["segments"]))
    return {"rate": rate, "table_rows": rows, "rounds": found, "segments": len(stats["segments"]), "superseded": superseded}


def caught_up(server, most=0, seconds=300):
    """Waits until at most `most` records are still to be read."""

    def there():
        found = source(server)
        return found["state"] == "running" and found["end_offsets"] and found["lag"] <= most

    time.sleep(0.5)
    until(there, seconds, "the source has caught up", every=0.1)


def backlog(broker, options, budget_mb=256):
    """A backlog read by a server with a memory budget: its anonymous memory, and lookups before, during and after."""
    keys, rate = 200_000, 150_000
    topic = broker.topic("events", partitions=PARTITIONS)
    count = options.backlog_mb * 1_000_000 // 200
    common = ("--brokers", broker.bootstrap, "--topic", topic, "--sentinel-every", 0, "--keys", keys)
    env = {"PINION__KAFKA__MEMORY_BYTES": f"{budget_mb} MiB"}
    with served(broker, EVENTS % topic, env=env) as server:
        client = calls.connect(server)
        assert result(run("stream_produce", *common, "--rate", rate, "--seconds", keys * 3 / rate))["failed"] == 0
        caught_up(server)
        before = p99(server, keys, 3)
        calls.action(client, "source", action="pause", topic=topic)
        assert result(run("stream_produce", *common, "--rate", rate, "--seconds", count / rate))["failed"] == 0
        watch = Memory(server.pid)
        calls.action(client, "source", action="resume", topic=topic)
        began = time.monotonic()
        until(lambda: source(server)["lag"] > count // 2, 30, "the backlog being seen")
        during = []
        while source(server)["lag"] > 0 or source(server)["state"] != "running":
            during.append(p99(server, keys, 1))
            assert time.monotonic() - began < 600
        seconds = time.monotonic() - began
        time.sleep(1)
        after = p99(server, keys, 3)
        peak = watch.stop()
    return {
        "figures": {
            "records, MB of values": f"{count:,}, {options.backlog_mb:,}",
            "caught up within": f"{seconds:.1f} s, {count / seconds:,.0f} records/s",
            "memory budget (`kafka.memory_bytes`)": f"{budget_mb} MiB",
            "anonymous memory of the server, most": f"{peak / 2**20:,.0f} MiB",
            "lookup p99 before": f"{before:,.0f} µs",
            "lookup p99 while catching up": f"{median(during):,.0f} µs",
            "lookup p99 from 1 s after": f"{after:,.0f} µs ({after / before:.2f}x of before)",
        }
    }


def p99(server, keys, seconds):
    """Of 1,000 lookups of 100 keys a second over the lane, microseconds."""
    return native(
        "lane_bench", "--lane", f"lane://{server.lane}", "--features", "events:n,events:x,events:stamp", "--key-column", "id",
        "--key-format", "k{}", "--key-to", keys, "--missing", "true", "--keys", 100, "--rate", 1_000, "--warm", 0.2,
        "--seconds", seconds,
    )[0]["p99_micros"]  # fmt: skip


class Memory:
    """The most anonymous memory that a process has until `stop`."""

    def __init__(self, pid):
        self.peak, self.pid, self.ended = 0, pid, threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self):
        while not self.ended.wait(0.02):
            self.peak = max(self.peak, rss_anon(self.pid))

    def stop(self):
        self.ended.set()
        self.thread.join()
        return self.peak


if __name__ == "__main__":
    main()
