"""Client processes of the lookup benchmarks: one host that forks CLIENTS children, each with a client of its own.

    workers.py CLIENTS KIND OPTIONS        (started by `Workers`, which speaks JSON lines with it)

Children are forked before any client exists, because gRPC and forks do not mix. An order goes to the first children;
they prepare, begin together, and report.
"""

import base64
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

WARM_SECONDS = 0.1
PACKAGE = Path(__file__).resolve().parents[1] / "python"  # Pinion's own Python client


class Workers:
    """The host as seen from the benchmark."""

    def __init__(self, kind, options, clients=8, python=None, env=None):
        self.process = subprocess.Popen(
            [str(python or sys.executable), str(Path(__file__).resolve()), str(clients), kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**(env or os.environ), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(PACKAGE)},
        )
        self.kind = kind

    def order(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.reply()

    def reply(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.kind} clients ended")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"{self.kind}: {reply['error']}")
        return reply

    def check(self, ids):
        """The reply to these keys as a table."""
        reply = self.order(do="check", ids=[int(i) for i in ids], clients=1)
        return pa.ipc.open_stream(base64.b64decode(reply["table"])).read_all()

    def call(self, method, **arguments):
        """What a method of the first client returns."""
        return self.order(do="call", clients=1, method=method, arguments=arguments)["returned"][0]

    def start(self, clients, method, **arguments):
        """Calls a method of so many clients at once, without waiting: `finish` returns what they return."""
        order = {"do": "call", "clients": clients, "method": method, "arguments": arguments}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def finish(self):
        return self.reply()["returned"]

    def run(self, clients, keys, seconds, among, step, seed, rate=None):
        """Asks for `keys` keys a request, drawn from `among` keys that lie `step` apart, for so many seconds.

        Without `rate` the next request follows the reply (saturation); with it, so many requests a second in all.
        """
        each = rate / clients if rate else None
        order = {"keys": keys, "seconds": seconds, "among": among, "step": step, "seed": seed, "rate": each}
        return self.order(do="run", clients=clients, **order)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def host(clients, kind, options):
    context = multiprocessing.get_context("fork")
    pipes = []
    for number in range(clients):
        ours, theirs = context.Pipe()
        context.Process(target=child, args=(kind, options, number, theirs), daemon=True).start()
        theirs.close()
        pipes.append(ours)
    for line in sys.stdin:
        order = json.loads(line)
        asked = pipes[: order.pop("clients")]
        for pipe in asked:
            pipe.send(order)
        replies = [pipe.recv() for pipe in asked]  # ready, or an error
        if order["do"] == "run" and not any("error" in reply for reply in replies):
            begin = time.monotonic() + 0.02
            for pipe in asked:
                pipe.send(begin)
            replies = [pipe.recv() for pipe in asked]
        print(json.dumps(merge(order, replies)), flush=True)
    for pipe in pipes:
        pipe.close()


def merge(order, replies):
    if errors := [reply for reply in replies if "error" in reply]:
        return errors[0]
    if order["do"] == "call":
        return {"returned": [reply["returned"] for reply in replies]}
    if order["do"] != "run":
        return replies[0]
    latencies = np.concatenate([reply["latencies"] for reply in replies]) * 1e6
    seconds = max(reply["seconds"] for reply in replies)
    return {
        "requests": len(latencies),
        "requests_per_second": sum(len(reply["latencies"]) / reply["seconds"] for reply in replies),
        "keys_per_second": sum(len(reply["latencies"]) / reply["seconds"] for reply in replies) * order["keys"],
        "p50_micros": float(np.percentile(latencies, 50)),
        "p99_micros": float(np.percentile(latencies, 99)),
        "client_cpu_seconds": sum(reply["cpu"] for reply in replies),
        "seconds": seconds,
        "sent": sum(reply["sent"] for reply in replies),
    }


def child(kind, options, number, pipe):
    from clients import KINDS

    client = None
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            client = client or KINDS[kind](**options)
            if order["do"] == "check":
                pipe.send(check(client, order))
            elif order["do"] == "call":
                pipe.send({"returned": getattr(client, order["method"])(**order["arguments"])})
            else:
                run(client, order, number, pipe)
        except Exception as error:  # told to the benchmark, which ends
            pipe.send({"error": f"{type(error).__name__}: {error}"[:2000]})
            client = None


def check(client, order):
    ids = np.array(order["ids"], np.int64)
    reply = client.ask(client.requests([ids])[0])
    batch = client.typed(reply, ids)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch) if isinstance(batch, pa.RecordBatch) else writer.write_table(batch)
    return {"table": base64.b64encode(sink.getvalue()).decode()}


def run(client, order, number, pipe):
    generator = np.random.default_rng([order["seed"], number])
    count = max(8, min(5_000, client.PREPARED_KEYS // order["keys"]))
    ids = generator.integers(0, order["among"], (count, order["keys"])) * order["step"]
    requests = client.requests(list(ids))
    warmed, until = 0, time.monotonic() + WARM_SECONDS
    while warmed < 2 or (warmed < 20 and time.monotonic() < until):
        client.ask(requests[warmed % len(requests)])
        warmed += 1
    pipe.send({"ready": True})
    begin = pipe.recv()
    while time.monotonic() < begin:
        pass
    cpu = time.process_time()
    if order["rate"]:
        latencies, seconds = paced(client.ask, requests, order["seconds"], order["rate"], number)
    else:
        latencies, seconds = closed(client.ask, requests, order["seconds"])
    pipe.send(
        {
            "latencies": np.array(latencies),
            "seconds": seconds,
            "cpu": time.process_time() - cpu,
            "sent": len(latencies) + warmed,
        }
    )


def closed(ask, requests, seconds):
    """The next request follows the reply."""
    clock, latencies, count = time.perf_counter, [], len(requests)
    began = now = clock()
    end = began + seconds
    number = 0
    while now < end:
        ask(requests[number % count])
        after = clock()
        latencies.append(after - now)
        now = after
        number += 1
    return latencies, now - began


def paced(ask, requests, seconds, rate, number):
    """A request every 1/rate seconds. One that is late because the one before took long counts from its due time; the
    overshoot of our own sleep does not count."""
    clock, latencies, count = time.perf_counter, [], len(requests)
    began = clock()
    interval = 1 / rate
    due = began + interval * (number % 8) / 8
    asked = 0
    while due < began + seconds:
        now = clock()
        if now < due:
            time.sleep(due - now)
            start = clock()
        else:
            start = due
        ask(requests[asked % count])
        latencies.append(clock() - start)
        asked += 1
        due += interval
    return latencies, clock() - began


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    host(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
