"""A log-log chart as SVG text: modelled lines and published points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from benchmarks._svg import COLOURS

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 420, 56, 20, 130, 46


def log_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    points: Sequence[tuple[str, float, float]],
    x_label: str,
    y_label: str,
) -> str:
    """Lines by name (one ending in "TCP" is dashed and has the colour of its namesake) and points (series, x, y)."""
    xs = [x for line in series.values() for x, _ in line]
    ys = [y for line in series.values() for _, y in line] + [y for _, _, y in points]
    x0, x1 = math.log10(min(xs)), math.log10(max(xs))
    y0, y1 = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (math.log10(x) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (y1 - math.log10(y)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    bases = list(dict.fromkeys(name.split()[0] for name in series))
    colour = {base: COLOURS[i % len(COLOURS)] for i, base in enumerate(bases)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for power in range(y0, y1 + 1):
        _, down = at(min(xs), 10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{10.0**power:g}</text>')
    for x in sorted(set(xs)):
        label = f"{x / 1000:g}K" if x < 1e6 else f"{x / 1e6:g}M"
        parts.append(
            f'<text x="{at(x, 10.0**y0)[0]}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'
        )
    for name, line in series.items():
        path = " ".join(f"{'ML'[i > 0]}{at(*point)[0]},{at(*point)[1]}" for i, point in enumerate(line))
        dashes = ' stroke-dasharray="4 3"' if name.endswith("TCP") else ""
        tone = colour[name.split()[0]]
        parts.append(f'<path d="{path}" fill="none" stroke="{tone}" stroke-width="1.5"{dashes}/>')
    for name, x, y in points:
        across, down = at(x, y)
        parts.append(
            f'<circle cx="{across}" cy="{down}" r="4" fill="{colour[name.split()[0]]}" stroke="black"/>'
        )
    for i, base in enumerate(bases):
        top = TOP + 12 + 16 * i
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 10}" y="{top - 8}" width="9" height="9" fill="{colour[base]}"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 24}" y="{top}">{escape(base)}</text>')
    top = TOP + 12 + 16 * len(bases)
    for i, text in enumerate(("line: RDMA, model", "dashes: TCP, model", "dot: published")):
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{top + 14 * i}">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14,{HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text></svg>'
    )
    return "\n".join(parts) + "\n"
