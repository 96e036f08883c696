"""What benchmarks on the emulated cluster share: settings in, one JSON line of rank 0 out; calibrating it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cluster import Cluster
from benchmarks.cluster.launcher import OnLine
from planner.calibrate import calibration_path, load_calibration

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.topology import Topology

MARK = "RESULT "


def run_worker(
    cluster: Cluster,
    worker: Path,
    settings: Mapping[str, Any],
    timeout: float = 600,
    on_line: OnLine | None = None,
) -> Any:
    """Run ``worker`` with ``settings`` (a JSON file) on every rank; the JSON that rank 0 printed.

    ``on_line`` hears every line that any rank prints, while it runs.

    Raises:
        SystemExit: the worker failed; its output is the message.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        result = cluster.run(worker, [file.name], timeout=timeout, on_line=on_line)
    for line in result.logs[0].splitlines():
        if MARK in line:
            return json.loads(line.split(MARK, 1)[1])
    said = result.logs[0] or result.output  # torchrun adds pages of its own at the end
    raise SystemExit(f"{worker.name} failed on the cluster:\n{said[-4000:]}")


def calibrate(cluster: Cluster, path: Path, repeats: int = 3) -> tuple[Topology, Calibration]:
    """``planner calibrate`` on the cluster; what it found is written to ``path`` and returned."""
    import planner

    result = cluster.run(
        "planner.calibrate_cli", ["-o", str(path), "--repeats", str(repeats)], module=True, timeout=600
    )
    if result.exit_code:
        raise SystemExit(f"planner calibrate failed on the cluster:\n{result.output[-4000:]}")
    return planner.topology(str(path)), load_calibration(calibration_path(path))
