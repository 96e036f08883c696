"""Measures what a tiered table costs on this machine, and what a given stream of batches really takes.

:func:`device_points` measures the device (seconds of so many random pages, asked for together),
:func:`calibration_runs` the work around it on random batches of several sizes, with and without repeated ids;
``cost_models/tiered_runtime.py`` takes its constants from both. :func:`run` measures one configuration. Times are
means, without the tenth at either end, since the means of parts add up to that of the whole.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from codegen.runtime.tiered.bag import TieredEmbeddingBag
from codegen.runtime.tiered.native import HEADER
from codegen.runtime.tiered.pages import BlockPages, create
from codegen.runtime.tiered.table import Kind, Range
from ir.workload import Optimizer

Batches = Sequence[tuple[Tensor, Tensor]]

ROWS = 60_000  # of a scratch table: several times what the processor's caches hold
CACHE = 6000  # rows of its cache: more than a batch has, few enough to be full of changed rows soon
# bags, ids a bag and how often a batch repeats its rows: only with repeats do ids and distinct rows cost apart
SIZES = ((512, 8, 1), (512, 2, 1), (512, 8, 4), (128, 2, 1), (128, 8, 4), (32, 2, 1))
WARM, TIMED = 5, 15  # batches of a calibration run
BESIDE = ((512, 2, 1), (256, 2, 1))  # also run with batches prefetched: three must fit the cache
DIMS = (16, 64)
KINDS: tuple[Kind, ...] = ("ram", "mapped", "block")
SCRATCH = 1 << 25  # bytes of the file that device_points asks pages of, both places of each
PAGE_SIZES = (512, 4096)
COUNTS = (1, 8, 24, 64, 150, 350, 800, 2000)  # pages asked for together


@dataclass(frozen=True, slots=True)
class Sample:
    """Means of a batch over a run.

    Attributes:
        main: the caller's seconds without waiting: forward, backward, update.
        fetch: the worker's seconds.
        step: seconds from batch to batch.
        dim: columns; ``page_bytes`` of the files.
        dense: layers followed the bag, and their time is part of ``main``.
    """

    kind: str
    dim: int
    page_bytes: int
    depth: int
    dense: bool
    ids: float
    distinct: float
    fetched: float
    pages_read: float
    pages_written: float
    main: float
    fetch: float
    step: float

    @property
    def hit_rate(self) -> float:
        """Fraction of accesses that read no row from a file."""
        return 1 - self.fetched / self.ids


def run(
    bag: TieredEmbeddingBag,
    batches: Batches,
    warm: int,
    depth: int = 0,
    *,
    dense: nn.Module | None = None,
) -> Sample:
    """Train a bag on ``batches`` and measure all but the first ``warm`` of them.

    Args:
        dense: what comes after the bag, differentiated but not updated; default nothing, so that the bag is
            nearly all of the step.
    """
    rest = dense if dense is not None else nn.Identity()
    times: list[tuple[float, float, float]] = []  # step, wait, fetch
    before: dict[str, float] = {}
    fetch_seconds = wait = 0.0
    started = time.perf_counter()
    for number, (ids, offsets) in enumerate(bag.pipeline(batches, depth) if depth else batches):
        rest(bag(ids, offsets)).sum().mul(1e-3).backward()
        now = time.perf_counter()
        counters = bag.counters
        if number >= warm:
            times.append(
                (now - started, counters.wait_seconds - wait, counters.fetch_seconds - fetch_seconds)
            )
        elif number == warm - 1:
            before = _totals(bag)
        started, wait, fetch_seconds = now, counters.wait_seconds, counters.fetch_seconds
    after = _totals(bag)
    count = len(times)
    step, waited, fetched = (np.asarray(column) for column in zip(*times, strict=True))
    last = bag.table.shape.ranges[-1]
    means = {key: (after[key] - before.get(key, 0.0)) / count for key in after}
    return Sample(
        kind=last.kind,
        dim=bag.table.shape.dim,
        page_bytes=last.page_bytes,
        depth=depth,
        dense=dense is not None,
        main=_mean(step - waited),
        fetch=_mean(fetched),
        step=_mean(step),
        **means,
    )


def _mean(seconds: npt.NDArray[np.float64]) -> float:
    """Mean without the tenth at either end: other programs' bursts are not the table's."""
    cut = len(seconds) // 10
    return float(np.sort(seconds)[cut : len(seconds) - cut].mean())


def _totals(bag: TieredEmbeddingBag) -> dict[str, float]:
    counters, traffic = bag.counters, bag.table.traffic
    return {
        "ids": counters.accesses,
        "distinct": counters.distinct,
        "fetched": counters.fetched,
        "pages_read": sum(one.pages_read for one in traffic),
        "pages_written": sum(one.pages_written for one in traffic),
    }


@dataclass(frozen=True, slots=True)
class DevicePoint:
    """Mean seconds of ``pages`` random pages of a block file that are asked for together."""

    write: bool
    page_bytes: int
    pages: int
    seconds: float


def device_points(folder: str | Path | None = None) -> tuple[DevicePoint, ...]:
    """Measure the device of ``folder`` (default: the temporary folder) with scratch files."""
    with tempfile.TemporaryDirectory(prefix="tiers-", dir=folder) as where:
        return tuple(point for page_bytes in PAGE_SIZES for point in _device(Path(where), page_bytes))


def calibration_runs(
    folder: str | Path | None = None, optimizer: Optimizer = "rowwise_adagrad"
) -> tuple[Sample, ...]:
    """Measure the work around the device: uniform random batches on scratch tables of each kind."""
    with tempfile.TemporaryDirectory(prefix="tiers-", dir=folder) as where:
        return tuple(
            sample for dim in DIMS for kind in KINDS for sample in _runs(Path(where), dim, kind, optimizer)
        )


def _device(where: Path, page_bytes: int) -> Iterator[DevicePoint]:
    """One record a page, so that writes read nothing."""
    path = where / f"pages{page_bytes}"
    record = (page_bytes - HEADER) // 4
    rows = SCRATCH // (2 * page_bytes)
    pages = create(path, rows, record, page_bytes, lambda a, b: np.zeros((b - a, record), np.float32))
    file = BlockPages(path, rows, record, page_bytes, np.zeros(pages, np.uint8), 0)
    random = np.random.default_rng(page_bytes)
    try:
        for count in COUNTS:
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(max(8, min(40, 4000 // count))):
                some = random.choice(rows, count, replace=False)
                started = time.perf_counter()
                records = file.read(some)
                middle = time.perf_counter()
                file.write(some, records)
                times[True].append(time.perf_counter() - middle)
                times[False].append(middle - started)
            for write, seconds in times.items():
                yield DevicePoint(write, page_bytes, count, _mean(np.asarray(seconds)))
    finally:
        file.close()


def _random(bags: int, length: int, repeats: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of ``bags`` bags of ``length`` ids, each drawn from as many rows of a scratch table, chosen anew.

    With ``repeats`` above 1 from fewer rows by that factor: a row is then drawn that often on average.
    """
    random = torch.Generator().manual_seed(bags * length + repeats)
    offsets = torch.arange(0, bags * length, length)
    count = bags * length
    made = []
    for _ in range(WARM + TIMED):
        ids = torch.randint(0, ROWS, (count,), generator=random)
        if repeats > 1:
            ids = ids[torch.randint(0, count // repeats, (count,), generator=random)]
        made.append((ids, offsets))
    return made


def _runs(where: Path, dim: int, kind: Kind, optimizer: Optimizer) -> Iterator[Sample]:
    folder = where / f"{kind}{dim}"
    bag = TieredEmbeddingBag.create(
        folder, ROWS, dim, (Range(kind, ROWS, 4096),), optimizer=optimizer, cache_rows=CACHE
    )
    # large batches first: they fill the cache with changed rows, so that later ones write back
    for size in SIZES:
        yield run(bag, _random(*size), WARM)
    if kind == "block":
        layers = nn.Sequential(
            nn.Linear(dim, 512), nn.ReLU(), nn.Linear(512, 512)
        )  # something to fetch beside
        for size in BESIDE:
            for depth in (0, 2):
                yield run(bag, _random(*size), WARM, depth, dense=layers)
    bag.close()
    shutil.rmtree(folder)
