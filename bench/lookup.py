"""Lookups by key: latency, keys per second and CPU beside Redis and Feast.

Parts, each optional:
- `lookups`: 1, 100 and 1,000 keys a request, 1 and 8 clients, every path and peer;
- `half`: p50 and p99 at half of saturation;
- `requests`: requests per second at saturation, 10 keys by 50 features;
- `many`: 64 scans at once beside lookups: memory of the server, latency;
- `cancel`: 10,000 streams that their clients cancel, and what is left of them.

Pinion holds 10 M keys, Redis every tenth of them, Feast every hundredth; keys are asked uniformly from the peer's set,
and from all 10 M too.
"""

import argparse
import json
import re
import shutil
import subprocess
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import serving
from harness import (
    DATA,
    RESULTS,
    Span,
    Unmeasured,
    copy_store,
    machine,
    rounds,
    rss_anon,
    save_part,
    show_part,
    stalls,
    versions,
)
from lookup_paths import (
    FLIGHT,
    LANE,
    NATIVE,
    POLL_MICROS,
    READS,
    REDIS_SETTINGS,
    SECONDS,
    Cpu,
    case,
    check,
    feast_paths,
    has_native,
    lane_bench,
    pinion_paths,
    polling_paths,
    redis_benchmark,
    redis_paths,
    redis_server,
)
from lookup_report import REPORTS
from peers import FEAST_PYTHON, Feast
from serve_for import RAISED, Pinion, missing_lane, understands
from serving import FEAST_STEP, REDIS_STEP, Sizes
from workers import Workers


def main():
    parts = {"lookups": lookups, "half": half, "requests": requests, "many": many, "cancel": cancel}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(parts), help=" ".join(parts))
    parser.add_argument("--rows", type=int, default=10_000_000, help="keys; fewer for a trial, which writes no results")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--build-only", action="store_true", help="make the data and the stores, measure nothing")
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md again from the results")
    options = parser.parse_args()
    if options.render:
        for name, found in json.loads((RESULTS / "lookup.json").read_text())["parts"].items():
            show_part("lookup", name, found, *REPORTS[name](found))
        return
    sizes = Sizes.scaled(options.rows / 10_000_000)
    data = serving.store(sizes)
    with redis_server(sizes), Feast(sizes.folder, serving.profile_file(sizes), FEAST_STEP):
        pass  # filled, for the next start
    if options.build_only:
        return
    for name in options.parts:
        here = machine()
        try:
            with Span() as span:
                found = parts[name](sizes, data, options.rounds)
        except Unmeasured as why:
            print(f"\n== {name} is not measured: {why}")
            continue
        here |= {
            "span": span.found,
            "versions": peer_versions() if name in ("lookups", "half") else versions("pyarrow"),
        }
        found = {"machine": here, "keys": sizes.profile, **found}
        if sizes.profile == 10_000_000:
            save_part("lookup", name, found, *REPORTS[name](found))
        else:
            body, *_ = REPORTS[name](found)
            print(f"\n== {name} (a trial: nothing is written)\n{body}\n{here['span']}")


def peer_versions():
    server = subprocess.run(["redis-server", "--version"], capture_output=True, text=True).stdout
    feast = subprocess.run(
        [str(FEAST_PYTHON), "-c", "from importlib.metadata import version as v; print(v('feast'), v('redis'))"],
        capture_output=True,
        text=True,
    ).stdout.split()
    return versions("pyarrow", "redis", "hiredis") | {
        "redis-server": re.search(r"v=(\S+)", server).group(1),
        "feast": f"{feast[0]} (redis {feast[1]})",
    }


# -- latency and keys per second


