"""The shape of a tile: how many columns and rows of a table one DPU holds.

A table of R x C, a batch of B bags of L ids, N DPUs, tiles of x columns: K = C/x column tiles, k row tiles.

  T(x, k) = const + 4 B L K / W_in + max_j ((B L / k) r_j(x) + B g_j(x)) / f + 4 B C k (1/W_out + 1/W_host)
            ids to every column tile + the fullest tile's rows and bags + partial sums of every row tile

with the cycles of a row r_j = a_j + b_j x and of a bag g_j = u_j + v_j x under the limits j of
:mod:`cost_models.pim`. This is UpDLRM's tile problem (arXiv 2406.13941) with the pipeline's limit and the cost of
a bag added; with all DPUs in use, k = N x / C, it becomes

  T(x) = const + max_j (A_j / x + c_j + D_j x),  A_j = 4 B L C / W_in + h a_j,  c_j = h b_j + B u_j / f,
         D_j = B v_j / f + 4 B N (1/W_out + 1/W_host),  h = B L C / (N f)

which is convex: its minimum is one of sqrt(A_j / D_j) or a crossing of two of the three curves (a quadratic).
-> :func:`closed_form_columns`; the best allowed width is a neighbour of it -> :func:`closed_form_tile`.

The exact problem has whole tiles, bandwidths that depend on the DPUs in use, and may leave DPUs idle
-> :func:`best_tile`, which orders widths by the relaxed T(x, k) with the best real k (a lower bound) and stops
when the bound passes the best tile found: the result is proved optimal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cost_models.pim import (
    DMA_MAX,
    MRAM_BYTES,
    WRAM_BYTES,
    Cycles,
    PimLoad,
    PimSystem,
    PimTime,
    bag_cycles,
    host_bandwidth,
    lookup_time,
    padded,
    reduce_bytes,
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
    curves = _relaxed_curves(problem)
    candidates = [math.sqrt(falling / rising) for falling, _, rising in curves]
    for (a, c, d), (e, f, g) in itertools.combinations(curves, 2):
        roots = np.roots([d - g, c - f, a - e])  # where A/x + c + D x of the two are equal
        candidates += [float(root.real) for root in roots if abs(root.imag) < 1e-9 and root.real > 0]
    return min(candidates, key=lambda x: relaxed_seconds(problem, x))


def relaxed_seconds(problem: TileProblem, columns: float) -> float:
    """Seconds that depend on the shape, tiles of ``columns`` real columns and all DPUs in use."""
    return max(a / columns + c + d * columns for a, c, d in _relaxed_curves(problem))


def _relaxed_curves(problem: TileProblem) -> list[tuple[float, float, float]]:
    """(A_j, c_j, D_j) of each limit."""
    system, batch = problem.system, problem.batch
    ids = ELEMENT_BYTES * problem.ids * problem.cols / host_bandwidth("in", system.dpus, system)
    each = problem.ids * problem.cols / (system.dpus * system.clock)
    sums = ELEMENT_BYTES * batch * system.dpus * _partial_seconds(system)
    return [
        (ids + each * a, each * b + batch * u / system.clock, batch * v / system.clock + sums)
        for (a, b), (u, v) in zip(
            _lines(lambda size: row_cycles(size, problem.element, system.tasklets)),
            _lines(lambda size: bag_cycles(size, system.tasklets)),
            strict=True,
        )
    ]


def _partial_seconds(system: PimSystem) -> float:
    """To bring one byte of partial sums to the CPU and add it."""
    return 1 / host_bandwidth("out", system.dpus, system) + 1 / system.host_bandwidth


def _lines(cycles: Callable[[int], Cycles]) -> list[tuple[float, float]]:
    """(fixed, per column) of each limit's cycles, which are linear in the columns up to one DMA."""
    two, four = cycles(2 * ELEMENT_BYTES), cycles(4 * ELEMENT_BYTES)
    return [(2 * low - high, (high - low) / 2) for low, high in zip(two, four, strict=True)]


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
        bags=problem.batch,
        push_bytes=(push,),
        pull_bytes=pull,
        reduce_bytes=reduce_bytes(problem.batch, problem.cols, row_tiles),
        element=problem.element,
    )
    return Tile(columns, rows, row_tiles, col_tiles, lookup_time(load, problem.system))


@dataclass(frozen=True, slots=True)
class ShapeBound:
    """A lower bound on the seconds of tiles of one width with k row tiles.

    ``fixed + max_j (rows_j / k + bags_j) + partial k``: real numbers of tiles, and the bandwidth of all DPUs.
    """

    columns: int
    fixed: float
    rows: Cycles  # in seconds
    bags: Cycles  # in seconds
    partial: float
    most: float  # row tiles there can be

    def at(self, row_tiles: float) -> float:
        """The bound for a number of row tiles."""
        slowest = max(row / row_tiles + bag for row, bag in zip(self.rows, self.bags, strict=True))
        return self.fixed + slowest + self.partial * row_tiles

    @property
    def least(self) -> float:
        """A bound for every number of row tiles: the largest of the limits' own minima."""
        minima = []
        for row, bag in zip(self.rows, self.bags, strict=True):
            row_tiles = min(math.sqrt(row / self.partial), self.most)
            minima.append(row / row_tiles + bag + self.partial * row_tiles)
        return self.fixed + max(minima)


def shape_bound(problem: TileProblem, columns: int) -> ShapeBound:
    """The relaxed time of a width."""
    system, row_bytes = problem.system, columns * ELEMENT_BYTES
    fixed = system.in_latency + system.launch + system.out_latency
    fixed += 4 * problem.ids * problem.cols / columns / host_bandwidth("in", system.dpus, system)
    row, bag = row_cycles(row_bytes, problem.element, system.tasklets), bag_cycles(row_bytes, system.tasklets)
    return ShapeBound(
        columns=columns,
        fixed=fixed,
        rows=_times(row, problem.ids / system.clock),
        bags=_times(bag, problem.batch / system.clock),
        partial=ELEMENT_BYTES * problem.batch * problem.cols * _partial_seconds(system),
        most=min(system.dpus * columns / problem.cols, float(problem.rows)),
    )


def _times(cycles: Cycles, factor: float) -> Cycles:
    return (cycles[0] * factor, cycles[1] * factor, cycles[2] * factor)


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
    row_bytes = padded(tile.cols * ELEMENT_BYTES)
    rows_and_bags = zip(
        row_cycles(row_bytes, problem.element, system.tasklets),
        bag_cycles(row_bytes, system.tasklets),
        strict=True,
    )
    lookup = np.max([reads * row + problem.batch * bag for row, bag in rows_and_bags], axis=0) / system.clock
    dpus = tile.row_tiles * tile.col_tiles
    ids = dpus * 4 * reads / host_bandwidth("in", dpus, system)
    line = -(-problem.cols * ELEMENT_BYTES // LINE) * LINE
    gather = problem.ids * (1 - left) * line / system.gather
    moved = dpus * 4 * problem.ids * tile.rows / problem.rows / host_bandwidth("in", dpus, system)
    base = tile.time.total - tile.time.lookup - moved
    seconds = base + ids + np.maximum(lookup, gather)
    seconds[-1] = gather[-1]  # all rows: no DPU is used
    rows = int(np.argmin(seconds))
    return CpuShare(rows, float(1 - left[rows]), float(seconds[rows]), float(seconds[0]))
