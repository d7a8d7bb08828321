"""What the benchmarks share: where data lies, watching processes, interleaving, results as JSON, docs/benchmarks.md.

A benchmark either has one result (`save`) or several parts that are measured one by one (`save_part`): a part that is
not measured this time keeps its last figures.
"""

import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.process import Server, binary, environment, pinion  # noqa: F401

DATA = Path(
    os.environ.get(
        "PINION_BENCH_DATA", Path(os.environ.get("PINION_CACHE", Path.home() / ".cache" / "pinion")) / "bench"
    )
)
RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"
TICKS = os.sysconf("SC_CLK_TCK")


class Unmeasured(Exception):
    """A part cannot be measured on this machine; the message says why. The other parts go on."""


def machine():
    """What the figures were measured on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    version = subprocess.run([str(binary()), "version"], capture_output=True, text=True).stdout.strip().splitlines()
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1),
        "kernel": platform.release(),
        "pinion": " ".join(version[0].split()) if version else "",
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": os.getloadavg()[0],
    }


def watch(command, env=None, every=0.02):
    """Runs a command to its end; returns seconds, CPU seconds, and the peak of its anonymous memory in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, rss_anon(process.pid))
        time.sleep(every)
    seconds = time.monotonic() - began
    output = process.stdout.read()
    if process.returncode != 0:
        raise RuntimeError(f"{command} exited {process.returncode}\n{output}")
    return {"seconds": seconds, "peak_rss_anon_bytes": peak, "output": output}


def rss_anon(pid):
    """Anonymous resident bytes: mapped files are the page cache's, not the process's."""
    try:
        found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found.group(1)) * 1024 if found else 0
    except (FileNotFoundError, ProcessLookupError):
        return 0


def cpu_seconds(pid):
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def processes():
    """pid -> (parent, CPU seconds with those of ended children) of every process there is."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(stat.parent.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / TICKS)
    return found


def family(root):
    """pid -> CPU seconds, of a process and all below it."""
    every = processes()
    members, found = {root}, True
    while found:
        found = {pid for pid, (parent, _) in every.items() if parent in members} - members
        members |= found
    return {pid: every[pid][1] for pid in members if pid in every}


def family_cpu_seconds(root):
    """CPU so far of a process and all below it: a server that forks workers."""
    return sum(family(root).values())


class Span:
    """What else the machine did while a benchmark ran: CPU of processes that are not ours, and of other guests.

    Kernel threads count as foreign. Ours are this process and all below it.
    """

    def __enter__(self):
        self.load_before = os.getloadavg()[0]
        self.began = time.monotonic()
        self.before, self.ours = self.machine(), family_cpu_seconds(os.getpid())
        return self

    def __exit__(self, *_):
        busy, steal, total = (after - before for after, before in zip(self.machine(), self.before))
        ours = family_cpu_seconds(os.getpid()) - self.ours
        self.found = {
            "seconds": round(time.monotonic() - self.began, 1),
            "load_before": round(self.load_before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "foreign_cpu_share": round(max(0.0, busy - ours) / max(total, 1e-9), 4),
            "steal_share": round(steal / max(total, 1e-9), 4),
        }

    @staticmethod
    def machine():
        """Busy, stolen and all CPU seconds of the machine so far."""
        fields = [int(n) / TICKS for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, idle, wait, irq, softirq, steal = fields
        return user + nice + system + irq + softirq, steal, sum(fields)


STALL_SECONDS = 0.0005
READS_THE_CLOCK = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
least, last = float(sys.argv[3]), time.perf_counter()
end, total, longest = last + float(sys.argv[2]), 0.0, 0.0
while last < end:
    now = time.perf_counter()
    if now - last > least:
        total, longest = total + now - last, max(longest, now - last)
    last = now
print(total / float(sys.argv[2]), longest)
"""


