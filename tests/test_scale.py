"""The scaling advisor against the paper's table and against plans compiled one by one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import planner
from ir.errors import InputError
from planner.cli import cli
from planner.scale import captured_at, relative_log_loss, scale_wukong, sizes
from planner.scale_cli import svg

DATA = Path(__file__).parent.parent / "planner" / "data" / "measured" / "published_figures.json"
TABLE5 = json.loads(DATA.read_text(encoding="utf-8"))["wukong"]["table5_wukong"]


def test_the_walk_is_table_5_and_then_goes_on_growing() -> None:
    walked = list(itertools.islice(sizes(), 11))
    published = [(row["l"], row["nF"], row["k"], row["mlp"]) for row in TABLE5]
    assert [(s.layers, s.vectors, s.rank, f"3x{s.width}") for s in walked[:7]] == published
    for before, after in itertools.pairwise(walked):
        shapes = [(s.layers, s.vectors, s.rank, s.width) for s in (before, after)]
        assert all(x <= y for x, y in zip(*shapes, strict=True))
        assert shapes[0] != shapes[1]


def test_the_law_gives_the_published_losses() -> None:
    for row in TABLE5:
        found = relative_log_loss(row["gflop_per_example"])
        assert found == pytest.approx(row["rel_logloss_task1"], abs=0.05)  # per cent
    # the abstract: about 0.1 % for four times the compute
    assert relative_log_loss(4.0) - relative_log_loss(16.0) == pytest.approx(0.1, abs=0.005)


TABLES = [{"name": f"t{i}", "rows": 500_000, "dim": 64} for i in range(6)]


def test_each_row_is_what_compile_says(tmp_path: Path) -> None:
    file = tmp_path / "tables.json"
    file.write_text(json.dumps({"tables": TABLES}), encoding="utf-8")
    machine = planner.topology("h100-1x2")
    advice = scale_wukong(machine, 1.0, tables=str(file), global_batch=4096, time_limit=1.0)
    walked = [row for row in advice.rows if not row.alone]
    assert [row.size.label for row in walked] == [s.label for s in itertools.islice(sizes(), len(walked))]
    assert all(row.gflop <= 1.0 for row in walked)
    assert {row.size.grew for row in advice.rows if row.alone} == {
        f"{k} alone" for k in ("l", "n", "k", "MLP")
    }
    for row in advice.rows[::3]:
        model, work = captured_at(row.size, str(file))
        alone = planner.compile(model, machine, replace(work, global_batch=4096), time_limit=1.0)
        assert row.gflop == pytest.approx(3 * model.dense_flops / 1e9)
        assert row.step == pytest.approx(alone.timeline.step, rel=0.02)  # of searches that stop at a gap
        assert row.device_seconds == pytest.approx(1e6 * 2 * row.step / 4096)  # type: ignore[operator]
    root = ElementTree.fromstring(svg(advice))
    marks = [element for element in root.iter() if element.tag.endswith("circle")]
    assert len(marks) == sum(row.step is not None for row in advice.rows)


def test_sizes_that_do_not_fit_are_rows_with_the_reason(tmp_path: Path) -> None:
    file, limits = tmp_path / "tables.json", tmp_path / "limits.yaml"
    file.write_text(json.dumps({"tables": TABLES}), encoding="utf-8")
    limits.write_text("memory_limit: 3000000000\n", encoding="utf-8")
    command = ["scale", "wukong", "-t", "h100-1x2", "--budget-gflop", "4", "--tables", str(file), "--json"]
    command += ["--batch", "1024", "-c", str(limits), "--time-limit", "1", "--dollars-per-hour", "2"]
    run = CliRunner().invoke(cli, command)
    assert run.exit_code == 0, run.output
    data: Any = json.loads(run.stdout)
    fits = [row for row in data["rows"] if row["step"] is not None]
    rest = [row for row in data["rows"] if row["step"] is None]
    assert fits
    assert rest
    assert all(row["problem"] for row in rest)
    assert max(row["memory"] for row in fits) <= 3_000_000_000 * 0.85
    for row in fits:
        assert row["dollars_per_billion_samples"] == pytest.approx(row["device_seconds"] * 1e3 / 3600 * 2)


def test_budgets_that_buy_nothing() -> None:
    with pytest.raises(InputError, match="positive number of GFLOP"):
        scale_wukong("h100-1x2", 0.0)
    with pytest.raises(InputError, match="below the smallest size"):
        scale_wukong("h100-1x2", 0.01)
