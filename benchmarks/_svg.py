"""A line chart as SVG text, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

# Okabe and Ito 2008, "Color Universal Design": distinguishable by colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 460, 300, 64, 34, 16, 46

Point = tuple[float, float, float]
"""x, y, half the length of the error bar."""


def line_chart(
    charts: Sequence[tuple[str, Mapping[str, Sequence[Point]], tuple[str, float, float] | None]],
    x_label: str,
    y_label: str,
) -> str:
    """Charts side by side.

    Args:
        charts: title, points of each series by name, and a horizontal reference line (name, value, half the
            height of its band) or None.
        x_label, y_label: of every chart.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(charts)} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH * len(charts)}" height="{HEIGHT}" fill="white"/>',
    ]
    for index, (title, series, reference) in enumerate(charts):
        parts += [f'<g transform="translate({index * WIDTH},0)">', *_chart(title, series, reference)]
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts += [
            f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
            f'<text transform="translate(14,{HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
            "</g>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _chart(
    title: str, series: Mapping[str, Sequence[Point]], reference: tuple[str, float, float] | None
) -> list[str]:
    points = [point for line in series.values() for point in line]
    lows = [y - e for _, y, e in points] + ([reference[1] - reference[2]] if reference else [])
    highs = [y + e for _, y, e in points] + ([reference[1] + reference[2]] if reference else [])
    x0, x1 = min(x for x, _, _ in points) - 0.5, max(x for x, _, _ in points) + 0.5
    pad = 0.06 * (max(highs) - min(lows)) or 1e-3
    y0, y1 = min(lows) - pad, max(highs) + pad

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{escape(title)}</text>']
    for tick in range(5):
        y = y0 + (y1 - y0) * tick / 4
        _, down = at(x0, y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{y:.4f}</text>')
    for x in sorted({round(x) for x, _, _ in points}):
        across, down = at(x, y0)
        parts.append(f'<text x="{across}" y="{down + 16}" text-anchor="middle">{x}</text>')
    if reference:
        name, value, half = reference
        _, above = at(x0, value + half)
        _, below = at(x0, value - half)
        _, middle = at(x0, value)
        parts.append(
            f'<rect x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{above}" height="{round(below - above, 1)}" '
            'fill="#000000" fill-opacity="0.08"/>'
        )
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{middle}" y2="{middle}" stroke="black" stroke-dasharray="4 3"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{middle - 4}" text-anchor="end">{escape(name)}</text>')
    for number, (name, line) in enumerate(series.items()):
        parts += _series(name, sorted(line), COLOURS[number % len(COLOURS)], number, at)
    return parts


def _series(name: str, line: Sequence[Point], colour: str, number: int, at: object) -> list[str]:
    assert callable(at)
    path = " ".join(f"{'ML'[i > 0]}{at(x, y)[0]},{at(x, y)[1]}" for i, (x, y, _) in enumerate(line))
    parts = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
    for x, y, error in line:
        across, down = at(x, y)
        above, below = at(x, y + error)[1], at(x, y - error)[1]
        parts.append(f'<line x1="{across}" x2="{across}" y1="{above}" y2="{below}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}"/>')
    left = LEFT + 10 + 95 * (number % 4)
    top = TOP - 4 + 14 * (number // 4)
    parts.append(f'<rect x="{left}" y="{top - 8}" width="9" height="9" fill="{colour}"/>')
    parts.append(f'<text x="{left + 13}" y="{top}">{escape(name)}</text>')
    return parts
