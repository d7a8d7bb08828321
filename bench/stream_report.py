"""What docs/benchmarks.md says of each part of `stream.py`: from its figures to (text, plots)."""

import plot
from harness import median, ratios, spread, table
from serve_for import RAISED_NOTE


def freshness_report(found):
    rows, groups = [], []
    for rate, run in found["rates"].items():
        seen = run["found"]
        for name, key in (("bare consumer", "bare_micros"), ("looked up", "whole_micros"), ("Pinion's share", "added_micros")):
            figures = seen[key]
            rows.append(
                [f"{int(rate):,}", name]
                + [f"{figures[p] / 1e3:.2f}" for p in ("p50", "p90", "p99", "max")]
                + [f"{seen['sentinels']:,}"]
            )
        groups.append(
            (
                f"{int(rate):,} events/s, p99",
                [
                    ("bare consumer", [seen["bare_micros"]["p99"] / 1e3], False),
                    ("looked up", [seen["whole_micros"]["p99"] / 1e3], True),
                    ("Pinion's share", [seen["added_micros"]["p99"] / 1e3], True),
                ],
            )
        )
    notes = []
    for rate, run in found["rates"].items():
        cpu = ", ".join(f"{name} {cores:.2f}" for name, cores in run["cpu_cores"].items())
        fresh = (run["table"] or {}).get("freshness") or {}
        inside = fresh.get("received", {})
        notes.append(
            f"{int(rate):,} events/s: cores used: {cpu}; the server's own figure from received to visible: "
            f"p50 {inside.get('p50_ms', 0):.2f} ms, p99 {inside.get('p99_ms', 0):.2f} ms"
        )
    notes.append("goals at 10,000 events/s: Pinion's share p50 < 2 ms and p99 < 5 ms; looked up p50 < 3 ms and p99 < 10 ms")
    body = table(["events/s", "read by", "p50 ms", "p90", "p99", "max", "sentinels"], rows)
    body += "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    picture = plot.bars("From produce to read", "milliseconds, p99", groups, form="{:.2f}")
    return body, [("stream-freshness.svg", picture, "Milliseconds from produce to read")]


def throughput_report(found):
    rows, groups = [], []
    for name, run in found["formats"].items():
        shares = ratios([r["rows_per_second"] for r in run["pinion"]], [r["rows_per_second"] for r in run["ceiling"]])
        rows.append(
            [
                name,
                spread([r["rows_per_second"] / 1e3 for r in run["pinion"]], "{:,.0f}"),
                f"{median([r['cpu_micros_per_row'] for r in run['pinion']]):.2f}",
                spread([r["rows_per_second"] / 1e3 for r in run["ceiling"]], "{:,.0f}"),
                f"{median([r['cpu_micros_per_row'] for r in run['ceiling']]):.2f}",
                spread(shares),
                f"{run['bytes'] / run['rows']:,.0f}",
            ]
        )
        groups.append(
            (
                name,
                [
                    ("Pinion", [r["rows_per_second"] for r in run["pinion"]], True),
                    ("consume and decode", [r["rows_per_second"] for r in run["ceiling"]], False),
                ],
            )
        )
    notes = ["goal: at least 0.6 of consuming and decoding alone, in each format"]
    if peer := found.get("redis"):
        rate = median([r["rows"] / r["seconds"] for r in peer])
        notes.append(f"a Python consumer into Redis (JSON, pipelines of 1,000 HSET): {rate:,.0f} rows/s")
        for name, goal in (("json", 3), ("arrow-10000", 20)):
            if run := found["formats"].get(name):
                more = median([r["rows_per_second"] for r in run["pinion"]]) / rate
                notes.append(f"Pinion, {name}: {more:.1f}x of that (goal: {goal}x)")
    header = ["format", "k rows/s: min / median / max", "CPU µs/row", "consume and decode alone", "CPU", "share", "bytes/row"]
    body = table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    picture = plot.bars("Rows a second from a filled topic", "logarithmic", groups, log=True, form="{:,.0f}")
    return body, [("stream-throughput.svg", picture, "Rows a second of every format")]


def beside_report(found):
    rows = []
    for name, key, form in (
        ("lookup p50, µs", "p50_micros", "{:,.0f}"),
        ("lookup p99, µs", "p99_micros", "{:,.0f}"),
        ("scan, GB/s", "scan_gb_per_second", "{:.2f}"),
    ):
        paused, reading = ([r[key] for r in found["rounds"][state]] for state in ("paused", "reading"))
        worse = ratios(reading, paused) if "micros" in key else ratios(paused, reading)
        rows.append([name, spread(paused, form), spread(reading, form), spread(worse)])
    notes = [
        f"{found['rate']:,} events a second into a table of {found['table_rows']:,} rows; 1,000 lookups of 100 keys a second "
        "over the lane, then whole scans over the Unix socket",
        f"at the end {found['segments']} segments, {found['superseded']:.0%} of their rows superseded",
        RAISED_NOTE,
        "goal: within 2x",
    ]
    header = ["", "source paused: min / median / max", "reading", "times worse"]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n", []


def backlog_report(found):
    rows = [[name, value] for name, value in found["figures"].items()]
    notes = ["goal: memory bounded by the budget; p99 as before within 1 s of catching up"]
    return table(["", ""], rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n", []


REPORTS = {
    "freshness": freshness_report,
    "throughput": throughput_report,
    "beside": beside_report,
    "backlog": backlog_report,
}
