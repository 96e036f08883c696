"""Measures what a tiered table costs on this machine, and what a given stream of batches really takes.

:func:`calibration_points` runs uniform random batches of several sizes on scratch tables of each kind;
``cost_models/tiered_runtime.py`` fits its constants to them. :func:`run` measures one configuration.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codegen.runtime.tiered.bag import TieredEmbeddingBag
from codegen.runtime.tiered.table import Range
from ir.workload import Optimizer

Batches = Sequence[tuple[Tensor, Tensor]]

ROWS = 60_000  # of a scratch table: several times what the processor's caches hold
CACHE = 6000  # rows of its cache: more than a batch has, few enough to be full of changed rows soon
SIZES = ((512, 8), (512, 2), (128, 2), (32, 2))  # bags and ids a bag of the batches
WARM, TIMED = 5, 15  # batches of a calibration run


@dataclass(frozen=True, slots=True)
class Sample:
    """Means of a batch over a run; seconds are medians.

    Attributes:
        main: the caller's seconds without waiting: forward, backward, update.
        fetch: the worker's seconds.
        step: seconds from batch to batch.
        dim: columns; ``page_bytes`` of the files.
        trained: False for lookups without gradients, after which no row has to be written.
    """

    kind: str
    trained: bool
    dim: int
    page_bytes: int
    depth: int
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
    trained: bool = True,
) -> Sample:
    """Train a bag on ``batches`` and measure all but the first ``warm`` of them.

    Args:
        dense: what comes after the bag, differentiated but not updated; default nothing, so that the bag is
            nearly all of the step.
        trained: False looks rows up without gradients.
    """
    rest = dense if dense is not None else nn.Identity()
    times: list[tuple[float, float, float]] = []  # step, wait, fetch
    before: dict[str, float] = {}
    fetch_seconds = wait = 0.0
    started = time.perf_counter()
    for number, (ids, offsets) in enumerate(bag.pipeline(batches, depth) if depth else batches):
        with torch.set_grad_enabled(trained):
            loss = rest(bag(ids, offsets)).sum().mul(1e-3)
        if trained:
            loss.backward()
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
        trained=trained,
        dim=bag.table.shape.dim,
        page_bytes=last.page_bytes,
        depth=depth,
        main=float(np.median(step - waited)),
        fetch=float(np.median(fetched)),
        step=float(np.median(step)),
        **means,
    )


def _totals(bag: TieredEmbeddingBag) -> dict[str, float]:
    counters, traffic = bag.counters, bag.table.traffic
    return {
        "ids": counters.accesses,
        "distinct": counters.distinct,
        "fetched": counters.fetched,
        "pages_read": sum(one.pages_read for one in traffic),
        "pages_written": sum(one.pages_written for one in traffic),
    }


def uniform(bags: int, length: int, trained: bool) -> list[tuple[Tensor, Tensor]]:
    """Batches of ``bags`` bags of ``length`` ids, each row of a scratch table as likely as any other."""
    random = torch.Generator().manual_seed(2 * bags * length + trained)
    offsets = torch.arange(0, bags * length, length)
    return [
        (torch.randint(0, ROWS, (bags * length,), generator=random), offsets) for _ in range(WARM + TIMED)
    ]


def calibration_points(
    folder: str | Path | None = None,
    *,
    optimizer: Optimizer = "rowwise_adagrad",
    dims: Sequence[int] = (16, 64),
    kinds: Sequence[tuple[str, int]] = (("ram", 4096), ("mapped", 4096), ("block", 512), ("block", 4096)),
) -> Iterator[Sample]:
    """Measured batches on scratch tables in ``folder`` (default: the temporary folder), one run after the other."""
    for dim in dims:
        for kind, page_bytes in kinds:
            where = Path(tempfile.mkdtemp(prefix="tiers-", dir=folder))
            part: Any = kind
            ranges = (Range(part, ROWS, page_bytes),)
            try:
                bag = TieredEmbeddingBag.create(
                    where / "table", ROWS, dim, ranges, optimizer=optimizer, cache_rows=CACHE
                )
                # large batches first: they fill the cache with changed rows, so that later ones write back
                for trained in (True, False) if kind == "block" else (True,):
                    for bags, length in SIZES:
                        yield run(bag, uniform(bags, length, trained), WARM, trained=trained)
                    bag.flush()
                bag.close()
            finally:
                shutil.rmtree(where, ignore_errors=True)
