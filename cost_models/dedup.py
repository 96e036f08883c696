"""What deduplicating repeated samples saves (RecD, MLSys 23).

With S samples a session side by side in a batch and d the probability that a feature's ids stay from one
sample of a session to the next, B samples hold B (1 - d (S - 1) / S) distinct rows: the first sample of each
session, and each later one that changed. So a row stands for 1 / (1 - d (S - 1) / S) samples.
"""

from __future__ import annotations

from cost_models.calibration import Calibration
from ir.dtypes import nbytes
from ir.topology import Topology
from ir.workload import Workload


def dedupe_factor(samples_per_session: float, stay: float) -> float:
    """Samples that one distinct row stands for: 1 / (1 - d (S - 1) / S)."""
    return 1.0 / (1.0 - stay * (samples_per_session - 1.0) / samples_per_session)


def expand_seconds(
    samples: float,
    columns: int,
    factor: float,
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    *,
    train: bool,
) -> float:
    """Seconds one rank needs to repeat pooled rows for its ``samples`` (and to add up their gradients).

    Forward: distinct rows and the inverse index read, all rows written; backward: all gradient rows read,
    distinct ones read and written. One kernel each.
    """
    tier = topology.device.tiers[0]
    row = columns * nbytes(workload.exchange_dtype)
    distinct = samples / factor * row
    whole = samples * row
    seconds = (distinct + 4 * samples) / tier.read_bandwidth + whole / tier.write_bandwidth
    launches = 1
    if train:
        seconds += (whole + distinct) / tier.read_bandwidth + distinct / tier.write_bandwidth
        launches = 2
    return seconds / calibration.row_efficiency + launches * calibration.kernel_seconds
