"""The shape of a tile: how many columns and rows of a table one DPU holds.

A table of R x C, a batch of B bags of L ids, N DPUs, tiles of x columns: K = C/x column tiles, k row tiles.

  T(x, k) = const + 4 B L K / W_in + (B L / k) c(x) / f + 4 B C k (1/W_out + 1/W_host)
            ids to every column tile + reads of the fullest tile + partial sums of every row tile

with c(x) = max_j (a_j + b_j x) cycles a row (:func:`cost_models.pim.row_cycle_bounds`). This is UpDLRM's tile
problem (arXiv 2406.13941) with the pipeline's limit added; with all DPUs in use, k = N x / C, it becomes

  T(x) = const + max_j (A_j / x + c_j) + D x,   A_j = 4 B L C / W_in + g a_j,  c_j = g b_j,  g = B L C / (N f)
                                                 D = 4 B N (1/W_out + 1/W_host)

which is convex: its minimum is one of sqrt(A_j / D) or a crossing x = (A_i - A_j) / (c_j - c_i).
-> :func:`closed_form_columns`; the best allowed width is a neighbour of it -> :func:`closed_form_tile`.

The exact problem has whole tiles, bandwidths that depend on the DPUs in use, and may leave DPUs idle
-> :func:`best_tile`, which orders widths by the relaxed T(x, k) with the best real k (a lower bound) and stops
when the bound passes the best tile found: the result is proved optimal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cost_models.pim import (
    DMA_MAX,
    MRAM_BYTES,
    WRAM_BYTES,
    PimLoad,
    PimSystem,
    PimTime,
    host_bandwidth,
    lookup_time,
    padded,
    reduce_bytes,
    row_cycle_bounds,
    row_cycles,
    wram_need,
)
from ir.errors import InfeasibleError, InputError
from ir.pim import ELEMENT_BYTES, ElementType

LINE = 64  # bytes of a cache line, the granule of a CPU's gather (x86)
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TileProblem:
    """One table, one batch, one machine; accesses spread evenly over the row tiles."""

    rows: int
    cols: int
    batch: int
    pooling: float
    system: PimSystem = field(default_factory=PimSystem)
    element: ElementType = "int32"

    def __post_init__(self) -> None:
        if min(self.rows, self.cols, self.batch) < 1 or self.pooling <= 0:
            raise InputError("a tile problem needs rows, columns, a batch and a pooling factor above 0")

    @property
    def ids(self) -> float:
        """Ids of a batch."""
        return self.batch * self.pooling


@dataclass(frozen=True, slots=True)
class Tile:
    """A shape and what a batch takes with it."""

    cols: int  # columns of a tile
    rows: int  # rows of the largest tile
    row_tiles: int
    col_tiles: int
    time: PimTime


def closed_form_columns(problem: TileProblem) -> float:
    """The real number of columns that minimises the relaxed time with all DPUs in use."""
    slopes, steps, rise = _relaxed_terms(problem)
    candidates = [math.sqrt(a / rise) for a in slopes]
    pairs = list(zip(slopes, steps, strict=True))
    for i, (a, c) in enumerate(pairs):
        candidates += [(a - b) / (d - c) for b, d in pairs[i + 1 :] if d != c and (a - b) / (d - c) > 0]
    return min(candidates, key=lambda x: relaxed_seconds(problem, x))


def relaxed_seconds(problem: TileProblem, columns: float) -> float:
    """Seconds that depend on the shape, tiles of ``columns`` real columns and all DPUs in use."""
    slopes, steps, rise = _relaxed_terms(problem)
    return max(a / columns + c for a, c in zip(slopes, steps, strict=True)) + rise * columns


def _relaxed_terms(problem: TileProblem) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    system = problem.system
    ids = ELEMENT_BYTES * problem.ids * problem.cols / host_bandwidth("in", system.dpus, system)
    each = problem.ids * problem.cols / (system.dpus * system.clock)
    fixed, slope = _cycle_lines(problem)
    sums = 1 / host_bandwidth("out", system.dpus, system) + 1 / system.host_bandwidth
    rise = ELEMENT_BYTES * problem.batch * system.dpus * sums
    return tuple(ids + each * a for a in fixed), tuple(each * b for b in slope), rise


def _cycle_lines(problem: TileProblem) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """a_j and b_j of the cycles a row, ``max_j (a_j + b_j x)``; the bounds are linear below one DMA."""
    tasklets = problem.system.tasklets
    two = row_cycle_bounds(2 * ELEMENT_BYTES, problem.element, tasklets)
    four = row_cycle_bounds(4 * ELEMENT_BYTES, problem.element, tasklets)
    slope = tuple((b - a) / 2 for a, b in zip(two, four, strict=True))
    return tuple(a - 2 * b for a, b in zip(two, slope, strict=True)), slope


def widths(problem: TileProblem) -> list[int]:
    """Columns a tile may have: rows of 8 bytes to one DMA, and buffers of all tasklets in WRAM."""
    step = 2  # columns of 8 bytes
    widest = min(DMA_MAX // ELEMENT_BYTES, -(-problem.cols // step) * step)
    tasklets = problem.system.tasklets
    return [x for x in range(step, widest + 1, step) if wram_need(x * ELEMENT_BYTES, tasklets) <= WRAM_BYTES]


def closed_form_tile(problem: TileProblem) -> int:
    """Columns of the best allowed width in the relaxed problem: a neighbour of the closed form's minimum."""
    allowed = widths(problem)
    place = int(np.searchsorted(allowed, closed_form_columns(problem)))
    near = allowed[max(place - 1, 0) : place + 1] or allowed[-1:]
    return min(near, key=lambda x: relaxed_seconds(problem, x))


