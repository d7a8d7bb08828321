"""What docs/benchmarks.md says of each part of `scan.py`: from its figures to (text, plots)."""

import plot
from harness import median, ratios, spread, table
from serve_for import RAISED_NOTE


def full_report(found):
    rows, groups, notes = [], {}, []
    for name, runs in found["rounds"].items():
        way, client, server = name.split(" | ")
        rates, ours = [run["gb_per_second"] for run in runs], server.startswith("Pinion")
        server_cpu, client_cpu = (median([run[f"{side}_cpu_per_gb"] for run in runs]) for side in ("server", "client"))
        rows.append(
            [way, f"{client} <- {server}", spread(rates)]
            + [f"{cpu:.3f}" for cpu in (server_cpu, client_cpu, server_cpu + client_cpu)]
        )
        groups.setdefault(way, []).append((f"{client} <- {server}", rates, ours))
    for way in groups:
        for ours, peer, goal in (
            ("pyarrow | Pinion", "pyarrow | pyarrow server", "1.2x and 2x" if way != "TCP" else "0.95x and 1.2x"),
            ("own Rust | Pinion", "arrow-flight | tonic", "3x"),
            ("own Rust | Pinion", "arrow-flight | pyarrow server", "1.8x"),
        ):
            for note in each_against(found["rounds"], f"{way} | {ours}", f"{way} | {peer}"):
                notes.append(f"{way}: {note} (goal: at least {goal})")
    header = ["", "client <- server", "GB/s: min / median / max", "server CPU s/GB", "client CPU s/GB", "both"]
    for server, of in found["tried"].items():
        rates = ", ".join(f"{name} rows {rate:.2f}" for name, rate in of.items())
        notes.append(f"arrow-flight <- {server}, the settings tried beforehand: {rates} GB/s")
    notes.append(f"{found['gb']:.3f} GB of values; every peer at its best of three batch sizes in the ratios")
    body = table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    picture = plot.bars("Scan of the whole table, hot", "GB/s, median, least and greatest", list(groups.items()))
    return body, [("scan-full.svg", picture, "GB/s of whole-table scans")]


def each_against(found, ours, peers):
    """`against` for each of our settings."""
    notes = [against(found, name, peers) for name in found if name.startswith(ours)]
    return [note for note in notes if note]


def against(found, ours, peers):
    """Our ratios to the best of the peer's settings, in words; None when one side was not measured."""
    settings = {name: runs for name, runs in found.items() if name.startswith(peers)}
    if ours not in found or not settings:
        return None
    best = max(settings, key=lambda name: median([run["gb_per_second"] for run in settings[name]]))
    speed = ratios(*([run["gb_per_second"] for run in found[name]] for name in (ours, best)))
    cpu = [median([run["server_cpu_per_gb"] for run in found[name]]) for name in (best, ours)]
    return (
        f"{' <- '.join(ours.split(' | ')[1:])} against {' <- '.join(best.split(' | ')[1:])}: "
        f"{median(speed):.2f}x GB/s (rounds {spread(speed)}), {cpu[0] / max(cpu[1], 1e-9):.2f}x less server CPU per GB"
    )


def part_report(found):
    rows, notes = [], []
    for question, of in found["questions"].items():
        for name, runs in of["rounds"].items():
            way, client, server = name.split(" | ")
            wire = median([run["wire_bytes"] for run in runs])
            rows.append(
                [question, way, f"{client} <- {server}", spread([run["gb_per_second"] for run in runs])]
                + [f"{median([run[f'{side}_cpu_per_gb'] for run in runs]):.3f}" for side in ("server", "client")]
                + [f"{wire / 1e6:.2f} MB, {wire / (of['gb'] * 1e9) - 1:+.1%}" if wire else ""]
            )
        for way in ("Unix socket", "TCP"):
            for ours, peer in (("pyarrow", "pyarrow"), ("own Rust", "arrow-flight")):
                for note in each_against(of["rounds"], f"{way} | {ours} | Pinion", f"{way} | {peer} | pyarrow server"):
                    notes.append(f"{question}, {way}: {note}")
        notes.append(f"{question}: the ideal is {of['gb'] * 1e3:.2f} MB (goal: on the wire within 5 % of it)")
    notes.append("bytes on the wire are what the client's TCP socket received, HTTP/2 and gRPC framing included")
    header = [
        "",
        "",
        "client <- server",
        "GB/s: min / median / max",
        "server CPU s/GB",
        "client CPU s/GB",
        "on the wire, over the ideal",
    ]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n", []


