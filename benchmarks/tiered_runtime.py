"""The tiered runtime on this machine: predicted against measured hit rate and step time.

Constants come from calibrations measured by the same command (codegen/runtime/tiered/measure.py): the device with
random pages, the work around it with uniform random batches; no constant is fitted to a case. Cases are a Zipf
stream over several tier layouts, caches and prefetch depths, and MovieLens-100K, whose row popularity is measured
on the first half of the ratings and used to predict the second half. The ratings are in random order, as one
trains; in order of time, where accesses are not independent, the hit rate is predicted from the reuse histogram
of the first half instead.

Files lie in the folder of --folder (default: the temporary folder); use one on the device that is asked about.
Other programs on the same processor or device show as errors of the step time: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import Report
from codegen.runtime.tiered.bag import TieredEmbeddingBag
from codegen.runtime.tiered.measure import (
    Batches,
    DevicePoint,
    Sample,
    calibration_runs,
    device_points,
    run,
)
from codegen.runtime.tiered.pages import records_per_page
from codegen.runtime.tiered.table import Policy, Range
from cost_models.cache import lru_hit_rate_of_trace, reuse_histogram
from cost_models.tiered_runtime import BatchTraffic, FileRange, RuntimeRates, expected_traffic, fit
from examples import _movielens
from ir.workload import Optimizer

OPTIMIZER: Optimizer = "rowwise_adagrad"
ROWS, DIM, BAGS, LENGTH = 100_000, 32, 512, 4  # of the Zipf stream
RATINGS = 256  # samples of a MovieLens batch
HIT_TARGET, STEP_TARGET = 2.0, 0.20  # points; relative


@dataclass(frozen=True)
class Case:
    """One table, stream and cache.

    Attributes:
        shares: (rows,) fraction of the accesses of each row, in the order of the rows.
        hidden: width of the layers behind the bag, None for no layers.
    """

    name: str
    shares: np.ndarray
    ranges: tuple[Range, ...]
    cache_rows: int
    batches: Batches
    warm: int
    policy: Policy = "lru"
    depth: int = 0
    dim: int = DIM
    hidden: int | None = None

    def traffic(self) -> BatchTraffic:
        record = self.dim + 1  # row-wise Adagrad: one float of state a row
        files = [
            FileRange(r.kind, r.rows, records_per_page(record, r.page_bytes), r.page_bytes)
            for r in self.ranges
        ]
        ids = float(np.mean([len(b[0]) for b in self.batches[self.warm :]]))
        return expected_traffic(self.shares, ids, files, self.cache_rows, self.policy, 1 + self.depth)

    def layers(self) -> nn.Module | None:
        if self.hidden is None:
            return None
        return nn.Sequential(nn.Linear(self.dim, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.hidden))


def zipf_shares(exponent: float, seed: int | None) -> np.ndarray:
    """Shares of a Zipf law; hottest first, or anywhere when there is a seed."""
    shares = np.arange(1, ROWS + 1, dtype=np.float64) ** -exponent
    shares /= shares.sum()
    return shares if seed is None else np.random.default_rng(seed).permutation(shares)


def draw(shares: np.ndarray, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of independent ids."""
    edges = np.cumsum(shares)
    random = np.random.default_rng(seed)
    offsets = torch.arange(0, BAGS * LENGTH, LENGTH)
    return [
        (
            torch.from_numpy(
                np.minimum(np.searchsorted(edges, random.random(BAGS * LENGTH) * edges[-1]), ROWS - 1)
            ),
            offsets,
        )
        for _ in range(count)
    ]


