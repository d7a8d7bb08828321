"""What docs/benchmarks.md says of each part of `lookup.py`: from its figures to (text, plots)."""

import plot
from harness import median, ratios, spread, table
from lookup_paths import FLIGHT, LANE, LANE_POLL, NATIVE, POLL_MICROS, REDIS_PACKED, REDIS_SETTINGS, REDIS_TYPED
from serve_for import RAISED_NOTE

FEASTS = ("Feast SDK, to_dict", "Feast SDK, to_arrow", "feast serve")


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
                + [
                    f"{median([run[f'{side}_cpu_micros_per_key'] for run in runs]):.2f}"
                    for side in ("server", "client")
                ]
            )
            ours = path.startswith((LANE, FLIGHT, NATIVE))
            if of != "all" and not (ours and of == "Feast's"):
                bars.append((path, [run["keys_per_second"] for run in runs], ours))
        groups.append((f"{keys:,} keys, {clients} client{'s' * (clients > 1)}", bars))
    for keys, ours, peers, of, goal in (
        (1, LANE, tuple(REDIS_SETTINGS), "Redis's", "at or under it"),
        (100, LANE, tuple(REDIS_SETTINGS), "Redis's", "12x"),
        (1_000, LANE, tuple(REDIS_SETTINGS), "Redis's", "50x"),
        (1, LANE_POLL, tuple(REDIS_SETTINGS), "Redis's", "at or under it"),
        (100, LANE_POLL, tuple(REDIS_SETTINGS), "Redis's", "12x"),
        (1_000, LANE_POLL, tuple(REDIS_SETTINGS), "Redis's", "50x"),
        (100, LANE, (REDIS_TYPED,), "Redis's", "none, the like for like"),
        (100, LANE, (REDIS_PACKED,), "Redis's", "none"),
        (100, f"{FLIGHT}, Unix socket", tuple(REDIS_SETTINGS), "Redis's", "8x"),
        (100, LANE, ("Feast SDK, to_dict", "Feast SDK, to_arrow", "feast serve"), "Feast's", "30x"),
        (
            100,
            f"{FLIGHT}, Unix socket",
            ("Feast SDK, to_dict", "Feast SDK, to_arrow", "feast serve"),
            "Feast's",
            "none",
        ),
    ):
        if note := faster(found["rounds"][f"{keys} | 1"], ours, peers, of):
            notes.append(f"K = {keys:,}, 1 client: {note} (goal: {goal})")
    cases = found["rounds"]["100 | 1"]
    if f"{NATIVE} | Redis's" in cases:
        rates = ([run["keys_per_second"] for run in cases[f"{name} | Redis's"]] for name in (NATIVE, "redis-benchmark"))
        more = ratios(*rates)
        notes.append(
            f"K = 100, 1 client: {NATIVE} {median(more):.1f}x the keys/s of redis-benchmark ({spread(more)}; goal: 5x)"
        )
    notes += [
        f"busy-poll: the server (`lane.spin_micros`) and the client (`spin_micros`) look for the next message for "
        f"{POLL_MICROS} µs before they sleep; while a client asks, that takes two cores",
        "keys: whose keys are asked, uniformly: one in ten of Pinion's (Redis's), one in a hundred (Feast's), or all; the "
        "native client, where its release has no `--key-step`, asks for as many keys that lie side by side",
        "replies are typed Arrow, checked against the file, but where it says otherwise: redis-py's stay bytes without "
        "`typed`, redis-benchmark does not look at them, Feast's are dictionaries without `to_arrow`",
    ]
    header = [
        "K",
        "clients",
        "path",
        "keys",
        "p50 µs: min / median / max",
        "p99 µs",
        "keys/s",
        "server CPU µs/key",
        "client",
    ]
    body = table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    picture = plot.bars(
        "Lookups, keys a second", "logarithmic; keys of the peer's set", groups, log=True, form="{:,.0f}"
    )
    return body, [("lookup-lookups.svg", picture, "Keys a second of every path and peer")]