def stalls(seconds=3):
    """How long processes that only read the clock, one on each core, stand still: the machine's own tail.

    {"share": of the time, in stalls of more than half a millisecond, "longest": seconds}
    """
    watchers = [
        subprocess.Popen(
            [sys.executable, "-c", READS_THE_CLOCK, str(core), str(seconds), str(STALL_SECONDS)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for core in sorted(os.sched_getaffinity(0))
    ]
    found = [[float(number) for number in watcher.communicate()[0].split()] for watcher in watchers]
    return {"share": sum(share for share, _ in found) / len(found), "longest": max(longest for _, longest in found)}


def rounds(cases, count, warm=1, limit_seconds=120):
    """name -> what each of `count` calls returned. Every case runs once a round, in another order each; the first
    `warm` rounds do not count. No round begins after the limit, but for the first that counts."""
    found = {name: [] for name in cases}
    names, began = list(cases), time.monotonic()
    for number in range(count + warm):
        if number > warm and time.monotonic() - began > limit_seconds:
            print(f"{number - warm} of {count} rounds in {limit_seconds} s: the others are left out", flush=True)
            break
        # At random, so that no case always comes after the same one: a disk that was busy may be held back for a while.
        for name in random.Random(number).sample(names, len(names)):
            result = cases[name]()
            if number >= warm:
                found[name].append(result)
    return found


def spread(values, form="{:.2f}"):
    """`min / median / max`."""
    return " / ".join(form.format(v) for v in (min(values), median(values), max(values)))


def ratios(ours, peers):
    """Ratios round by round, so that what slows one round down slows both sides of a ratio."""
    return [a / b for a, b in zip(ours, peers, strict=True)]


def copy_store(source, target):
    """A copy of a data directory: what never changes is linked, the rest copied."""

    def link_or_copy(one, other):
        if one.endswith((".arrow", ".sys", ".idx", ".stat", ".rows", ".del", ".dix")):
            os.link(one, other)
        else:
            shutil.copy2(one, other)

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=link_or_copy)
    return target


def drop_pages(files):
    """Drops files from the page cache; the share of them that stayed: what somebody maps does."""
    subprocess.run(["sync"], check=True)
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = subprocess.run(["fincore", "-b", "-n", "-o", "RES,SIZE", *files], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    return sum(resident for resident, _ in pairs) / sum(size for _, size in pairs)


def read_pages(files):
    """Brings files into the page cache."""
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(BUFFER):
                pass
    return 1.0


BUFFER = bytearray(4 << 20)


def versions(*packages):
    """name -> version of installed Python packages."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def directory_bytes(path):
    """Bytes that the files below take on disk (blocks, so that preallocated space counts)."""
    return sum(f.stat().st_blocks * 512 for f in Path(path).rglob("*") if f.is_file())


def median(values):
    return statistics.median(values)


def save(name, result):
    """Writes bench/results/NAME.json and puts the tables into docs/benchmarks.md."""
    result = {"machine": machine(), **result}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    render(name, result)
    print(f"wrote {path}")


def save_part(name, part, found, body, plots=()):
    """One part of a benchmark: into bench/results/NAME.json, and its text and plots into docs/benchmarks.md."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    whole["parts"][part] = found
    path.write_text(json.dumps(whole, indent=1) + "\n")
    show_part(name, part, found, body, plots)
    print(f"wrote {path}")


def show_part(name, part, found, body, plots=()):
    """The text and plots of one part into docs/benchmarks.md; `plots` are (file name, SVG, alternative text)."""
    pictures = []
    for file, svg, alternative in plots:
        PLOTS.mkdir(parents=True, exist_ok=True)
        (PLOTS / file).write_text(svg)
        pictures.append(f"![{alternative}](plots/{file})\n")
    insert(f"{name}-{part}", "\n".join([body, *pictures, where(found["machine"])]))


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def where(machine):
    """One paragraph: on what, with what and beside what a figure was measured."""
    text = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}; "
        f"{machine['pinion']}; {machine['when']}; load average before: {machine['load_before']:.1f}"
    )
    if span := machine.get("span"):
        text += (
            f"; {span['seconds']:.0f} s, of the machine's CPU {span['foreign_cpu_share']:.1%} went to other processes "
            f"and {span['steal_share']:.1%} to other guests"
        )
    if found := machine.get("versions"):
        text += "; " + ", ".join(f"{name} {version}" for name, version in found.items())
    return text + "\n"


def render(name, result):
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""
    notes = "\n".join(f"- {note}" for note in result["notes"])
    insert(name, f"{table(result['header'], result['rows'])}\n\n{notes}\n\n{where(result['machine'])}")


def insert(name, body):
    """Prints a body and puts it between its marks in docs/benchmarks.md."""
    print(body)
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin in text:
        head, rest = text.split(begin, 1)
        tail = rest.split(end, 1)[1]
        DOCUMENT.write_text(f"{head}{begin}\n{body}{end}{tail}")
