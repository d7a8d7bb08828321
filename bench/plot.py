"""Bar charts as SVG text: a bar from zero to the median, a line from the least to the greatest value.

No dependency, and readable on light and dark pages alike.
"""

from html import escape
from math import ceil, floor, log10

OURS, PEER, INK, FAINT = "#2f7ed8", "#9aa5b1", "#6b7280", "#d1d5db"
LINE, LEFT, RIGHT, TOP, WIDTH = 22, 340, 100, 48, 920


def bars(title, unit, groups, log=False, form="{:.3g}"):
    """An SVG. `groups` are (heading, [(label, values, ours)]): `values` are the rounds, `ours` colours the bar.

    `log` draws a logarithmic scale that begins at the power of ten below the least value.
    """
    every = [value for _, bars in groups for _, values, _ in bars for value in values if value > 0]
    least, most = (min(every), max(every)) if every else (0.1, 1)
    low, high = (floor(log10(least) - 0.05), ceil(log10(most))) if log else (0, nice(most))
    span = WIDTH - LEFT - RIGHT

    def x(value):
        if not log:
            return LEFT + span * value / high
        return LEFT + span * (log10(max(value, 10**low)) - low) / max(high - low, 1)

    rows = sum(len(bars) + 1 for _, bars in groups)
    height = TOP + rows * LINE + 34
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f'<text x="8" y="20" font-size="14" font-weight="600">{escape(title)}</text>',
        f'<text x="{WIDTH - 8}" y="20" text-anchor="end">{escape(unit)}</text>',
    ]
    marks = [10**n for n in range(low, high + 1)] if log else [high * n / 4 for n in range(5)]
    for mark in marks:
        out.append(f'<line x1="{x(mark):.1f}" y1="{TOP - 12}" x2="{x(mark):.1f}" y2="{height - 26}" stroke="{FAINT}"/>')
        out.append(f'<text x="{x(mark):.1f}" y="{height - 10}" text-anchor="middle">{form.format(mark)}</text>')
    y = TOP
    for heading, found in groups:
        out.append(f'<text x="8" y="{y + 4}" font-weight="600">{escape(heading)}</text>')
        y += LINE
        for label, values, ours in found:
            out += bar(label, sorted(values), OURS if ours else PEER, x, y, form)
            y += LINE
    return "\n".join([*out, "</svg>"]) + "\n"


def bar(label, values, colour, x, y, form):
    middle = values[len(values) // 2] if len(values) % 2 else sum(values[len(values) // 2 - 1 :][:2]) / 2
    low, high = x(values[0]), x(values[-1])
    return [
        f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text>',
        f'<rect x="{LEFT}" y="{y - 6}" width="{max(x(middle) - LEFT, 1):.1f}" height="13" fill="{colour}"/>',
        f'<line x1="{low:.1f}" y1="{y + 0.5}" x2="{high:.1f}" y2="{y + 0.5}" stroke="{INK}" stroke-width="1.5"/>',
        f'<text x="{max(high, x(middle)) + 6:.1f}" y="{y + 4}">{form.format(middle)}</text>',
    ]


def nice(value):
    """The least of 1, 2, 2.5, 4, 5 or 10 times a power of ten that is not below."""
    power = 10 ** floor(log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 10) if step * power >= value * 0.999)
