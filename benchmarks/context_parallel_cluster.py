"""pass-KV against pass-Q on the emulated cluster, by cache-hit rate; the planner's choice beside what was fastest.

    python benchmarks/context_parallel_cluster.py [--quick] [--json] [--inter 200Mbps] [--ranks 1,2]

Two hosts of one rank, then of two. Each cluster is calibrated once: `planner calibrate`, and the attention kernel
alone on lengths that no request below has. Then the grouped-query attention of a small Llama (16 heads, 2 of keys
and values, bf16) answers requests of T new tokens after P cached ones, T + P the same, and all algorithms take
turns. The choice is that of a serving plan compiled for the request; nothing is fitted on the rings. Regret is
what the chosen algorithm took over the fastest, less 1; the least of the repetitions counts, since what disturbs one
on a shared machine only adds to it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import planner
from benchmarks._cluster_run import calibrate, run_worker
from benchmarks._report import Report
from benchmarks.cluster import Cluster, ClusterUnavailable
from cost_models.attention import Algorithm, ring_seconds
from cost_models.serving import Server
from cost_models.serving_calibration import AttentionTime, serving_rates
from ir.llm import DecoderModel
from ir.serving import ServingLayout, ServingRequest
from passes.serving import ServeDecoder
from planner.models import resolve

HOSTS = 2
TOTAL = 2048  # tokens, new and cached
NEW = (2048, 1024, 512, 256, 128, 64, 32, 16)  # cache-hit rates 0 to 0.992
SIZES = {"layers": 2, "hidden": 1024, "ffn": 2048, "heads": 16, "kv_heads": 2, "vocab": 256}
ALGORITHMS: tuple[Algorithm, ...] = ("pass_kv", "pass_q", "pass_q_eager")
WORKER = Path(__file__).with_name("_ring_worker.py")


def kernel_lengths(ranks: int) -> list[tuple[int, int]]:
    """(new, keys) of the attentions that calibrate: a rank's share of the keys, few to many queries, two causal."""
    keys = TOTAL // ranks
    return [*((new, keys) for new in (6, 24, 100, 350)), (200, 200), (450, 450)]


def measure(inter: str, ranks: int, turns: int) -> tuple[Server, dict[str, dict[str, float]]]:
    """The calibrated machine, and seconds of a ring by new tokens and algorithm."""
    model = resolve("llama-tiny", **SIZES).model
    assert isinstance(model, DecoderModel)
    shape = model.shape
    settings = {
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "total": TOTAL,
        "new": NEW,
        "lengths": kernel_lengths(HOSTS * ranks),
        "turns": turns,
    }
    with tempfile.TemporaryDirectory() as folder, Cluster(HOSTS, ranks, inter) as cluster:
        topology, calibration = calibrate(cluster, Path(folder) / "cluster.yaml")
        found = run_worker(cluster, WORKER, settings)
    kernel = [AttentionTime(**time) for time in found["attention"]]
    rates = serving_rates(topology, calibration, kernel, found["merge"])
    return Server(shape, topology, rates), found["rings"]


def planned(server: Server, new: int) -> str:
    """How a plan for the request attends."""
    request = ServingRequest(
        new=new,
        cached=TOTAL - new,
        tensor=1,
        context=server.topology.world_size,
        pipeline=1,
        weights=("bf16",),
    )
    plan = planner.compile(
        resolve("llama-tiny", **SIZES).model,
        server.topology,
        mode="inference",
        constraints=planner.Constraints(serving=request),
        passes=(ServeDecoder(rates=server.rates),),
    )
    assert plan.decisions.serving is not None
    return plan.decisions.serving.chosen.exchange


def judge(report: Report, inter: str, ranks: int, turns: int) -> list[float]:
    """Rows and claims of one cluster; relative errors of the predicted seconds."""
    server, measured = measure(inter, ranks, turns)
    layout = ServingLayout(1, HOSTS * ranks, 1, "bf16", "bf16")
    rates, heads = server.ring_rates(layout)[0], server.head_shape(layout)
    of_two, of_all, errors = [], [], []
    rules: dict[str, list[float]] = {"always pass-KV": [], "always pass-Q": []}
    for new in NEW:
        seconds = measured[str(new)]
        two = {name: seconds[name] for name in ("pass_kv", "pass_q")}
        choice = server.exchange(layout, new, TOTAL - new, ("pass_kv", "pass_q"))
        plan = planned(server, new)
        of_two.append(two[choice] / min(two.values()) - 1)
        of_all.append(seconds[plan] / min(seconds.values()) - 1)
        for name, algorithm in zip(rules, two, strict=True):
            rules[name].append(two[algorithm] / min(two.values()) - 1)
        cells: dict[str, Any] = {
            "inter": inter,
            "hosts": f"{HOSTS}x{ranks}",
            "hit": f"{1 - new / TOTAL:.3f}",
            "new": new,
        }
        for name in ALGORITHMS:
            predicted = ring_seconds(name, heads, new, TOTAL - new, layout.context, rates).seconds
            errors.append(predicted / seconds[name] - 1)
            cells[name] = f"{1e3 * predicted:.1f} / {1e3 * seconds[name]:.1f} ms"
        report.row(
            **cells, of_two=choice, regret=f"{of_two[-1]:.1%}", plan=plan, plan_regret=f"{of_all[-1]:.1%}"
        )
    where = f"{HOSTS}x{ranks}, {inter}"
    report.claim(f"pass-KV or pass-Q, worst regret, {where}", max(of_two), 0.03, "<=")
    report.claim(f"the plan's choice of three, worst regret, {where}", max(of_all), 0.03, "<=")
    for name, lost in rules.items():
        report.note(f"{where}: {name} loses up to {max(lost):.0%}, {statistics.mean(lost):.0%} on average")
    report.note(
        f"{where}: calibrated attention {rates.attention_flops / 1e9:.1f} GFLOP/s and {1e3 * rates.kernel_seconds:.2f} ms, "
        f"ring {rates.send_bandwidth / 1e6:.1f} MB/s, all-to-all {rates.all_to_all_bandwidth / 1e6:.1f} MB/s"
    )
    return errors


def main() -> int:
    """Run the benchmark; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one rank a host, fewer turns")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inter", default="200Mbps", help="speeds of each host's card, separated by commas")
    parser.add_argument("--ranks", default="1,2", help="ranks of a host")
    args = parser.parse_args()
    report = Report("context_parallel_cluster")
    errors: list[float] = []
    try:
        for inter in args.inter.split(","):
            for ranks in args.ranks.split(",")[: 1 if args.quick else None]:
                errors += judge(report, inter, int(ranks), 2 if args.quick else 3)
    except ClusterUnavailable as error:
        report.note(f"no emulated cluster: {error}")
        report.claim("pass-KV or pass-Q, worst regret", None, 0.03, "<=")
    if errors:
        report.note(f"predicted / measured: mean error {statistics.mean(map(abs, errors)):.0%}")
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
