"""Towers measured: step time on slow links against flat TorchRec, beside what the planner predicts, and AUC.

    python benchmarks/towers.py [--quick] [--json] [--seeds 5]

A DLRM over 26 tables trains on the emulated cluster (2 hosts x 2 ranks), flat under TorchRec, in tower form
(SPTT), with tower modules that send one vector for four (TM), and with a codec between peers. Links are as fast as
makes the flat plan spend about 30, 50 and 70 % of its step on them: the step is timed on fast links first, and
the speeds follow from the bytes that it sends. The share that was really reached is printed.

Accuracy is judged on MovieLens-100K and on a stream of Criteo's shape with planted groups of features: flat,
towers learned from the embeddings of another seed, those with the codec, and random towers of the same sizes. One seed
has no standard error, so --quick judges by 0.002 alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import Report
from benchmarks._towers_learning import MovieLens, Planted, accuracy
from benchmarks._towers_steps import CODEC, PUBLISHED, steps_at_speeds
from benchmarks.cluster import ClusterUnavailable


def main() -> int:
    """Run the benchmark; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the slowest link only, few steps, one seed")
    parser.add_argument("--seeds", type=int, default=5, help="of the accuracy part; 0 leaves it out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = Report("towers")
    try:
        steps_at_speeds(report, args.quick)
    except ClusterUnavailable as error:
        report.note(f"no emulated cluster: {error}")
        report.claim("speed_up_slowest", None, PUBLISHED, ">=")
    seeds = min(args.seeds, 1) if args.quick else args.seeds
    if seeds > 0:
        accuracy(report, "movielens", MovieLens(), CODEC, seeds)
        accuracy(report, "planted", Planted(), CODEC, seeds)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
