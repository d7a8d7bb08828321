"""Lookups by key: latency, keys per second and CPU beside Redis and Feast.

Parts, each optional:
- `lookups`: 1, 100 and 1,000 keys a request, 1 and 8 clients, every path and peer;
- `half`: p50 and p99 at half of saturation;
- `requests`: requests per second at saturation, 10 keys by 50 features;
- `many`: 64 scans at once beside lookups: memory of the server, latency;
- `cancel`: 10,000 streams that their clients cancel, and what is left of them.

Pinion holds 10 M keys, Redis every tenth of them, Feast every hundredth; keys are asked uniformly from the peer's set, and
from all 10 M too.
"""

import argparse
import json
import re
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import plot
import redis_fill
import serving
from harness import (
    RESULTS,
    Span,
    cpu_seconds,

    family_cpu_seconds,
    machine,
    median,
    ratios,
    rounds,
    rss_anon,
    save_part,
    show_part,
    spread,
    table,
    versions,
)
from peers import FEAST_PYTHON, Feast, Redis
from serve_for import Pinion, example, missing_lane, native
from serving import FEAST_STEP, REDIS_STEP, Sizes
from workers import Workers

SECONDS = 0.5
SCHEMA = [(field.name, str(field.type)) for field in serving.SCHEMA]
# The settings of redis-py, the first of them the peer's best as a rule; all are printed.
REDIS_SETTINGS = {
    "redis-py, hiredis, pipelined HMGET": {},
    "redis-py, hiredis, one HMGET after the other": {"pipeline": False},
    "redis-py without hiredis, pipelined HMGET": {"hiredis": False},
}
REDIS_TYPED = "redis-py, hiredis, pipelined HMGET, typed Arrow"
REDIS_PACKED = "redis-py, hiredis, MGET of packed rows, typed Arrow"
LANE, FLIGHT, NATIVE = "local lane, Python", "Flight, pyarrow", "local lane, native"


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
        with Span() as span:
            found = parts[name](sizes, data, options.rounds)
        here |= {"span": span.found, "versions": peer_versions() if name in ("lookups", "half") else versions("pyarrow")}
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


@contextmanager
def redis_server(sizes):
    """Redis with every tenth key, filled once."""
    with Redis(sizes.folder / "redis.rdb") as redis:
        done = sizes.folder / "redis-complete"
        if not done.exists():
            redis.cli("flushall")
            print("filling redis", flush=True)
            redis_fill.fill(redis, serving.mapped(serving.profile_file(sizes)), REDIS_STEP)
            done.touch()
        yield redis


# -- the paths


def pinion_paths(stack, pinion, name="profile", features=serving.FEATURES, clients=8):
    """path -> its clients, connected when they are first asked."""
    ways = {
        f"{FLIGHT}, Unix socket": ("flight", {"url": pinion.unix}),
        f"{FLIGHT}, TCP": ("flight", {"url": pinion.flight}),
    }
    if why := missing_lane():
        print(f"the local lane is not measured: {why}")
    else:
        ways[LANE] = ("lane", {"socket": str(pinion.lane)})
    return {
        path: stack.enter_context(Workers(kind, {**where, "table": name, "features": list(features)}, clients))
        for path, (kind, where) in ways.items()
    }


def redis_paths(stack, redis):
    found = {}
    common = {"socket": str(redis.uds), "schema": SCHEMA, "step": REDIS_STEP}
    for path, setting in REDIS_SETTINGS.items():
        found[path] = stack.enter_context(Workers("redis", {**common, **setting}))
    found[REDIS_TYPED] = stack.enter_context(Workers("redis", {**common, "types": True}))
    found[REDIS_PACKED] = stack.enter_context(Workers("redis-packed", {**common, "types": True}))
    return found


