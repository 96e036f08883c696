"""How narrow an id may travel."""

from __future__ import annotations


def id_width(rows: int) -> int:
    """Bytes of an id below ``rows``: the least of 1, 2, 4 and 8 that holds it."""
    return next(width for width in (1, 2, 4, 8) if width == 8 or rows <= 1 << (8 * width))
