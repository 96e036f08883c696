"""The schedules over gloo: equal bit by bit to torch.distributed's own collectives on whole numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from codegen.runtime.collectives.choose import schedule_of
from codegen.runtime.launch import launch
from cost_models.collective.planning import SCHEDULED
from ir.errors import InputError

TARGETS = str(Path(__file__).parent / "collective_targets.py")


@pytest.mark.parametrize(
    ("ranks", "shapes"), [(2, [[2]]), (3, [[3], [1, 3]]), (4, [[4], [2, 2]])], ids=["2", "3", "4"]
)
def test_every_schedule_equals_the_library(ranks: int, shapes: list[list[int]]) -> None:
    for compared, *different in launch(f"{TARGETS}:compare_all", ranks, {"shapes": shapes}):
        assert int(compared) >= 25 * len(shapes)
        assert different == []


def test_gradients_through_the_hook() -> None:
    for algorithm in ("hierarchical", "halving_doubling"):
        for difference in launch(f"{TARGETS}:train_with_hook", 4, {"algorithm": algorithm}, host_size=2):
            assert difference < 1e-6


def test_what_a_plan_may_choose_can_run() -> None:
    for collective, names in SCHEDULED.items():
        for name in names:
            assert schedule_of(collective, name, (2, 4)).ranks == 8
    with pytest.raises(InputError, match="no schedule runs all_reduce by 'in_switch'"):
        schedule_of("all_reduce", "in_switch", (8,))
