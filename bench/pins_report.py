"""What docs/benchmarks.md says of each part of `pins.py`: from its figures to (text, plots)."""

from harness import median, ratios, spread, table

WITH_NULLS = "pin, frozen, 1% null"


def load_report(found):
    rows, notes = [], []
    for cache, peers in (("cold", "fio"), ("warm", "copy")):
        runs = {name: [run["gb_per_second"] for run in runs] for name, runs in found["rounds"][cache].items()}
        best = max((name for name in runs if name.startswith(peers)), key=lambda name: median(runs[name]))
        for name, rates in runs.items():
            ours = not name.startswith(peers)
            share = spread(ratios(rates, runs[best])) if ours else "the best" if name == best else ""
            rows.append([cache, name, spread(rates), share])
    for name in ("pin, frozen", "pin, fresh", WITH_NULLS):
        [first, *_] = found["rounds"]["warm"][name]
        encoded = sum(first["encoded_bytes"].values())
        notes.append(
            f"{name}: {first['loaded_bytes'] / 1e9:.2f} GB loaded and {encoded / 1e9:.2f} GB made on the host, of which "
            f"{first['encoded_bytes']['validity'] / 1e9:.2f} GB validity of columns without nulls (a byte for each value; of a frozen pin "
            f"once for all of them) and {first['encoded_bytes']['nulls'] / 1e9:.2f} GB nulls and validity of columns with nulls"
        )
    stayed = max(run["resident_before"] for name in ("pin, frozen", "pin, fresh", "files") for run in found["rounds"]["cold"][name])
    notes += [
        f"{found['rows']:,} rows in {found['files']} segment{'s' * (found['files'] > 1)}, {found['file_bytes'] / 1e9:.2f} GB; "
        f"before a cold load at most {stayed:.1%} of the table was in the page cache",
        "fio: blocks of 1 MiB, O_DIRECT, libaio, jobs x reads under way in each; every job reads a part of its own",
        "the index of the keys is made after the values can be leased, of a fresh pin at once: it took "
        + " and ".join(
            f"{median(run['index_seconds'] for run in found['rounds'][cache]['pin, fresh']):.1f} s ({cache})"
            for cache in found["rounds"]
        ),
        "goal: at least 0.9 of the best of fio and of the best copy",
    ]
    header = ["page cache", "", "GB/s: min / median / max", "of the best peer"]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n", []


def fresh_report(found):
    rows, notes = [], []
    for name, run in found["runs"].items():
        figures, fresh = run["figures"], run["freshness_ms"]
        generations = max(figures["generations"], 1)
        rows.append(
            [
                name,
                *(f"{fresh[p]:.1f}" for p in ("p50", "p99", "max")),
                f"{figures['generations']:,}",
                f"{figures['written_bytes'] / generations / 1e3:,.0f}",
                f"{figures['written_bytes'] / max(figures['edit_bytes'], 1):.2f}x",
                f"{figures['stalls']} ({run['stalled_ms']:.0f} ms)",
                figures["rebuilds"] + figures["compactions"],
                f"{run['compared']['generations']} of {run['leases']}",
                f"{run['cpu_seconds'] / run['seconds']:.2f}",
            ]
        )
        missed = f" and {run['commits_missed']} that came into no generation" if run["commits_missed"] else ""
        delay = f"; each operation starts {run['delay_micros']} µs late" if run["delay_micros"] else ""
        notes.append(
            f"{name}: {run['commits']:,} commits{missed}, the latest {run['updates_late_ms']:.0f} ms behind its time; "
            f"{run['slots_now']} slots of {run['device_bytes'] / run['slots_now'] / 1e6:,.0f} MB, "
            f"{figures['whole_copies']} copied whole; in the {run['warm']['seconds']} s before, {run['warm']['figures']['whole_copies']} "
            f"copied whole and at most {run['warm']['freshness_ms']['max']:.0f} ms{delay}"
        )
    [first, *_] = found["runs"].values()
    notes += [
        f"{first['keys']:,} keys, {first['rows_a_second']:,} rows a second for {first['seconds']} s in 100 commits a second; "
        f"{first['slots']} slots, at most {first['max_slots']}; {first['warm']['seconds']} s of the same before do not count: then the "
        "slots of the new pin are filled by whole copies, and one is added for the second lease",
        "compared: of the generations that were leased, those whose every value and positions were compared with the "
        "snapshot that they name; all were equal, or the run would have failed",
        "changed bytes: what the changed rows take in a slot, validity included; written: into all slots, copies of whole "
        "slots included",
        "goals: p99 < 50 ms on the fake driver, at most 4x the changed bytes, no reload",
    ]
    header = ["", "commit to generation, ms: p50", "p99", "max", "generations", "KB written each", "of the changed bytes"]
    header += ["stalls", "reloads", "compared", "cores"]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n", []


REPORTS = {"load": load_report, "fresh": fresh_report}