def feast_paths(stack, feast, serve):
    common = {"features": serving.FEATURES, "schema": SCHEMA}
    sdk = {**common, "repository": str(feast.repository)}
    env = Feast.environment()
    return {
        "Feast SDK, to_dict": stack.enter_context(Workers("feast", sdk, python=FEAST_PYTHON, env=env)),
        "Feast SDK, to_arrow": stack.enter_context(
            Workers("feast", {**sdk, "arrow": True}, python=FEAST_PYTHON, env=env)
        ),
        "feast serve": stack.enter_context(Workers("feast-serve", {**common, "port": serve.port})),
    }


def check(paths, sizes, step, schema_names=serving.SCHEMA.names, file=None):
    """Every path replies with the values of the file, to keys of its set, repeated and in any order."""
    source = serving.mapped(file or serving.profile_file(sizes))
    generator = np.random.default_rng(1)
    ids = generator.integers(0, source.num_rows // step, 300) * step
    expected = source.take(ids)
    for path, clients in paths.items():
        reply = clients.check(ids)
        for name in schema_names:
            same = reply[name].combine_chunks().cast(expected[name].type).equals(expected[name].combine_chunks())
            assert same, f"{path}: the values of {name} are not those of the file"


class Cpu:
    """CPU of servers: processes that stay, and families whose members come and go."""

    def __init__(self, *pids, families=()):
        self.pids, self.families = pids, families

    def now(self):
        return sum(map(cpu_seconds, self.pids)) + sum(map(family_cpu_seconds, self.families))


def timed(run, cpu, keys):
    """One run with the servers' and clients' CPU per key."""
    before = cpu.now()
    found = run()
    found["server_cpu_micros_per_key"] = (cpu.now() - before) / max(found["sent"] * keys, 1) * 1e6
    found["client_cpu_micros_per_key"] = found["client_cpu_seconds"] / max(found["requests"] * keys, 1) * 1e6
    return found


# -- latency and keys per second


def lookups(sizes, data, count):
    found = {}
    with ExitStack() as stack:
        pinion, redis = stack.enter_context(Pinion(data)), stack.enter_context(redis_server(sizes))
        feast = stack.enter_context(Feast(sizes.folder, serving.profile_file(sizes), FEAST_STEP))
        serve = stack.enter_context(feast.serve())
        ours, redises = pinion_paths(stack, pinion), redis_paths(stack, redis)
        feasts = feast_paths(stack, feast, serve)
        check(ours, sizes, 1)
        check(redises, sizes, REDIS_STEP)
        check(feasts, sizes, FEAST_STEP)
        # Where the keys of a run lie: (how many, how far apart).
        few = (sizes.profile // REDIS_STEP, REDIS_STEP)
        fewest = (sizes.profile // FEAST_STEP, FEAST_STEP)
        every = (sizes.profile, 1)
        server, peer = Cpu(pinion.pid), Cpu(redis.pid)
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
                for path, workers in redises.items():
                    if keys > 1 or "one HMGET" not in path:
                        cases[f"{path} | Redis's"] = case(workers, clients, keys, few, peer)
                cases["redis-benchmark | Redis's"] = redis_benchmark(redis, clients, keys, few[0], peer)
                if example("lane_bench") is not None and not missing_lane():
                    for asked, of in ((few, "Redis's"), (every, "all")):
                        cases[f"{NATIVE} | {of}"] = lane_bench(pinion, "profile", serving.FEATURES, clients, keys, asked)
                if clients == 1 or keys == 100:
                    for path, workers in feasts.items():
                        cases[f"{path} | Feast's"] = case(workers, clients, keys, fewest, feast_cpu[path])
                found[f"{keys} | {clients}"] = rounds(cases, count, limit_seconds=75)
                print(f"{keys} keys, {clients} clients: done", flush=True)
    return {"rounds": found}


SEED = iter(range(10**9))


def case(workers, clients, keys, asked, cpu, seconds=SECONDS, rate=None):
    among, step = asked
    return lambda: timed(
        lambda: workers.run(clients, keys, seconds, among, step, seed=next(SEED), rate=rate), cpu, keys
    )


def redis_benchmark(redis, clients, keys, among, cpu):
    """redis-benchmark with random keys, as many requests under way as `keys`; its replies stay bytes."""
    command = ["redis-benchmark", "-s", str(redis.uds), "-r", str(among), "-c", str(clients), "-P", str(keys), "--csv"]
    command += ["HMGET", "e:__rand_int__", *serving.FEATURES]

    def run(count):
        here = [*command[:1], "-n", str(count), *command[1:]]
        with subprocess.Popen(here, stdout=subprocess.PIPE, text=True) as process:
            said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        return dict(zip(*(re.findall(r'"([^"]*)"', line) for line in said.strip().splitlines()[-2:])))

    def one():
        count = 100_000 if keys > 1 else 8_000 + 3_000 * clients
        began = time.perf_counter()
        before = child_cpu_seconds()
        said = run(count)
        rate = float(said["rps"])
        # A pipeline of `keys` commands is one request here; redis-benchmark tells a command's time in its pipeline.
        return {
            "keys_per_second": rate,
            "requests_per_second": rate / keys,
            "p50_micros": float(said["p50_latency_ms"]) * 1e3,
            "p99_micros": float(said["p99_latency_ms"]) * 1e3,
            "client_cpu_seconds": child_cpu_seconds() - before,
            "requests": count / keys,
            "sent": count / keys,
            "seconds": time.perf_counter() - began,
        }

    return lambda: timed(one, cpu, keys)


def child_cpu_seconds():
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def lane_bench(pinion, name, features, clients, keys, asked, seconds=SECONDS, rate=None):
    """The native client of the local lane; it validates what it receives."""
    among, step = asked

    def one():
        return native(
            *("lane_bench", "--lane", pinion.lane, "--features", ",".join(f"{name}:{f}" for f in features)),
            *("--connections", clients, "--keys", keys, "--among", among, "--step", step, "--seconds", seconds),
            *("--seed", next(SEED), *(("--rate", rate) if rate else ())),
        )

    return lambda: timed(one, Cpu(pinion.pid), keys)


def lookups_report(found):
    rows, groups, notes = [], [], []
    for setting, cases in found["rounds"].items():
        keys, clients = map(int, setting.split(" | "))
        bars = []
        for name, runs in cases.items():
            path, of = name.split(" | ")
            rows.append(
                [f"{keys:,}", clients, path, of]
                + [spread([run[f"{p}_micros"] for run in runs], "{:,.0f}") for p in ("p50", "p99")]
                + [f"{median([run['keys_per_second'] for run in runs]):,.0f}"]
                + [f"{median([run[f'{side}_cpu_micros_per_key'] for run in runs]):.2f}" for side in ("server", "client")]
            )
            ours = path.startswith((LANE, FLIGHT, NATIVE))
            if of != "all" and not (ours and of == "Feast's"):
                bars.append((path, [run["keys_per_second"] for run in runs], ours))
        groups.append((f"{keys:,} keys, {clients} client{'s' * (clients > 1)}", bars))
    for keys, ours, peers, of, goal in (
        (1, LANE, tuple(REDIS_SETTINGS), "Redis's", "at or under it"),
        (100, LANE, tuple(REDIS_SETTINGS), "Redis's", "12x"),
        (1_000, LANE, tuple(REDIS_SETTINGS), "Redis's", "50x"),
        (100, LANE, (REDIS_TYPED,), "Redis's", "none, the like for like"),
        (100, LANE, (REDIS_PACKED,), "Redis's", "none"),
        (100, f"{FLIGHT}, Unix socket", tuple(REDIS_SETTINGS), "Redis's", "8x"),
        (100, LANE, ("Feast SDK, to_dict", "Feast SDK, to_arrow", "feast serve"), "Feast's", "30x"),
        (100, f"{FLIGHT}, Unix socket", ("Feast SDK, to_dict", "Feast SDK, to_arrow", "feast serve"), "Feast's", "none"),
    ):
        if note := faster(found["rounds"][f"{keys} | 1"], ours, peers, of):
            notes.append(f"K = {keys:,}, 1 client: {note} (goal: {goal})")
    cases = found["rounds"]["100 | 1"]
    if f"{NATIVE} | Redis's" in cases:
        rates = ([run["keys_per_second"] for run in cases[f"{name} | Redis's"]] for name in (NATIVE, "redis-benchmark"))
        more = ratios(*rates)
        notes.append(f"K = 100, 1 client: {NATIVE} {median(more):.1f}x the keys/s of redis-benchmark ({spread(more)}; goal: 5x)")
    notes += [
        "keys: whose keys are asked, uniformly: one in ten of Pinion's (Redis's), one in a hundred (Feast's), or all",
        "replies are typed Arrow, checked against the file, but where it says otherwise: redis-py's stay bytes without `typed`, "
        "redis-benchmark does not look at them, Feast's are dictionaries without `to_arrow`",
    ]
    header = ["K", "clients", "path", "keys", "p50 µs: min / median / max", "p99 µs", "keys/s", "server CPU µs/key", "client"]
    body = table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    picture = plot.bars("Lookups, keys a second", "logarithmic; keys of the peer's set", groups, log=True)
    return body, [("lookup-lookups.svg", picture, "Keys a second of every path and peer")]


def faster(cases, ours, peers, of):
    """How much sooner a median reply comes than the best peer's; None when one side was not measured."""
    settings = {name: runs for name, runs in cases.items() if name.split(" | ")[0] in peers}
    mine = cases.get(f"{ours} | {of}")
    if mine is None or not settings:
        return None
    best = min(settings, key=lambda name: median([run["p50_micros"] for run in settings[name]]))
    times = ratios(*([run["p50_micros"] for run in runs] for runs in (settings[best], mine)))
    return f"p50 of {ours} {median(times):.2f}x faster than {best.split(' | ')[0]} ({spread(times)})"


# -- half of saturation


def half(sizes, data, count):
    found = {}
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
            if example("lane_bench") is not None and not missing_lane():
                cases[NATIVE] = at_half(partial(lane_bench, pinion, "profile", serving.FEATURES, 8, keys, few))
            found[str(keys)] = rounds(cases, count, limit_seconds=60)
    return {"rounds": found}


def at_half(make):
    """Saturation first, then half of its rate, in one round."""

    def one():
        full = make()()
        return {"full": full, "half": make(rate=full["requests_per_second"] / 2, seconds=2 * SECONDS)()}

    return one


def half_report(found):
    rows = []
    for keys, cases in found["rounds"].items():
        for path, runs in cases.items():
            tails = [run["half"]["p99_micros"] / run["half"]["p50_micros"] for run in runs]
            rows.append(
                [f"{int(keys):,}", path, f"{median([run['full']['requests_per_second'] for run in runs]):,.0f}"]
                + [spread([run["half"][f"{p}_micros"] for run in runs], "{:,.0f}") for p in ("p50", "p99")]
                + [f"{median(tails):.2f}x"]
            )
    notes = (
        "\n- 8 clients, each with a request every so often; one that is late because the one before took long counts from when "
        "it was due\n- goal for Pinion: p99 at most 3x p50\n"
    )
    header = ["K", "path", "requests/s at saturation", "at half of it: p50 µs", "p99 µs", "p99 / p50"]
    return table(header, rows) + "\n" + notes, []


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
            if example("lane_bench") is not None and not missing_lane():
                cases[f"{NATIVE} | {clients}"] = lane_bench(pinion, "fifty", names, clients, keys, every)
        found = rounds(cases, count, limit_seconds=90)
    return {"rounds": found}


def requests_report(found):
    rows, groups = [], {}
    for name, runs in found["rounds"].items():
        path, clients = name.split(" | ")
        rates = [run["requests_per_second"] for run in runs]
        cpu = [median([run[f"{side}_cpu_micros_per_key"] for run in runs]) * 10 for side in ("server", "client")]
        rows.append(
            [path, clients, spread(rates, "{:,.0f}")]
            + [f"{median([run[f'{p}_micros'] for run in runs]):,.0f}" for p in ("p50", "p99")]
            + [f"{each:.1f}" for each in cpu]
        )
        groups.setdefault(path, []).append((f"{clients} clients", rates, True))
    best = max(found["rounds"], key=lambda name: median([run["requests_per_second"] for run in found["rounds"][name]]))
    rate = median([run["requests_per_second"] for run in found["rounds"][best]])
    path, clients = best.split(" | ")
    notes = f"\n- best: {rate:,.0f} requests/s, {path}, {clients} clients (goal: 65,000 by the native client on 2 cores)\n"
    header = ["path", "clients", "requests/s: min / median / max", "p50 µs", "p99 µs", "server CPU µs/request", "client"]
    picture = plot.bars("10 keys by 50 features at saturation", "requests/s", list(groups.items()), form="{:,.0f}")
    return table(header, rows) + "\n" + notes, [("lookup-requests.svg", picture, "Requests a second")]


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
        pinion = stack.enter_context(Pinion(data))
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
    return {"runs": found, "streams": STREAMS}


def many_report(found):
    rows, notes = [], []
    for path in dict.fromkeys(run["path"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["path"] == path]
        for what in ("alone", "beside"):
            rows.append(
                [path, "alone" if what == "alone" else f"beside {found['streams']} scans"]
                + [spread([run[what][f"{p}_micros"] for run in runs], "{:,.0f}") for p in ("p50", "p99")]
            )
        worse = ratios(*([run[what]["p99_micros"] for run in runs] for what in ("beside", "alone")))
        notes.append(f"{path}: p99 {median(worse):.2f}x of alone ({spread(worse)}; goal: within 3x)")
    before, peak = found["runs"][0]["rss_before"] / 2**20, max(run["rss_peak"] for run in found["runs"]) / 2**20
    rates = [run["rows_per_second"] for run in found["runs"]]
    notes.append(
        f"anonymous memory of the server: {before:.0f} MiB before, at most {peak:.0f} MiB beside the scans: "
        f"{max(peak - before, 0) / found['streams']:.2f} MiB a stream"
    )
    notes.append(f"the scans together: {spread([rate / 1e6 for rate in rates], '{:.1f}')} M rows/s")
    header = ["lookups of 100 keys", "", "p50 µs: min / median / max", "p99 µs"]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n", []


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


def cancel_report(found):
    left = ", ".join(f"{name} {value:g}" for name, value in found["left"].items()) or "none"
    rows = [
        ["streams opened and cancelled", f"{found['streams']:,} in {found['seconds']:.1f} s"],
        ["gauges of what is under way", ", ".join(f"`{name}`" for name in found["gauges"])],
        ["of these not at zero 10 s later" if found["left"] else f"not at zero {found['settled']:.2f} s later", left],
        ["anonymous memory before and after", " and ".join(f"{found[w]['rss'] / 2**20:.0f} MiB" for w in ("before", "after"))],
        ["open files before and after", " and ".join(str(found[w]["files"]) for w in ("before", "after"))],
    ]
    note = "\n- cancelled unread, after the schema, or after a batch; connections stay open (goal: every gauge at zero)\n"
    return table(["", ""], rows) + "\n" + note, []


REPORTS = {
    "lookups": lookups_report,
    "half": half_report,
    "requests": requests_report,
    "many": many_report,
    "cancel": cancel_report,
}

if __name__ == "__main__":
    main()