def zipf_cases(timed: int) -> list[Case]:
    """Layouts, page sizes, policies, skews and prefetch depths."""
    block, small = (Range("block", ROWS, 4096),), (Range("block", ROWS, 512),)
    mixed = (Range("ram", 2000), Range("mapped", 18_000, 4096), Range("block", 80_000, 4096))
    warm = 60
    anywhere, sorted_ = zipf_shares(1.05, 5), zipf_shares(1.05, None)

    def case(
        name: str, shares: np.ndarray, ranges: tuple[Range, ...], cache: int, warm: int = warm, **more: object
    ) -> Case:
        batches = draw(shares, warm + timed, seed=len(name))
        return Case(f"zipf {name}", shares, ranges, cache, batches, warm, **more)  # type: ignore[arg-type]

    return [
        case("1.05, blocks of 4 KB, LRU 5 %", anywhere, block, 5000),
        case("1.05, blocks of 512 B, LRU 10 %", anywhere, small, 10_000),
        case("1.05, blocks of 4 KB, LFU 5 %", anywhere, block, 5000, 150, policy="lfu"),
        case("1.05, hot rows first, blocks of 4 KB, LRU 5 %", sorted_, block, 5000),
        case("1.05, RAM + mapped + blocks, LRU 4 %", sorted_, mixed, 4000),
        case("0.8, blocks of 4 KB, LRU 20 %", zipf_shares(0.8, 5), block, 20_000, 50),
        case("1.2, mapped, LRU 5 %", zipf_shares(1.2, 5), (Range("mapped", ROWS, 4096),), 5000),
        case("1.05, blocks of 4 KB, LRU 8 %, 2 ahead", anywhere, block, 8000, depth=2, hidden=512),
        case(
            "1.05, blocks of 4 KB, LRU 8 %, 2 ahead, heavy model", anywhere, block, 8000, depth=2, hidden=2048
        ),
    ]


def movielens_ids(table: str, shuffled: bool) -> tuple[np.ndarray, int]:
    """Ids of all 100,000 ratings in random order or that of time, and the rows of the table."""
    data = _movielens.load()
    ids = data.ids[table][0]
    if shuffled:
        ids = np.random.default_rng(7).permutation(ids)
    return ids, data.rows[table]


