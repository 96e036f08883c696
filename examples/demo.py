"""``make demo``: plan DLRM-DCNv2 for 128 H100, then plan a capped one for this machine and train it for real."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

# two ranks share this machine's cores; one thread each keeps them from fighting over them
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.rule import Rule

import planner
from planner.render import WIDTH, summary, table_list
from planner.run import factory_of, progress, render_run

RANKS = 2
BATCH = 512
STEPS = 7


def console() -> Console:
    """The terminal, or a pipe of fixed width."""
    out = Console()
    return out if out.is_terminal else Console(width=WIDTH)


def plan_the_cluster(out: Console) -> None:
    """The MLPerf model on 16 hosts of 8 H100."""
    out.print(Rule('planner.compile("dlrm-dcnv2", "h100-16x8")'))
    plan = planner.compile("dlrm-dcnv2", "h100-16x8")
    out.print(summary(plan))
    out.print()
    out.print(table_list(plan, limit=8))


def train_here(out: Console) -> bool:
    """The row-capped model on this machine: calibrate, plan, train, compare."""
    from codegen.runtime.compare import run_plan
    from planner.calibrate import measure_here, save
    from planner.models import resolve

    out.print()
    out.print(Rule(f"this machine: planner calibrate --ranks {RANKS}"))
    with tempfile.TemporaryDirectory() as folder:
        topology, calibration = save(measure_here(RANKS, repeats=3), Path(folder) / f"local-{RANKS}.yaml")
    out.print(
        f"each of {RANKS} ranks: {topology.device.flops['fp32'] / 1e9:.0f} GFLOP/s, memory "
        f"{topology.device.tiers[0].read_bandwidth / 1e9:.1f} GB/s, link {topology.intra_link.bandwidth / 1e9:.2f} GB/s"
    )
    out.print()
    out.print(Rule(f'planner.compile("dlrm-dcnv2-small", "local-{RANKS}"), then trained by TorchRec on gloo'))
    workload = resolve("dlrm-dcnv2-small").workload or planner.Workload()
    plan = planner.compile(
        "dlrm-dcnv2-small", topology, replace(workload, global_batch=BATCH), calibration=calibration
    )
    out.print(summary(plan))
    factory, arguments, options = factory_of(plan)
    with progress(STEPS) as on_step:
        result = run_plan(plan, factory, arguments, options, steps=STEPS, on_step=on_step)
    out.print()
    out.print(render_run(plan, result))
    return result.equal


def main() -> int:
    """Both parts; exit code 1 when the sharded run differs from the unsharded one."""
    out = console()
    plan_the_cluster(out)
    return 0 if train_here(out) else 1


if __name__ == "__main__":
    raise SystemExit(main())
