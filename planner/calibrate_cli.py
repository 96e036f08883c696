"""``planner calibrate``; also ``torchrun ... -m planner.calibrate_cli`` on a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ir.errors import InputError, PlannerError

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.topology import Topology
    from planner.calibrate import OnStage


@click.command()
@click.option("--output", "-o", required=True, type=click.Path(), help="Topology YAML to write.")
@click.option("--ranks", type=int, help="Ranks to start on this machine; 2 when left out.")
@click.option("--name", help="Name of the topology; the file's when left out.")
@click.option(
    "--repeats", type=click.IntRange(1, 100), default=5, show_default=True, help="Behind each median."
)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds for the whole run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def calibrate(
    output: str, ranks: int | None, name: str | None, repeats: int, timeout: float, as_json: bool
) -> None:
    """Measure this machine, or the cluster that torchrun started this on, and write its topology.

    On one machine:  planner calibrate --ranks 2 -o local.yaml

    On a cluster:    torchrun --nnodes 2 --nproc-per-node 8 ... -m planner.calibrate_cli -o cluster.yaml

    Writes local.yaml (the topology) and local.calibration.yaml (constants of the cost models, every measured point).
    """
    from planner.calibrate import under_torchrun

    try:
        _check_output(output)
        if under_torchrun():
            if ranks is not None:
                raise InputError("torchrun has started the ranks already; leave --ranks out")
            _on_cluster(output, name, repeats, as_json)
        else:
            _on_this_machine(output, 2 if ranks is None else ranks, name, repeats, timeout, as_json)
    except PlannerError as error:
        from planner.cli_support import fail

        fail(error, as_json)


def _check_output(output: str) -> None:
    """Refuse a path that could not be written before a minute is spent on measuring."""
    path = Path(output)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"the topology file {path} must end in .yaml, or planner.topology cannot find it")
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {path}: the folder {path.parent} does not exist; make it or choose another"
        )


def _on_cluster(output: str, name: str | None, repeats: int, as_json: bool) -> None:
    from planner.calibrate import measure_torchrun, save

    rank, record = measure_torchrun(repeats=repeats)
    if rank == 0:
        _tell(output, *save(record, output, name), as_json)


def _on_this_machine(
    output: str, ranks: int, name: str | None, repeats: int, timeout: float, as_json: bool
) -> None:
    from planner.calibrate import STAGES, measure_here, save

    if not sys.stderr.isatty():
        _tell(output, *save(measure_here(ranks, repeats=repeats, timeout=timeout), output, name), as_json)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting ranks", total=len(STAGES))
        started = iter(range(len(STAGES)))

        def heard(stage: str) -> None:
            progress.update(task, description=f"measuring {stage}", completed=next(started))

        on_stage: OnStage = heard
        record = measure_here(ranks, repeats=repeats, timeout=timeout, on_stage=on_stage)
    _tell(output, *save(record, output, name), as_json)


def _tell(output: str, topology: Topology, calibration: Calibration, as_json: bool) -> None:
    from ir.reading import dump_record
    from ir.units import format_bandwidth, format_bytes, format_seconds
    from planner.calibrate import calibration_path

    if as_json:
        click.echo(json.dumps({"topology": topology.to_dict(), "calibration": dump_record(calibration)}))
        return
    tier = topology.device.tiers[0]
    shape = f"{topology.hosts} x {topology.host_size}"
    click.echo(f"hosts x ranks: {shape}; per rank, with all ranks at work:")
    click.echo(
        f"  memory   {format_bytes(tier.capacity)}, read {format_bandwidth(tier.read_bandwidth)}, "
        f"write {format_bandwidth(tier.write_bandwidth)}"
    )
    for dtype, rate in topology.device.flops.items():
        click.echo(f"  GEMM     {dtype} {rate / 1e9:.1f} GFLOP/s")
    click.echo(f"  lookups  {calibration.row_efficiency:.0%} of the memory's rate")
    for level in topology.levels:
        click.echo(
            f"  {level.name:<8} {level.link.name} {format_bandwidth(level.link.bandwidth)}, "
            f"latency {format_seconds(level.link.latency)}"
        )
    click.echo(f"written to {output} and {calibration_path(output)}; next: planner compile MODEL -t {output}")


if __name__ == "__main__":
    calibrate(prog_name="planner calibrate")
