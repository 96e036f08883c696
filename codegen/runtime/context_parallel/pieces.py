"""What part of the score matrix each rank computes: rectangles without a mask, and squares on the diagonal.

With sorted positions the causal mask between a run of consecutive queries a..b-1 and a sorted list of keys
is a rectangle (keys before a: all visible) and what lies on the diagonal (keys in a..b-1). Where these keys
are exactly a..b-1, the diagonal is a lower-triangular square, which flash kernels know. Keys after b-1 are
skipped: with 2N-chunk placement that is half of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from codegen.runtime.context_parallel.placement import Placement, Positions

Mask = Literal["full", "square", "positions"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries ``rows`` against keys ``keys``, both half-open ranges of one rank's tokens of one sequence.

    ``mask``: "full" has none; "square" is lower triangular; "positions" compares positions, which
    ``query_positions`` and ``key_positions`` hold.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    mask: Mask
    query_positions: Positions | None = None
    key_positions: Positions | None = None

    @property
    def pairs(self) -> int:
        """Visible query-key pairs."""
        rows, keys = self.rows[1] - self.rows[0], self.keys[1] - self.keys[0]
        if self.mask == "full":
            return rows * keys
        if self.mask == "square":
            return rows * (rows + 1) // 2
        assert self.query_positions is not None
        assert self.key_positions is not None
        return int(np.searchsorted(self.key_positions, self.query_positions, side="right").sum())


def split(queries: Positions, keys: Positions, causal: bool = True) -> tuple[Piece, ...]:
    """The pieces between sorted query positions and sorted key positions of one sequence.

    Every visible pair (key position <= query position, or all pairs when not causal) lies in exactly one
    piece; "positions" pieces may hold invisible pairs besides, which their mask removes.
    """
    if not len(queries) or not len(keys):
        return ()
    if not causal:
        return (Piece((0, len(queries)), (0, len(keys)), "full"),)
    bounds = np.flatnonzero(np.diff(queries) != 1) + 1
    found: list[Piece] = []
    for start, stop in zip([0, *bounds], [*bounds, len(queries)], strict=True):
        found.extend(_run(int(start), int(stop), queries, keys))
    return tuple(_joined(found))


def _run(start: int, stop: int, queries: Positions, keys: Positions) -> Iterator[Piece]:
    """Pieces of queries start..stop-1, whose positions are consecutive."""
    first, last = queries[start], queries[stop - 1]
    seen = int(np.searchsorted(keys, last, side="right"))  # by the last query
    shared = int(np.searchsorted(keys, first, side="right"))  # by all
    if shared == seen:
        if seen:
            yield Piece((start, stop), (0, seen), "full")
        return
    before = int(np.searchsorted(keys, first, side="left"))
    if seen - before == stop - start:  # keys are distinct and within first..last, so they are all of them
        shared, mask = before, Piece((start, stop), (before, seen), "square")
    else:
        mask = Piece((start, stop), (shared, seen), "positions", queries[start:stop], keys[shared:seen])
    if shared:
        yield Piece((start, stop), (0, shared), "full")
    yield mask


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """Rectangles over the same keys whose rows meet become one: fewer kernel calls."""
    full = [piece for piece in pieces if piece.mask == "full"]
    yield from (piece for piece in pieces if piece.mask != "full")
    while full:
        piece = full.pop(0)
        while full and full[0].keys == piece.keys and full[0].rows[0] == piece.rows[1]:
            piece = Piece((piece.rows[0], full.pop(0).rows[1]), piece.keys, "full")
        yield piece


def between(
    queries: Placement, query_rank: int, keys: Placement, key_rank: int, causal: bool = True
) -> tuple[tuple[int, tuple[Piece, ...]], ...]:
    """(sequence, pieces) of the queries of one rank against the keys of another, empty ones left out."""
    found = []
    for sequence in range(len(queries.owners)):
        rows = int(queries.counts[query_rank, sequence])
        seen = int(keys.counts[key_rank, sequence])
        if not rows or not seen:
            continue
        last = keys.starts[sequence] + keys.lengths[sequence] - 1
        if not causal or (queries.lengths[sequence] == 1 and queries.starts[sequence] >= last):
            # every key is visible, as in decoding: no need to look at a long list of positions
            parts: tuple[Piece, ...] = (Piece((0, rows), (0, seen), "full"),)
        else:
            parts = split(queries.positions(query_rank, sequence), keys.positions(key_rank, sequence), causal)
        if parts:
            found.append((sequence, parts))
    return tuple(found)
