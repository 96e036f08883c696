"""Towers measured: step time on slow links against flat TorchRec, beside what the planner predicts, and AUC.

    python benchmarks/towers.py [--quick] [--json] [--seeds 5] [--clusters 2x2 4x1] [--sample FILE.npz]
                                [--shares 0.3 0.5 0.7 | --links 169Mbps]

A DLRM over 26 tables trains on the emulated cluster (2 hosts x 2 ranks, and 4 hosts x 1), flat under TorchRec, in tower
form (SPTT), with tower modules (TM), and with a codec between peers. Links are as fast as makes the flat plan
spend about 30, 50 and 70 % of its step on them, found by bracketing. The share that is printed was measured in the run
of the variants: a twin of the flat model takes its steps on opened links.

Accuracy is judged on MovieLens-100K and on a stream of Criteo's shape with planted groups of features: flat,
towers learned from the embeddings of another seed, those with the codec, and random towers of the same sizes. The
planner chooses towers and widths under the same accuracy budget everywhere, and those that are timed are those that are
trained. One seed has no standard error, so --quick judges by 0.002 alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._report import Report
from benchmarks._towers_data import MovieLens, Planted
from benchmarks._towers_learning import accuracy, movielens_decision, sample
from benchmarks._towers_steps import BUDGET, CODEC, PUBLISHED, SHARES, Setting, steps_at_speeds
from benchmarks.cluster import ClusterUnavailable
from ir.tower_sample import PooledSample


def main() -> int:
    """Run the benchmark; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one cluster, slowest link, few steps, one seed")
    parser.add_argument("--seeds", type=int, default=5, help="of the accuracy part; 0 leaves it out")
    parser.add_argument(
        "--clusters", nargs="*", default=["2x2", "4x1"], help="HOSTSxRANKS; none leaves out the steps"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help="of the flat step that the link is to take"
    )
    parser.add_argument(
        "--links",
        nargs="+",
        default=[],
        help="speeds of the slow link (169Mbps), instead of a search for shares",
    )
    parser.add_argument(
        "--sample", type=Path, help="pooled embeddings of the planted stream, read, or written if absent"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = Report("towers")
    seeds = min(args.seeds, 1) if args.quick else args.seeds
    planted = Planted()
    with tempfile.TemporaryDirectory() as folder:
        path = args.sample or Path(folder) / "planted.npz"
        if not path.exists():
            sample(planted, path)
        for name in args.clusters[:1] if args.quick else args.clusters:
            hosts, ranks = (int(part) for part in name.split("x"))
            try:
                shares = args.shares[-1:] if args.quick else args.shares
                steps_at_speeds(report, Setting(hosts, ranks, path), shares, args.links, args.quick)
            except ClusterUnavailable as error:
                report.note(f"no emulated cluster: {error}")
                report.claim(f"{name}_speed_up_slowest", None, PUBLISHED, ">=")
        if seeds > 0:
            data = MovieLens()
            ratings = Path(folder) / "movielens.npz"
            towers = {"2x1": movielens_decision(data, ratings, BUDGET)}
            accuracy(report, "movielens", data, towers, CODEC, seeds, PooledSample.load(ratings))
            # four towers are the planted groups, and the harder case: two hold two groups each
            learned = {
                f"{hosts}x{4 // hosts}": Setting(hosts, 4 // hosts, path).decision() for hosts in (4, 2)
            }
            accuracy(report, "planted", planted, learned, CODEC, seeds, PooledSample.load(path))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