def movielens_cases(timed: int) -> list[Case]:
    """Tables of users and films; the cache is warmed with the half that the prediction is made from."""
    cases = []
    for table, cache, page in (("item", 500, 4096), ("item", 800, 512), ("user", 400, 4096)):
        ids, rows = movielens_ids(table, shuffled=True)
        known = ids[: len(ids) // 2]
        shares = np.bincount(known, minlength=rows) / len(known)
        warm = 60
        start = len(known) - warm * RATINGS
        parts = [ids[i : i + RATINGS] for i in range(start, len(ids) - RATINGS + 1, RATINGS)]
        offsets = torch.arange(RATINGS)
        batches = [(torch.from_numpy(part), offsets) for part in parts][: warm + timed]
        cases.append(
            Case(
                f"MovieLens {table}s, blocks of {page} B, LRU {cache} of {rows}",
                shares,
                (Range("block", rows, page),),
                cache,
                batches,
                warm,
            )
        )
    return cases


def dense_seconds(case: Case) -> float:
    """Mean seconds of the layers behind the bag, forward and backward, alone."""
    layers = case.layers()
    if layers is None:
        return 0.0
    times = []
    for _ in range(12):
        pooled = torch.randn(len(case.batches[0][1]), case.dim, requires_grad=True)
        started = time.perf_counter()
        layers(pooled).sum().mul(1e-3).backward()
        times.append(time.perf_counter() - started)
    return statistics.mean(times[2:])


def measure(case: Case, folder: Path) -> Sample:
    """Train the case on a new table."""
    where = Path(tempfile.mkdtemp(prefix="tiers-", dir=folder))
    try:
        bag = TieredEmbeddingBag.create(
            where / "table",
            len(case.shares),
            case.dim,
            case.ranges,
            optimizer=OPTIMIZER,
            cache_rows=case.cache_rows,
            policy=case.policy,
        )
        sample = run(bag, case.batches, case.warm, case.depth, dense=case.layers())
        bag.close()
        return sample
    finally:
        shutil.rmtree(where, ignore_errors=True)


@dataclass
class Outcome:
    """Runs of one case, and seconds of its layers alone."""

    samples: list[Sample]
    layers: list[float]

    @property
    def step(self) -> float:
        return statistics.median(sample.step for sample in self.samples)


def run_cases(cases: Sequence[Case], folder: Path, rounds: int) -> tuple[RuntimeRates, list[Outcome]]:
    """Constants, and every case in every round.

    Others use the device and the processor too, so the device is measured again before each case, and the work
    around it in each round; the constants are taken from all of these.
    """
    work: list[Sample] = []
    device: dict[tuple[bool, int, int], list[float]] = {}
    outcomes = [Outcome([], []) for _ in cases]
    for _ in range(rounds):
        work += calibration_runs(folder, OPTIMIZER)
        for case, outcome in zip(cases, outcomes, strict=True):
            for point in device_points(folder):
                device.setdefault((point.write, point.page_bytes, point.pages), []).append(point.seconds)
            outcome.layers.append(dense_seconds(case))
            outcome.samples.append(measure(case, folder))
    points = [DevicePoint(*key, statistics.median(seconds)) for key, seconds in device.items()]
    return fit(points, work), outcomes


def judge(report: Report, cases: Sequence[Case], rates: RuntimeRates, outcomes: Sequence[Outcome]) -> None:
    """Rows of prediction and measurement, and one claim on each for the Zipf stream and for MovieLens."""
    errors: dict[str, list[tuple[float, float]]] = {"zipf": [], "movielens": []}
    for case, outcome in zip(cases, outcomes, strict=True):
        traffic, sample = case.traffic(), outcome.samples[0]  # counts are the same in every run
        points = 100 * abs(traffic.hit_rate - sample.hit_rate)
        predicted = rates.step(traffic, case.dim, case.depth, statistics.median(outcome.layers))
        error = abs(predicted / outcome.step - 1)
        errors[case.name.split()[0].lower()].append((points, error))
        report.row(
            case=case.name,
            hit_predicted=traffic.hit_rate,
            hit_measured=sample.hit_rate,
            points=points,
            reads_predicted=traffic.pages_read,
            reads_measured=sample.pages_read,
            ms_predicted=1e3 * predicted,
            ms_measured=1e3 * outcome.step,
            ms_all=" ".join(f"{1e3 * sample.step:.3g}" for sample in outcome.samples),
            error=error,
        )
    for stream, found in errors.items():
        steps = [step for _, step in found]
        report.claim(f"{stream}_hit_rate_error_points_worst", max(hit for hit, _ in found), HIT_TARGET, "<=")
        report.claim(f"{stream}_step_time_error_worst", max(steps), STEP_TARGET, "<=")
        report.claim(f"{stream}_step_time_error_mean", statistics.mean(steps), STEP_TARGET, "<=")


def in_order_of_time(report: Report, folder: Path) -> None:
    """MovieLens as it happened: a film or user follows itself, so the reuse histogram predicts, not popularity."""
    worst = 0.0
    for table, cache in (("item", 500), ("user", 300)):
        ids, rows = movielens_ids(table, shuffled=False)
        parts = [ids[i : i + RATINGS] for i in range(0, len(ids) - RATINGS + 1, RATINGS)]
        half = len(parts) // 2
        trace = np.concatenate([np.unique(part) for part in parts[:half]])
        histogram, first = reuse_histogram(trace)
        distinct = sum(len(np.unique(part)) for part in parts[half:]) / (len(parts) - half)
        predicted = 1 - distinct * (1 - lru_hit_rate_of_trace(histogram, first, cache)) / RATINGS
        offsets = torch.arange(RATINGS)
        batches = [(torch.from_numpy(part), offsets) for part in parts]
        ranges = (Range("block", rows, 4096),)
        case = Case("", np.bincount(ids, minlength=rows) / len(ids), ranges, cache, batches, half)
        measured = measure(case, folder).hit_rate
        independent = case.traffic().hit_rate
        worst = max(worst, 100 * abs(predicted - measured))
        report.row(
            case=f"MovieLens {table}s in order of time, LRU {cache} of {rows}",
            hit_predicted=predicted,
            hit_measured=measured,
            points=100 * abs(predicted - measured),
        )
        report.note(f"{table}s in order of time, were accesses independent: hit rate {independent:.3f}")
    report.claim("movielens_in_time_hit_rate_error_points_worst", worst, HIT_TARGET, "<=")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer cases and batches")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where files are made"
    )
    parser.add_argument("--rounds", type=int, default=None, help="runs of each case, the median counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("tiered_runtime")
    timed, rounds = (40, 1) if options.quick else (80, options.rounds or 3)
    cases = [*zipf_cases(timed), *movielens_cases(timed)]
    chosen = [cases[i] for i in (0, 4, 7, 9)] if options.quick else cases
    judge(report, chosen, *run_cases(chosen, options.folder, rounds))
    in_order_of_time(report, options.folder)
    return report.finish(options.json)


if __name__ == "__main__":
    raise SystemExit(main())
