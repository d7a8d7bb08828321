"""Checks that every dependency may be used: its licence expression, against the list in deny.toml.

The part of cargo-deny that needs no network and no installation. Exit status 1 names what does not fit.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def allowed():
    """The licences of deny.toml (read by hand: tomllib is in Python 3.11 and newer only)."""
    text = (ROOT / "deny.toml").read_text()
    block = re.search(r"^allow = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE).group(1)
    return set(re.findall(r'"([^"]+)"', block))


def satisfied(expression, fine):
    """True when one side of every OR, and all of every AND, is allowed."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))

    def either(position):
        value, position = both(position)
        while position < len(tokens) and tokens[position] == "OR":
            other, position = both(position + 1)
            value = value or other
        return value, position

    def both(position):
        value, position = one(position)
        while position < len(tokens) and tokens[position] == "AND":
            other, position = one(position + 1)
            value = value and other
        return value, position

    def one(position):
        if tokens[position] == "(":
            value, position = either(position + 1)
            return value, position + 1
        name = tokens[position]
        if position + 2 < len(tokens) and tokens[position + 1] == "WITH":
            name = f"{name} WITH {tokens[position + 2]}"
            return name in fine or tokens[position] in fine, position + 3
        return name in fine, position + 1

    return either(0)[0]


def main():
    metadata = json.loads(
        subprocess.run(
            [
                "cargo",
                "metadata",
                "--format-version",
                "1",
                "--locked",
                "--offline",
                "--filter-platform",
                "x86_64-unknown-linux-gnu",
            ],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    fine = allowed()
    bad = [
        f"{package['name']} {package['version']}: {package['license'] or 'no licence named'}"
        for package in metadata["packages"]
        if not package["license"] or not satisfied(package["license"], fine)
    ]
    print(f"{len(metadata['packages'])} packages, {len(bad)} with a licence that deny.toml does not allow")
    for line in bad:
        print(f"  {line}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
