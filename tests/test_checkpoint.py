"""Checkpoints move between plans: bit-identical weights and state, and training goes on after a rank is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import planner
from codegen.checkpoint import known_to
from codegen.runtime.launch import LaunchError, launch
from ir.constraints import Constraints, TableConstraint
from ir.errors import PlannerError
from tests.checkpoint_rank import GLOBAL_BATCH, TABLES, model

RANK = f"{Path(__file__).with_name('checkpoint_rank.py')}:train"
MIXED = ("table_wise", "row_wise", "column_wise", "data_parallel", "table_wise", "row_wise")
OTHER = ("row_wise", "column_wise", "data_parallel", "table_wise", "column_wise", "table_wise")
BY_ROW = ("table_wise", "row_wise", "data_parallel", "row_wise", "table_wise", "data_parallel")


def plan(ranks: int, types: tuple[str, ...], optimizer: str, **of_model: Any) -> planner.Plan:
    tables = {f"t{n}": TableConstraint(sharding_types=(kind,)) for n, kind in enumerate(types)}  # type: ignore[arg-type]
    workload = planner.Workload(global_batch=GLOBAL_BATCH, optimizer=optimizer)  # type: ignore[arg-type]
    return planner.compile(
        model(**of_model),
        f"local-{ranks}",
        workload,
        constraints=Constraints(min_column_width=8, tables=tables),
    )


def run(made: planner.Plan, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Train and return the whole weights."""
    given = {"load": False, "save_every": 0, "weights": "weights.pt", "dense": "adagrad", **settings}
    arguments = {"plan": made.to_dict(), "folder": str(folder), "settings": given}
    launch(RANK, made.world_size, arguments, timeout=240)
    weights: dict[str, torch.Tensor] = torch.load(folder / given["weights"], weights_only=True)
    return weights


@pytest.mark.parametrize(
    ("optimizer", "before", "after"), [("adagrad", MIXED, OTHER), ("rowwise_adagrad", BY_ROW, BY_ROW[::-1])]
)
def test_moving_to_fewer_ranks_and_other_shardings_is_bit_identical(
    optimizer: str, before: tuple[str, ...], after: tuple[str, ...], tmp_path: Path
) -> None:
    undisturbed = run(plan(4, before, optimizer), tmp_path / "old", until=5, save_every=3)
    resumed = run(
        plan(2, after, optimizer), tmp_path / "old", until=5, load=True, copy_to=str(tmp_path / "new")
    )
    was, now = whole(tmp_path / "old"), whole(tmp_path / "new")
    assert set(was) == set(now)
    for name, value in was.items():
        assert torch.equal(value, now[name]), name
    assert len(undisturbed) > TABLES
    for (
        name,
        value,
    ) in undisturbed.items():  # two more steps agree only if weights and state went where they belong
        assert not torch.equal(value, was[name]), name
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6, msg=name)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the one checkpoint in a folder, put together by torch's own converter."""
    (step,) = folder.glob("step-*")
    dcp_to_torch_save(step, folder / "whole.pt")
    found: dict[str, torch.Tensor] = torch.load(folder / "whole.pt", weights_only=True)
    return found


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        ("adagrad", MIXED, (*OTHER, "row_wise", "data_parallel")),
        ("rowwise_adagrad", BY_ROW, (*BY_ROW[::-1], "data_parallel", "row_wise")),
    ],
)
def test_a_checkpoint_moves_into_grown_and_added_tables(
    optimizer: str, before: tuple[str, ...], after: tuple[str, ...], tmp_path: Path
) -> None:
    """What was trained moves bit for bit, state included; new rows and tables are the new model's, their state is fresh."""
    grown = (37, 1, 5, 0, 64, 3)
    old_model: dict[str, Any] = {"summed": True}
    new_model: dict[str, Any] = {"summed": True, "grown": grown, "tables": TABLES + 2}
    old, new = plan(4, before, optimizer, **old_model), plan(2, after, optimizer, **new_model)
    run(old, tmp_path / "old", until=3, save_every=3, model=old_model)
    ways = {"model": {**new_model, "seed": 9}, "load": True, "before": old.to_dict()}
    resumed = run(new, tmp_path / "old", until=5, copy_to=str(tmp_path / "new"), weights="two.pt", **ways)
    was, now = whole(tmp_path / "old"), whole(tmp_path / "new")
    fresh = dict(model(**new_model, seed=9).named_parameters())
    moved = 0
    for key, value in was.items():
        rows = len(value) if value.ndim else None
        assert torch.equal(now[key][:rows] if value.ndim else now[key], value), key
        if now[key].shape == value.shape:
            continue
        moved += 1
        more = now[key][rows:]
        assert len(more) in grown
        if key.startswith("optimizer/"):
            assert not more.any(), key
            assert value.any(), key  # old state is not zero: it was moved
        else:
            assert torch.equal(more, fresh[key][rows:]), key
    assert moved == 10  # weight and state of five tables
    added = set(now) - set(was)
    assert len(added) == 4  # weight and state of two tables
    for key in added:
        assert not now[key].any() if key.startswith("optimizer/") else torch.equal(now[key], fresh[key]), key
        path = key.split("/")[1] if "/" in key else key
        assert not torch.equal(resumed[path], fresh[path]), path  # and they are trained from there
    other = plan(4, (*before, "row_wise", "table_wise"), optimizer, **new_model)
    # another sharding goes on alike, with ids of old and new rows and tables
    again = run(other, tmp_path / "old", until=5, weights="four.pt", **ways)
    for name, value in resumed.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_more_than_grown_tables_is_refused(tmp_path: Path) -> None:
    old = plan(2, MIXED, "adagrad")
    new = plan(2, MIXED, "adagrad", grown=(8,))
    run(old, tmp_path, until=1, save_every=1)
    with pytest.raises(PlannerError, match=r"pass the plan of the model that was saved as before"):
        run(new, tmp_path, until=1, load=True, model={"grown": (8,)})
    more = plan(2, (*MIXED, "table_wise"), "adagrad", tables=TABLES + 1)  # whose first layer reads more pairs
    with pytest.raises(PlannerError, match=r"top\.0\.weight.*layers must keep their shapes"):
        run(more, tmp_path, until=1, load=True, model={"tables": TABLES + 1}, before=old.to_dict())
    with pytest.raises(PlannerError, match=r"'t0' was 109 x 16 fp32 .* is 101 x 16 fp32"):
        known_to(new, old, {})


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    undisturbed = run(plan(2, OTHER, "adagrad"), tmp_path, until=6, weights="undisturbed.pt")
    with pytest.raises(LaunchError, match="rank 1"):
        run(plan(4, MIXED, "adagrad"), tmp_path, until=6, save_every=2, die_at=5)
    resumed = run(plan(2, OTHER, "adagrad"), tmp_path, until=6, load=True)
    for name, value in undisturbed.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_bad_checkpoints_are_one_sentence(tmp_path: Path) -> None:
    made = plan(2, MIXED, "adagrad")
    with pytest.raises(PlannerError, match="does not exist"):
        run(made, tmp_path, until=1, load=True)
    (tmp_path / "latest").write_text('{"step": 1, "folder": "step-000000001", "model": "sha256:other"}')
    with pytest.raises(PlannerError, match="of another model"):
        run(made, tmp_path, until=1, load=True)