def faster(cases, ours, peers, of):
    """How much sooner a median reply comes than the best peer's; None when one side was not measured."""
    settings = {name: runs for name, runs in cases.items() if name.split(" | ")[0] in peers}
    mine = cases.get(f"{ours} | {of}")
    if mine is None or not settings:
        return None
    best = min(settings, key=lambda name: median([run["p50_micros"] for run in settings[name]]))
    times = ratios(*([run["p50_micros"] for run in runs] for runs in (settings[best], mine)))
    return f"p50 of {ours}: {median(times):.2f}x as fast as {best.split(' | ')[0]} ({spread(times)})"


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
        "\n- 8 clients, each with a request every so often; one that is late because the one before took long counts "
        "from when it was due\n- goal for Pinion: p99 at most 3x p50\n"
    )
    if stood := found.get("stalls"):
        shares = " / ".join(f"{of['share']:.1%}" for of in stood)
        notes += (
            f"- the machine's own tail: processes that only read the clock, one on each core, stood still for longer than "
            f"0.5 ms at a time in {shares} of it (before, between and after), {max(of['longest'] for of in stood) * 1e3:.1f} ms "
            "at the longest: as many requests are late whatever is asked\n"
        )
    header = ["K", "path", "requests/s at saturation", "at half of it: p50 µs", "p99 µs", "p99 / p50"]
    return table(header, rows) + "\n" + notes, []


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
    notes = (
        f"\n- best: {rate:,.0f} requests/s, {path}, {clients} clients (goal: 65,000 by the native client on 2 cores)\n"
    )
    header = [
        "path",
        "clients",
        "requests/s: min / median / max",
        "p50 µs",
        "p99 µs",
        "server CPU µs/request",
        "client",
    ]
    picture = plot.bars("10 keys by 50 features at saturation", "requests/s", list(groups.items()), form="{:,.0f}")
    return table(header, rows) + "\n" + notes, [("lookup-requests.svg", picture, "Requests a second")]


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
    copied = found["rss_peak_copied"] / 2**20
    notes.append(
        f"anonymous memory of the server: {before:.0f} MiB before, at most {peak:.0f} MiB beside the scans, "
        f"{max(peak - before, 0) / found['streams']:.2f} MiB a stream; at most {copied:.0f} MiB, "
        f"{max(copied - before, 0) / found['streams']:.2f} MiB a stream, when a filter has every row copied "
        "(bound: about 16 MiB a stream, docs/design.md)"
    )
    notes.append(f"the scans together: {spread([rate / 1e6 for rate in rates], '{:.1f}')} M rows/s")
    notes.append(RAISED_NOTE)
    header = ["lookups of 100 keys", "", "p50 µs: min / median / max", "p99 µs"]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n", []


def cancel_report(found):
    left = ", ".join(f"{name} {value:g}" for name, value in found["left"].items()) or "none"
    rows = [
        ["streams opened and cancelled", f"{found['streams']:,} in {found['seconds']:.1f} s"],
        ["gauges of what is under way", ", ".join(f"`{name}`" for name in found["gauges"])],
        ["of these not at zero 10 s later" if found["left"] else f"not at zero {found['settled']:.2f} s later", left],
        [
            "anonymous memory before and after",
            " and ".join(f"{found[w]['rss'] / 2**20:.0f} MiB" for w in ("before", "after")),
        ],
        ["open files before and after", " and ".join(str(found[w]["files"]) for w in ("before", "after"))],
    ]
    note = (
        "\n- cancelled unread, after the schema, or after a batch; connections stay open (goal: every gauge at zero)\n"
    )
    return table(["", ""], rows) + "\n" + note, []


REPORTS = {
    "lookups": lookups_report,
    "half": half_report,
    "requests": requests_report,
    "many": many_report,
    "cancel": cancel_report,
}
