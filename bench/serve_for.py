"""Pinion and its native benchmark clients, as the serving benchmarks start them."""

import json
import subprocess
import urllib.request
from functools import cache
from pathlib import Path

from harness import Server, binary

PACKAGE = Path(__file__).resolve().parents[1] / "python"


@cache
def missing_lane():
    """Why the local lane cannot be measured; empty when it can."""
    if not (PACKAGE / "pinion").is_dir():
        return "the Python client of the local lane (python/) is not in this tree"
    said = subprocess.run([str(binary()), "serve", "--help"], capture_output=True, text=True).stdout
    return "" if "--lane" in said else f"{binary()} has no --lane"


# As for a sidecar that shares few cores: the lane's threads go before the server's others.
RAISED = {"PINION__LANE__PRIORITY": 10}
RAISED_NOTE = "with lane.priority = 10, which the default is not: docs/operations.md, \"Short of cores\""


class Pinion(Server):
    """`pinion serve` on TCP, on a Unix socket, and on the local lane."""

    @property
    def unix(self):
        return f"grpc+unix://{self.uds}"

    @property
    def pid(self):
        return self.process.pid

    def metrics(self):
        """name and labels -> value, and the kinds by name, of /metrics."""
        text = urllib.request.urlopen(f"{self.admin}/metrics", timeout=10).read().decode()
        kinds = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
        values = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                values[name] = float(value)
        return values, kinds


def example(name):
    """The path of a native benchmark program (an example of the client crate), or None when it is not built."""
    path = binary().parent / "examples" / name
    return path if path.exists() else None


@cache
def understands(name, option):
    """Whether a native benchmark program has an option, by its usage."""
    return f"{option} " in subprocess.run([str(example(name)), "--help"], capture_output=True, text=True).stderr


def native(name, *arguments, timeout=300):
    """Runs a native benchmark program to its end; the JSON of each line that it prints."""
    command = [str(example(name)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
