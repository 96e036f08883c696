"""Deduplicated against plain training: bytes on the wire, lookups and step time, on the emulated cluster.

    python benchmarks/dedup.py [--quick] [--json] [--inter 200Mbps]

A session-structured stream (16.5 samples a session, as RecD's authors report for their data) is batched by
session and trains a DLRM sharded over 2 hosts x 2 ranks, once with plain batches under the plan for them, once
deduplicated under the plan for that. RecD (MLSys 23) publishes 2.48x trainer throughput; its models, fleet
and storage are others, so the figure is context, not a target. On MovieLens-100K, whose sessions are the
ratings of one user within a day, the saving is counted without a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import planner
from benchmarks._dedup_worker import Stream, model
from benchmarks._report import Report
from benchmarks.cluster import Cluster, ClusterUnavailable
from cost_models.dedup import dedupe_factor
from ir.session_stats import sessions_from_batches
from ir.topology import Level, Link, Topology
from ir.units import parse_bandwidth

PER_SESSION = 16.5
PUBLISHED = 2.48  # trainer throughput, RecD, MLSys 23, abstract
HOSTS, RANKS = 2, 2
WORKER = Path(__file__).with_name("_dedup_worker.py")
SESSION_SECONDS = 24 * 3600  # MovieLens: a pause longer than this ends a session


def machine(inter: str) -> Topology:
    """Two hosts of two ranks; the ranks of a host share its card."""
    base = planner.topology(f"local-{RANKS}")
    link = Link(
        "cluster", parse_bandwidth(inter) / RANKS, 60e-6, "the token bucket's rate over the ranks of a host"
    )
    return replace(base, name=f"cluster-{inter}", levels=(base.levels[0], Level("cluster", HOSTS, link)))


def plans(topology: Topology, batch: int) -> dict[str, planner.Plan]:
    """The plan for plain batches and the one for deduplicated ones, from the same measured workload."""
    stream = Stream(16 * batch, PER_SESSION, seed=99)  # none of the seeds that train
    order = np.arange(16 * batch).reshape(16, batch)
    batches = [stream.batch(part) for part in order]
    workload = replace(
        planner.Workload.from_batches([b[1] for b in batches], world_size=topology.world_size),
        optimizer="sgd",
    )
    sessions = sessions_from_batches(
        (b[1], stream.sessions[part]) for b, part in zip(batches, order, strict=True)
    )
    module = model("meta")
    return {
        "plain": planner.compile(module, topology, workload),
        "dedup": planner.compile(module, topology, replace(workload, sessions=sessions)),
    }


def train(cluster: Cluster, plan: planner.Plan, name: str, batch: int, steps: int) -> dict[str, Any]:
    """Run the worker on every rank; what rank 0 measured."""
    settings = {
        "plan": plan.to_dict(),
        "batch": batch,
        "steps": steps,
        "per_session": PER_SESSION,
        "dedup": name == "dedup",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        result = cluster.run(WORKER, [file.name], timeout=600)
    for line in result.logs[0].splitlines():
        if "RESULT " in line:
            found: dict[str, Any] = json.loads(line.split("RESULT ", 1)[1])
            return found
    raise SystemExit(f"the {name} run failed:\n{result.output}")


def on_cluster(report: Report, inter: str, batch: int, steps: int) -> None:
    """Rows of both runs and the claims about their ratios."""
    topology = machine(inter)
    made = plans(topology, batch)
    section = made["dedup"].decisions.dedup
    found = {}
    with Cluster(HOSTS, RANKS, inter) as cluster:
        for name, plan in made.items():
            found[name] = train(cluster, plan, name, batch, steps)
            report.row(
                run=name,
                step_ms=1e3 * found[name]["step"],
                wire_MB=found[name]["bytes"] / 1e6,
                lookups_k=found[name]["lookups"] / 1e3,
                modelled_ms=1e3 * plan.timeline.step,
                loss=found[name]["loss"],
            )
    plain, dedup = found["plain"], found["dedup"]
    gain = plain["step"] / dedup["step"]
    chosen = sum(len(group.features) for group in section.chosen) if section else 0
    report.note(
        f"{inter} cards, {HOSTS}x{RANKS} ranks, {batch} samples a rank, {steps} steps; {chosen} features deduplicated"
    )
    report.note(f"step time {gain:.2f}x shorter; RecD publishes {PUBLISHED}x (its own models and fleet)")
    report.claim("step_time_gain", gain, 1.5, ">=")
    report.claim("wire_bytes_ratio", plain["bytes"] / dedup["bytes"], 1.5, ">=")
    report.claim("lookups_ratio", plain["lookups"] / dedup["lookups"], 1.5, ">=")
    report.claim("loss_difference", abs(plain["loss"] - dedup["loss"]), 1e-5, "<=")


def on_movielens(report: Report) -> None:
    """Formula against count on real sessions."""
    from codegen.runtime.dedup.ikjt import InverseKeyedJaggedTensor
    from codegen.runtime.dedup.sessions import session_batches
    from examples import _movielens as movielens

    data = movielens.load()
    user = data.ids["user"][0][: data.train]
    time = data.times[: data.train]
    order = np.lexsort((time, user))
    new = (np.diff(user[order], prepend=-1) != 0) | (np.diff(time[order], prepend=0) > SESSION_SECONDS)
    sessions = np.empty(len(user), np.int64)
    sessions[order] = np.cumsum(new)
    batches = list(session_batches(sessions, 1024, seed=0))[:20]
    pairs = [(data.batch(np.asarray(p))[1], sessions[p]) for p in batches]
    stats = sessions_from_batches(pairs)
    for group in stats.groups:
        whole = sum(len(p) for p in batches)
        rows = sum(InverseKeyedJaggedTensor.from_kjt(b, [group.features]).groups[0].rows for b, _ in pairs)
        report.row(
            run="movielens " + "+".join(group.features),
            factor=whole / rows,
            formula=dedupe_factor(stats.samples_per_session, group.stay),
        )
    report.note(f"movielens: {stats.samples_per_session:.1f} samples a session in batches of 1,024")


def main() -> int:
    """Run the benchmark; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inter", default="200Mbps", help="speed of each host's card")
    args = parser.parse_args()
    report = Report("dedup")
    on_movielens(report)
    try:
        on_cluster(report, args.inter, batch=1024, steps=6 if args.quick else 20)
    except ClusterUnavailable as error:
        report.note(f"no emulated cluster: {error}")
        report.claim("step_time_gain", None, 1.5, ">=")
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
