"""The tower partitioner on 26 to 856 features: proved gap, the published method beside it, CPU seconds.

    python benchmarks/tower_partition.py [--quick] [--json]

Rows of tables are published ones (Criteo Kaggle's 26, and 180, 510 or 856 of Meta's data set), so memory is as uneven
as it is in practice; 128 columns in fp32. Interaction strengths are mean cosines of synthetic vectors: those of a group
share a factor, under little or much noise, or there are no groups at all. The published method (metric multidimensional
scaling and k-means with balanced sizes) does not know of memory; it is run beside both problems, with its memory
limit and with sizes alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks._report import Report
from benchmarks._tables import builtin
from benchmarks._towers_learning import rand_index
from passes.tower_partition import Floats, Ints, partition, partition_value, stated
from passes.tower_rival import rival_partition

NOISE = {"groups": 1.0, "noisy groups": 3.0, "no groups": float("inf")}
BALANCE = 0.25
SECONDS = 30.0  # of CPU time; the search uses one core


def memory(features: int) -> Floats:
    """(n,) bytes of published tables of 128 columns, the first of the set."""
    name = "criteo_kaggle" if features == 26 else "meta_dlrm_datasets_856"
    tables = builtin(name)[name]
    return np.array([float(table.rows * 512) for table in tables[:features]])


def strengths(features: int, groups: int, noise: float) -> tuple[Floats, Ints]:
    """(n, n) mean cosines over 64 samples of vectors of 16 columns, and the group of each feature."""
    random = np.random.default_rng(features)
    group = random.permutation(np.arange(features) % groups)
    shared = random.standard_normal((groups, 1024))[group]
    own = random.standard_normal((features, 1024))
    vectors = (own if np.isinf(noise) else shared + noise * own).reshape(features, 64, 16)
    unit = (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).reshape(features, -1)
    found = np.abs(unit @ unit.T / 64)
    np.fill_diagonal(found, 0.0)
    return found, group


def solve(report: Report, features: int, towers: int, kind: str, limited: bool) -> float:
    """One row; the CPU seconds."""
    gain, group = strengths(features, towers, NOISE[kind])
    resources = memory(features)[:, None] if limited else np.zeros((features, 0))
    problem, start = stated(gain, resources, towers, BALANCE)
    begun = time.process_time()
    found = partition(problem, start)
    seconds = time.process_time() - begun
    rival = rival_partition(gain.max() - gain - np.diag(np.diag(gain.max() - gain)), towers, problem.sizes)
    report.row(
        features=features,
        towers=towers,
        strengths=kind,
        limits="sizes, memory" if limited else "sizes",
        value=found.value,
        bound=found.bound,
        gap=1 - found.value / found.bound,
        proved_by=found.method,
        rand_index=rand_index(found.tower, group) if kind != "no groups" else None,
        rival=partition_value(gain, rival),
        cpu_seconds=seconds,
    )
    return seconds


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="26 and 180 features")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    report = Report("tower_partition")
    cases = [(26, 2), (26, 4), (180, 8), (180, 16)]
    if not options.quick:
        cases += [(510, 16), (510, 64), (856, 16), (856, 64)]
    longest = max(
        solve(report, features, towers, kind, limited)
        for features, towers in cases
        for kind in NOISE
        for limited in ((False, True) if kind != "no groups" else (False,))
    )
    report.claim("longest_cpu_seconds", longest, SECONDS, "<=")
    alone = [row for row in report.rows if row["limits"] == "sizes"]
    report.claim("worst_value_over_rival", min(row["value"] / row["rival"] for row in alone), 1.0, ">=")
    few = [row["gap"] for row in report.rows if row["features"] == 26]
    report.claim("gap_of_26_features", max(few), 1e-6, "<=")
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
