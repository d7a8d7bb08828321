"""The ways to look keys up that are compared, and one timed run of each."""

import re
import resource
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import redis_fill
import serving
from harness import cpu_seconds, family_cpu_seconds
from peers import FEAST_PYTHON, Feast, Redis
from serve_for import example, missing_lane, native, understands
from serving import REDIS_STEP
from workers import Workers

SECONDS = 0.5
NATIVE_WARM = 0.2
SCHEMA = [(field.name, str(field.type)) for field in serving.SCHEMA]
# The settings of redis-py, the first of them its best as a rule; all are printed.
REDIS_SETTINGS = {
    "redis-py, hiredis, pipelined HMGET": {},
    "redis-py, hiredis, one HMGET after the other": {"pipeline": False},
    "redis-py without hiredis, pipelined HMGET": {"hiredis": False},
}
REDIS_TYPED = "redis-py, hiredis, pipelined HMGET, typed Arrow"
REDIS_PACKED = "redis-py, hiredis, MGET of packed rows, typed Arrow"
LANE, FLIGHT, NATIVE = "local lane, Python", "Flight, pyarrow", "local lane, native"
# Server and client look for the next message so long before they sleep.
LANE_POLL, POLL_MICROS = f"{LANE}, busy-poll", 300
# How the native client reads replies.
READS = {NATIVE: "batch", f"{NATIVE}, values in place": "columns"}


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


def polling_paths(stack, pinion, name="profile", features=serving.FEATURES):
    """As `pinion_paths`, of a server that polls: one client, which polls too."""
    how = {"socket": str(pinion.lane), "table": name, "features": list(features), "spin_micros": POLL_MICROS}
    return {LANE_POLL: stack.enter_context(Workers("lane", how, 1))}


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
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def has_native():
    return example("lane_bench") is not None and not missing_lane()


def lane_bench(pinion, name, features, clients, keys, asked, seconds=SECONDS, rate=None, read="batch", depth=1):
    """The native client of the local lane, `clients` connections of it.

    `read`: "batch" gives validated Arrow batches, "columns" checks and reads every value in place. `depth` requests are
    under way on each connection.
    """
    among, step = asked
    spaced = understands("lane_bench", "--key-step")

    def one():
        arguments = ["--lane", f"lane://{pinion.lane}", "--features", ",".join(f"{name}:{f}" for f in features)]
        arguments += ["--connections", clients, "--keys", keys, "--depth", depth, "--read", read]
        arguments += ["--key-to", among, "--seconds", seconds, "--warm", NATIVE_WARM]
        arguments += ["--key-step", step] if spaced else []
        arguments += ["--rate", rate] if rate else []
        [found] = native("lane_bench", *arguments)
        found["requests"] = found["requests_per_second"] * seconds
        found["sent"] = found["requests"] * (seconds + NATIVE_WARM) / seconds
        return found

    return lambda: timed(one, Cpu(pinion.pid), keys)