def share_report(found):
    rows = [
        [of["replaced"], "none told" if of["share"] is None else f"{of['share']:.2%}", spread(of["gb_per_second"])]
        + [f"{of['server_cpu_per_gb']:.3f}"]
        for of in found["steps"]
    ]
    note = (
        "\n- the share is what the reply itself says; pyarrow's client over the Unix socket (goal: 99 % when clean)\n"
    )
    return table(
        ["rows replaced", "zero-copy share", "GB/s: min / median / max", "server CPU s/GB"], rows
    ) + "\n" + note, []


def copies_report(found):
    rows = [
        [
            way,
            f"{of['copy_percent']:.2f} %",
            f"{of['user_percent']:.1f} %",
            ", ".join(f"{n} {p:.1f} %" for p, _, n in of["top"][:3]),
        ]
        for way, of in found["profiles"].items()
    ]
    note = "\n- samples of the CPU clock in the server, pyarrow's client, clean table (goal: copies under 2 %)\n"
    return table(["", "user-space copies", "user space in all", "most samples"], rows) + "\n" + note, []


def cold_report(found):
    rows, notes = [], []
    for path in dict.fromkeys(run["path"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["path"] == path]
        for what in ("alone", "beside_hot", "beside_cold"):
            rows.append(
                [path, what.replace("_", " a ") + (" scan" if what != "alone" else "")]
                + [spread([run[what][f"{p}_micros"] for run in runs], "{:.0f}") for p in ("p50", "p99")]
            )
        worse = ratios(*([run[what]["p99_micros"] for run in runs] for what in ("beside_cold", "alone")))
        notes.append(f"{path}: p99 beside a cold scan {median(worse):.2f}x of alone ({spread(worse)}; goal: within 2x)")
    rates = [found["gb"] / run["scan_seconds"] for run in found["runs"]]
    stayed = max(run["resident_before"] for run in found["runs"])
    notes.append(f"the cold scan itself: {spread(rates)} GB/s; at most {stayed:.1%} of the table was in memory before")
    notes.append(RAISED_NOTE)
    header = ["lookups of 100 keys", "", "p50 µs: min / median / max", "p99 µs"]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n", []


def delivered_report(found):
    rows, notes = [], []
    for name, runs in found["rounds"].items():
        rows.append(
            [name] + [spread([run[f"{what}_seconds"] * 1e3 for run in runs], "{:.1f}") for what in ("table", "sum")]
        )
    peers = {name: runs for name, runs in found["rounds"].items() if name.startswith("pyarrow")}
    ours = found["rounds"].get("Pinion, mapped over the local lane")
    for what, text, goal in (("table", "to a checked table", 100), ("sum", "all columns summed", 5)):
        if ours:
            best = min(peers, key=lambda name: median([run[f"{what}_seconds"] for run in peers[name]]))
            faster = ratios(*([run[f"{what}_seconds"] for run in runs] for runs in (peers[best], ours)))
            notes.append(f"{text}: {median(faster):.1f}x as fast as {best} ({spread(faster)}; goal: at least {goal}x)")
    notes.append(f"{found['gb']:.3f} GB, a new process each time; its start and imports are not counted, connecting is")
    header = ["", "connect to checked table, ms: min / median / max", "and all columns summed, ms"]
    groups = [
        (
            "Checked table",
            [
                (n, [r["table_seconds"] * 1e3 for r in runs], n.startswith("Pinion"))
                for n, runs in found["rounds"].items()
            ],
        )
    ]
    groups += [
        (
            "All columns summed",
            [
                (n, [r["sum_seconds"] * 1e3 for r in runs], n.startswith("Pinion"))
                for n, runs in found["rounds"].items()
            ],
        )
    ]
    picture = plot.bars(
        "From connect to a table of 2 GB in a local process", "ms, logarithmic", groups, log=True, form="{:,.0f}"
    )
    body = table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"
    return body, [("scan-table.svg", picture, "Milliseconds from connect to a table")]


REPORTS = {
    "full": full_report,
    "part": part_report,
    "share": share_report,
    "copies": copies_report,
    "cold": cold_report,
    "table": delivered_report,
}