def lookups(sizes, data, count):
    found = {}
    with ExitStack() as stack:
        copy = copy_store(data, DATA / "lookup-polled-work")
        stack.callback(shutil.rmtree, copy)
        pinion, redis = stack.enter_context(Pinion(data)), stack.enter_context(redis_server(sizes))
        feast = stack.enter_context(Feast(sizes.folder, serving.profile_file(sizes), FEAST_STEP))
        serve = stack.enter_context(feast.serve())
        ours, redises = pinion_paths(stack, pinion), redis_paths(stack, redis)
        # A server of its own: how it waits counts for all of its clients.
        polled = stack.enter_context(Pinion(copy, env={"PINION__LANE__SPIN_MICROS": str(POLL_MICROS)}))
        polling = polling_paths(stack, polled) if not missing_lane() else {}
        check(polling, sizes, 1)
        feasts = feast_paths(stack, feast, serve)
        check(ours, sizes, 1)
        check(redises, sizes, REDIS_STEP)
        check(feasts, sizes, FEAST_STEP)
        # Where the keys of a run lie: (how many, how far apart).
        few = (sizes.profile // REDIS_STEP, REDIS_STEP)
        fewest = (sizes.profile // FEAST_STEP, FEAST_STEP)
        every = (sizes.profile, 1)
        server, peer, polled_cpu = Cpu(pinion.pid), Cpu(redis.pid), Cpu(polled.pid)
        feast_cpu = {path: Cpu(feast.redis.pid) for path in feasts}
        feast_cpu["feast serve"] = Cpu(feast.redis.pid, families=(serve.pid,))
        for keys in (1, 100, 1_000):
            for clients in (1, 8):
                cases = {}
                for path, workers in ours.items():
                    for asked, of in ((few, "Redis's"), (fewest, "Feast's"), (every, "all")):
                        if of == "Feast's" and keys != 100:
                            continue
                        cases[f"{path} | {of}"] = case(workers, clients, keys, asked, server)
                # For several clients two cores are too few.
                for path, workers in polling.items() if clients == 1 else ():
                    for asked, of in ((few, "Redis's"), (every, "all")):
                        cases[f"{path} | {of}"] = case(workers, clients, keys, asked, polled_cpu)
                for path, workers in redises.items():
                    if keys > 1 or "one HMGET" not in path:
                        cases[f"{path} | Redis's"] = case(workers, clients, keys, few, peer)
                cases["redis-benchmark | Redis's"] = redis_benchmark(redis, clients, keys, few[0], peer)
                for path, read in READS.items() if has_native() else ():
                    for asked, of in ((few, "Redis's"), (every, "all")):
                        cases[f"{path} | {of}"] = lane_bench(
                            pinion, "profile", serving.FEATURES, clients, keys, asked, read=read
                        )
                if clients == 1 or keys == 100:
                    for path, workers in feasts.items():
                        cases[f"{path} | Feast's"] = case(workers, clients, keys, fewest, feast_cpu[path])
                found[f"{keys} | {clients}"] = rounds(cases, count, limit_seconds=75)
                print(f"{keys} keys, {clients} clients: done", flush=True)
    return {"rounds": found}


# -- half of saturation


def half(sizes, data, count):
    found, stood = {}, [stalls()]
    with ExitStack() as stack:
        pinion, redis = stack.enter_context(Pinion(data)), stack.enter_context(redis_server(sizes))
        best = next(iter(REDIS_SETTINGS))
        paths = pinion_paths(stack, pinion) | {best: redis_paths(stack, redis)[best]}
        few = (sizes.profile // REDIS_STEP, REDIS_STEP)
        for keys in (100, 1_000):
            cases = {}
            for path, workers in paths.items():
                cpu = Cpu(redis.pid if path == best else pinion.pid)
                cases[path] = at_half(partial(case, workers, 8, keys, few, cpu))
            if has_native() and understands("lane_bench", "--rate"):
                cases[NATIVE] = at_half(partial(lane_bench, pinion, "profile", serving.FEATURES, 8, keys, few))
            found[str(keys)] = rounds(cases, count, limit_seconds=60)
            stood.append(stalls())
    return {"rounds": found, "stalls": stood}


def at_half(make):
    """Saturation first, then half of its rate, in one round."""

    def one():
        full = make()()
        return {"full": full, "half": make(rate=full["requests_per_second"] / 2, seconds=2 * SECONDS)()}

    return one


# -- requests per second


def requests(sizes, data, count):
    found, keys = {}, 10
    names = serving.FIFTY.names[1:]
    with ExitStack() as stack:
        pinion = stack.enter_context(Pinion(data))
        paths = pinion_paths(stack, pinion, "fifty", names)
        check(paths, sizes, 1, serving.FIFTY.names, serving.fifty_file(sizes))
        every, cpu = (sizes.fifty, 1), Cpu(pinion.pid)
        cases = {}
        for clients in (1, 2, 4, 8):
            for path, workers in paths.items():
                cases[f"{path} | {clients}"] = case(workers, clients, keys, every, cpu)
            for path, read in READS.items() if has_native() else ():
                for depth in (1, 4):
                    label = f"{path}, {depth} under way" if depth > 1 else path
                    cases[f"{label} | {clients}"] = lane_bench(
                        pinion, "fifty", names, clients, keys, every, read=read, depth=depth
                    )
        found = rounds(cases, count, limit_seconds=90)
    return {"rounds": found}


# -- many scans at once


class Watch(threading.Thread):
    """The anonymous memory of a process while it lasts."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.peak, self.running = pid, 0, True

    def run(self):
        while self.running:
            self.peak = max(self.peak, rss_anon(self.pid))
            time.sleep(0.01)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.join()


STREAMS, PROCESSES = 64, 8


def many(sizes, data, count):
    found = []
    request = {"scan": {"table": "scan"}}
    paths = [f"{FLIGHT}, Unix socket"] + ([] if missing_lane() else [LANE])
    with ExitStack() as stack:
        pinion = stack.enter_context(Pinion(data, env=RAISED))
        scans = stack.enter_context(Workers("scan", {"url": pinion.unix}, clients=PROCESSES))
        every = pinion_paths(stack, pinion, clients=1)
        clients = {path: every[path] for path in paths}
        for number in range(min(count, 3)):
            for path, workers in clients.items():
                workers.run(1, 100, 0.5, sizes.profile, 1, seed=number)
                alone = workers.run(1, 100, 2.0, sizes.profile, 1, seed=number)
                before = rss_anon(pinion.pid)
                with Watch(pinion.pid) as watch:
                    scans.start(PROCESSES, "many", asked=request, streams=STREAMS // PROCESSES, seconds=4.0)
                    time.sleep(1.0)
                    beside = workers.run(1, 100, 2.0, sizes.profile, 1, seed=number)
                    done = scans.finish()
                errors = [error for each in done for error in each["errors"]]
                assert not errors, errors[0]
                found.append(
                    {"path": path, "alone": alone, "beside": beside, "rss_before": before, "rss_peak": watch.peak}
                    | {"rows_per_second": sum(each["rows"] for each in done) / 4.0}
                )
        # Once more, with a filter that lets most rows of every batch pass: all of them have to be copied.
        with Watch(pinion.pid) as watch:
            copied = {"scan": {"table": "scan", "filter": "f0 < 0.999"}}
            scans.start(PROCESSES, "many", asked=copied, streams=STREAMS // PROCESSES, seconds=4.0)
            done = scans.finish()
        errors = [error for each in done for error in each["errors"]]
        assert not errors, errors[0]
    return {"runs": found, "streams": STREAMS, "rss_peak_copied": watch.peak}


# -- cancelled streams

CANCELLED, CANCELLERS = 10_000, 4
# What a gauge says of a table or of the process is no count of something under way.
STANDING = re.compile(r"^(pinion_table_|pinion_store_|process_|pinion_build|pinion_catalog|pinion_info)")


def cancel(sizes, data, count):
    with Pinion(data) as pinion, Workers("scan", {"url": pinion.unix}, clients=CANCELLERS) as clients:
        clients.call("scan", asked={"scan": {"table": "scan", "limit": 10}})
        before = {"rss": rss_anon(pinion.pid), "files": open_files(pinion.pid)}
        began = time.monotonic()
        clients.start(CANCELLERS, "cancelled", asked={"scan": {"table": "scan"}}, streams=CANCELLED // CANCELLERS)
        done = sum(clients.finish())
        seconds = time.monotonic() - began
        left = pending(pinion)
        while left and time.monotonic() - began - seconds < 10:
            time.sleep(0.05)
            left = pending(pinion)
        settled = time.monotonic() - began - seconds
        after = {"rss": rss_anon(pinion.pid), "files": open_files(pinion.pid)}
        gauges = sorted(name for name in pinion.metrics()[0] if is_pending(pinion, name))
    return {"streams": done, "seconds": seconds, "settled": settled, "left": left, "gauges": gauges} | {
        "before": before,
        "after": after,
    }


def is_pending(pinion, name):
    bare = name.split("{")[0]
    return pinion.metrics()[1].get(bare) == "gauge" and not STANDING.match(bare)


def pending(pinion):
    """Gauges that count something under way and are not at zero."""
    values, kinds = pinion.metrics()
    return {
        name: value
        for name, value in values.items()
        if value and kinds.get(name.split("{")[0]) == "gauge" and not STANDING.match(name)
    }


def open_files(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


if __name__ == "__main__":
    main()