def tile_time(problem: TileProblem, columns: int, row_tiles: int) -> Tile | None:
    """A shape with its time; None where it does not fit on a DPU or needs more DPUs than there are."""
    row_bytes = padded(columns * ELEMENT_BYTES)
    rows, col_tiles = -(-problem.rows // row_tiles), -(-problem.cols // columns)
    reads = problem.ids * rows / problem.rows
    push = 64 + padded((problem.batch + 4) * 4) + 4 * reads
    pull = float(problem.batch * row_bytes)
    if row_tiles * col_tiles > problem.system.dpus or rows * row_bytes + push + pull > MRAM_BYTES:
        return None
    load = PimLoad(
        dpus=row_tiles * col_tiles,
        row_bytes=row_bytes,
        max_reads=reads,
        push_bytes=(push,),
        pull_bytes=pull,
        reduce_bytes=reduce_bytes(problem.batch, problem.cols, row_tiles),
        element=problem.element,
    )
    return Tile(columns, rows, row_tiles, col_tiles, lookup_time(load, problem.system))


@dataclass(frozen=True, slots=True)
class ShapeBound:
    """A lower bound on the seconds of tiles of one width: ``fixed + reads / k + partial k`` with k row tiles."""

    columns: int
    fixed: float
    reads: float
    partial: float
    least: float  # over all k

    def at(self, row_tiles: int) -> float:
        """The bound for a number of row tiles."""
        return self.fixed + self.reads / row_tiles + self.partial * row_tiles


def shape_bound(problem: TileProblem, columns: int) -> ShapeBound:
    """The relaxed time of a width: real numbers of tiles, and the bandwidth of all DPUs."""
    system = problem.system
    inward = host_bandwidth("in", system.dpus, system)
    sums = 1 / host_bandwidth("out", system.dpus, system) + 1 / system.host_bandwidth
    reads = problem.ids * row_cycles(columns * ELEMENT_BYTES, problem.element, system.tasklets) / system.clock
    partial = ELEMENT_BYTES * problem.batch * problem.cols * sums
    fixed = system.in_latency + system.launch + system.out_latency
    fixed += 4 * problem.ids * problem.cols / columns / inward
    row_tiles = min(math.sqrt(reads / partial), system.dpus * columns / problem.cols, float(problem.rows))
    return ShapeBound(columns, fixed, reads, partial, fixed + reads / row_tiles + partial * row_tiles)


def best_tile(problem: TileProblem) -> Tile:
    """The tile of least modelled time; proved by :func:`shape_bound`.

    Raises:
        InfeasibleError: the table does not fit on the DPUs in any shape.
    """
    best: Tile | None = None
    bounds = [shape_bound(problem, columns) for columns in widths(problem)]
    for bound in sorted(bounds, key=lambda b: (b.least, b.columns)):
        if best is not None and bound.least >= best.time.total:
            break
        most = min(problem.system.dpus // -(-problem.cols // bound.columns), problem.rows)
        for row_tiles in range(1, most + 1):
            if best is None or bound.at(row_tiles) < best.time.total:
                tile = tile_time(problem, bound.columns, row_tiles)
                if tile is not None and (best is None or tile.time.total < best.time.total):
                    best = tile
    if best is None:
        size = problem.rows * problem.cols * ELEMENT_BYTES
        raise InfeasibleError(
            f"a table of {size} bytes does not fit on {problem.system.dpus} DPUs with its ids and sums",
            ("mram_capacity",),
            f"at least {-(-size // MRAM_BYTES) + 1} DPUs",
        )
    return best


@dataclass(frozen=True, slots=True)
class CpuShare:
    """The hottest rows stay with the CPU, which reduces them while the DPUs reduce the rest."""

    rows: int
    accesses: float  # fraction of the ids
    seconds: float
    alone: float  # seconds with all rows on the DPUs


def split_reduction(problem: TileProblem, popularity: FloatArray, tile: Tile) -> CpuShare:
    """How many of the hottest rows the CPU should keep.

    The CPU gathers its rows from memory while the DPUs look up theirs; pushes and pulls need the CPU. The DPUs
    share what is left evenly, except that a row is on one tile.

    Args:
        problem: table, batch and machine.
        popularity: (rows,) probability of each row, any order.
        tile: the shape on the DPUs.
    """
    system = problem.system
    falling = np.sort(popularity)[::-1] / popularity.sum()
    left = np.maximum(1 - np.concatenate([[0.0], np.cumsum(falling)]), 0.0)
    hottest = np.concatenate([falling, [0.0]])
    reads = problem.ids * np.maximum(left / tile.row_tiles, hottest)
    cycles = row_cycles(padded(tile.cols * ELEMENT_BYTES), problem.element, system.tasklets)
    dpus = tile.row_tiles * tile.col_tiles
    ids = dpus * 4 * reads / host_bandwidth("in", dpus, system)
    line = -(-problem.cols * ELEMENT_BYTES // LINE) * LINE
    gather = problem.ids * (1 - left) * line / system.gather
    moved = dpus * 4 * problem.ids * tile.rows / problem.rows / host_bandwidth("in", dpus, system)
    base = tile.time.total - tile.time.lookup - moved
    seconds = base + ids + np.maximum(reads * cycles / system.clock, gather)
    seconds[-1] = gather[-1]  # all rows: no DPU is used
    rows = int(np.argmin(seconds))
    return CpuShare(rows, float(1 - left[rows]), float(seconds[rows]), float(seconds[0]))
