"""Modelled over measured as a strip of dots a group, on a logarithmic scale, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks._svg import COLOURS

WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 720, 250, 56, 56, 24, 44
TICKS = (0.25, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0, 1.11, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class Point:
    """One prediction. ``use``: "fit" if a constant was fitted on it, "judge", or "context" if shown only."""

    group: str
    ratio: float  # modelled / measured
    use: str = "judge"


def ratio_chart(title: str, points: Sequence[Point], band: float) -> str:
    """Dots by group in the order of the points; a band of ``band`` on both sides of 1.

    Fitted points are hollow, those shown only are grey and not in the mean. Dots outside four times either way are
    drawn at the edge.
    """
    groups = list(dict.fromkeys(point.group for point in points))
    reach = max([1 + 1.5 * band, *(max(p.ratio, 1 / p.ratio) for p in points)])
    reach = min(4.0, next((tick for tick in TICKS if tick >= reach), 4.0))
    height = TOP + ROW * len(groups) + BOTTOM
    right = WIDTH - RIGHT

    def across(ratio: float) -> float:
        share = (math.log(min(max(ratio, 1 / reach), reach)) / math.log(reach) + 1) / 2
        return round(LEFT + share * (right - LEFT), 1)

    foot = height - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="18" font-size="13" font-weight="bold">{escape(title)}</text>',
        f'<text x="12" y="36" fill="#444444">modelled / measured; band: {band:.0%}; hollow: a constant was fitted '
        "on it; grey: other software, shown only; right: mean |error|</text>",
        f'<rect x="{across(1 - band)}" y="{TOP}" width="{across(1 + band) - across(1 - band):.1f}" '
        f'height="{foot - TOP}" fill="#000000" fill-opacity="0.07"/>',
    ]
    labelled = -math.inf
    for tick in TICKS:
        if 1 / reach - 1e-3 <= tick <= reach + 1e-3:
            at, strong = across(tick), tick == 1.0
            colour = "#000000" if strong else "#dddddd"
            parts.append(f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{foot}" stroke="{colour}"/>')
            if at - labelled >= 26:
                parts.append(f'<text x="{at}" y="{foot + 16}" text-anchor="middle">{tick:g}</text>')
                labelled = at
    for number, group in enumerate(groups):
        own = [point for point in points if point.group == group]
        down = TOP + ROW * number + ROW / 2
        parts.append(f'<text x="{LEFT - 8}" y="{down + 4}" text-anchor="end">{escape(group)}</text>')
        parts += [_dot(across(point.ratio), down, point.use) for point in own]
        counted = [abs(point.ratio - 1) for point in own if point.use != "context"]
        if counted:
            parts.append(f'<text x="{right + 8}" y="{down + 4}">{sum(counted) / len(counted):.1%}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _dot(across: float, down: float, use: str) -> str:
    colour = "#999999" if use == "context" else COLOURS[0]
    fill = "none" if use == "fit" else colour
    return (
        f'<circle cx="{across}" cy="{down}" r="3.5" fill="{fill}" fill-opacity="0.6" stroke="{colour}" '
        'stroke-width="1.2"/>'
    )
