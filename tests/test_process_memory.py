"""Predicted peak memory of a process against real gloo ranks, and by hand."""

from __future__ import annotations

from benchmarks.peak_memory import CALIBRATION, JUDGED, UNDER, Case, fullest, here, measured
from cost_models.process_memory import ProcessMemory, process_peak


def test_each_purpose_has_its_factor() -> None:
    used = {"weights": 100, "optimizer": 50, "gradients": 20, "io": 8, "activations": 2, "dense": 7}
    made = ProcessMemory(base=1000, state=2.0, gradients=3.0, traffic=10.0, beyond=4.0, pool=6)
    assert process_peak(used, made) == 1000 + 300 + 60 + (6 * 10 + 4 * 4) + 7


def test_no_judged_plan_is_a_calibration_run() -> None:
    runs = {(c.ranks, c.tables, c.rows, c.dim, c.batch, c.kinds) for c in CALIBRATION.values()}
    assert not runs & {(c.ranks, c.tables, c.rows, c.dim, c.batch, c.kinds) for c in JUDGED}


def test_real_ranks_hold_what_is_predicted() -> None:
    """Sharded and replicated tables with state: an error of one table's bytes would be 8 % of the process."""
    case = Case("", 2, 4, 200_000, 64, 1024, ("row_wise", "data_parallel"), "adagrad")
    plan = case.plan()
    found = measured(case, plan)
    assert found > 600e6  # most of it is the plan's, not the base
    assert UNDER <= fullest(plan, here()) / found - 1 <= 0.08
