"""The HTML report: one file without network, small, and alive in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import planner
from benchmarks._tables import builtin
from codegen.runtime.spans import Span
from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.program import Model
from planner.cli import cli
from planner.report import render_report, write_report
from planner.report_measured import Measured
from planner.report_pareto import BudgetPoint, memory_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=8000"),
)


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return planner.compile("dlrm-dcnv2", "h100-2x8", time_limit=0.3)


@pytest.fixture(scope="module")
def large() -> planner.Plan:
    tables = builtin("meta_dlrm_datasets_856")["meta_dlrm_datasets_856"]
    records = tuple(EmbeddingTable(t.name, t.rows, t.dim, (f"f_{t.name}",)) for t in tables)
    stats = {f"f_{t.name}": planner.FeatureStats(pooling_factor=t.pooling) for t in tables}
    workload = planner.Workload(features=stats)
    return planner.compile(
        Model("856", records, ()), "h100-16x8", workload, objective="bottleneck", time_limit=0.3
    )


class Checker(HTMLParser):
    """Open elements must be closed, and nothing may be fetched."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_wellformed_file_that_fetches_nothing(plan: planner.Plan) -> None:
    page = render_report(plan, sensitivity=False)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)[^\s\"<]*\.(js|css|woff)", page)
    assert "@import" not in page


def test_a_large_plan_stays_small(large: planner.Plan, tmp_path: Path) -> None:
    size = write_report(large, tmp_path / "r.html", sensitivity=False)
    assert len(large.table_plans) == 856
    assert size < 5e6


def test_names_cannot_break_out_of_the_page(plan: planner.Plan) -> None:
    evil = "</script><script>document.title='broken'</script>"
    tables = (replace(plan.table_plans[0], name=evil, reason=evil), *plan.table_plans[1:])
    page = render_report(replace(plan, table_plans=tables, warnings=(evil,)), sensitivity=False)
    assert evil not in page
    packed = re.search(r'type="application/octet-stream">([^<]*)<', page)
    assert packed is not None
    data = json.loads(base64.b64decode(packed[1]))
    assert data["tables"][0][0] == evil


def test_bad_measurements_are_named(plan: planner.Plan, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"steps": 3}')
    with pytest.raises(InputError, match="no step_seconds"):
        write_report(plan, tmp_path / "r.html", measured=file)
    assert not (tmp_path / "r.html").exists()


MEASURED = Measured(
    steps=(0.011, 0.010),
    spans=tuple(
        Span(rank, phase, stream, start / 1e3, (rank + 2) / 1e3)
        for rank in (0, 1)
        for phase, stream, start in (("lookup_forward", "compute", 0), ("gradient_dist", "network", 4))
    ),
)
SWEEP = (
    BudgetPoint(64 * 10**9, 10 * 10**9, 0.003, 0.001, 0.0009),
    BudgetPoint(8 * 10**9, 7 * 10**9, 0.0035, 0.0012, 0.0009),
    BudgetPoint(10**9, reason="the tables need more"),
)


def test_a_sweep_keeps_each_budget_and_ends_where_nothing_fits() -> None:
    tables = tuple(EmbeddingTable(f"t{i}", 10**6 >> i, 64, (f"f{i}",)) for i in range(5))
    model = Model("five", tables, ())
    made = planner.compile(model, "h100-1x2", planner.Workload(global_batch=4096), time_limit=0.5)
    sweep = memory_sweep(made, model=model, points=4, time_limit=0.5)
    assert (sweep[0].used, sweep[0].step) == (max(r.total for r in made.memory), made.timeline.step)
    budgets = [point.budget for point in sweep]
    assert budgets == sorted(budgets, reverse=True)
    for point in sweep[1:]:
        if point.used is None or point.objective is None or point.lower_bound is None:
            assert point is sweep[-1]
            assert point.reason
            continue
        assert point.used <= point.budget
        assert point.objective >= max(point.lower_bound, made.certificate.lower_bound) * (1 - 1e-9)
    # the last budget is less than the weights alone
    assert sweep[-1].step is None
    with pytest.raises(InputError, match="needs tables"):
        memory_sweep(replace(made, table_plans=()), model=model)


# Runs in the page, as a person would use it, and writes what it saw where --dump-dom shows it.
USE = """
<script>
(async () => {
  const seen = {}, $ = s => document.querySelector(s), all = s => [...document.querySelectorAll(s)];
  seen.ready = document.documentElement.dataset.ready;
  seen.tables = all('#rows tr').length;
  seen.first = all('#rows tr')[0].children[0].textContent;
  $('#filter').value = NAME; $('#filter').dispatchEvent(new Event('input'));
  seen.filtered = all('#rows tr').map(r => r.children[0].textContent);
  all('#rows tr')[0].click();
  seen.detail = $('#detail h2').textContent;
  seen.blocks = all('#detail svg rect').length;
  $('#filter').value = ''; $('#filter').dispatchEvent(new Event('input'));
  all('#columns button')[1].click();
  seen.largest = all('#rows tr')[0].children[1].textContent;
  all('#columns button')[1].click();
  seen.smallest = all('#rows tr')[0].children[1].textContent;
  seen.events = all('#timeline > svg:first-of-type rect').length;
  seen.ranks = all('#memory g').length;
  seen.devices = all('.devices i').length;
  $('#phase').value = '1'; $('#phase').dispatchEvent(new Event('change'));
  seen.spans = all('#spans rect').length;
  seen.phases = all('#phases tbody tr').map(r => [...r.children].map(c => c.textContent));
  seen.fronts = all('#fronts circle').length;
  seen.links = all('#tree .link').length;
  seen.loads = all('#topology .level').map(r => [...r.children].map(c => c.textContent));
  seen.ops = all('#ops tbody tr').length;
  seen.wide = document.documentElement.scrollWidth <= innerWidth;
  seen.sections = all('details.part h3, details.part table').length;
  seen.coloured = all('.devices i').every(c => c.style.background.startsWith('rgb'));
  const box = document.createElement('pre');
  box.id = 'seen'; box.textContent = JSON.stringify(seen);
  document.body.append(box);
})();
</script>
"""


def in_browser(page: str, folder: Path) -> dict[str, Any]:
    """Load a page in headless Chromium, use it, and return what it saw; console errors fail the test."""
    file = folder / "page.html"
    file.write_text(page)
    assert CHROMIUM is not None
    run = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    errors = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert errors == []
    found = re.search(r'<pre id="seen">(.*?)</pre>', run.stdout)
    assert found is not None, "the page's script did not finish"
    seen: dict[str, Any] = json.loads(found[1].replace("&amp;", "&"))
    return seen


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_alive_in_a_browser(plan: planner.Plan, large: planner.Plan, tmp_path: Path) -> None:
    for made, name in ((plan, "C20"), (large, large.table_plans[17].name)):
        page = render_report(made, measured=MEASURED, sensitivity=False, sweep=SWEEP)
        folder = tmp_path / made.model.name.replace("/", "_")
        folder.mkdir()
        seen = in_browser(page + USE.replace("NAME", json.dumps(name)), folder)
        assert seen["ready"] == "yes"
        assert seen["tables"] == len(made.table_plans)
        slowest = max(made.table_plans, key=lambda t: sum(t.terms.values()))
        assert seen["first"] == slowest.name
        assert name in seen["filtered"]
        assert all(name.lower() in found.lower() for found in seen["filtered"])
        assert seen["detail"] == seen["filtered"][0]
        assert seen["blocks"] >= 1
        assert seen["largest"] != seen["smallest"]
        assert seen["events"] == sum(e.duration > 0 for e in made.timeline.events)
        assert seen["devices"] == made.world_size
        assert seen["coloured"]
        assert seen["links"] == made.topology.hosts
        assert [row[0] for row in seen["loads"]] == ["host: nvlink4", "cluster: ib-ndr-400"]
        assert all(row[5] != "nothing" for row in seen["loads"])
        assert seen["ops"] == len(made.timeline.events)
        assert seen["wide"]  # nothing makes the page scroll sideways
        assert seen["spans"] == len(MEASURED.spans)
        assert seen["fronts"] == len(SWEEP) - 1  # nothing fits the last budget
        row = next(row for row in seen["phases"] if row[0] == "gradient_dist")
        assert row[2:4] == ["3 ms", "2 ms"]  # the slowest and the fastest rank


# Opens every section and looks for what is drawn only where the plan has it.
LOOK = """
<script>
(async () => {
  const all = s => [...document.querySelectorAll(s)], seen = {};
  all('details').forEach(d => { d.open = true; });
  seen.ready = document.documentElement.dataset.ready;
  seen.sections = all('details.part[id]').map(d => d.id.replace('section-', ''));
  seen.empty = all('details.part[id]').filter(d => !d.querySelector('table')).map(d => d.id);
  seen.titles = all('h2').map(h => h.textContent);
  seen.cards = all('.head dt').map(d => d.textContent);
  seen.links = all('#tree .link').length;
  seen.loads = all('#topology .level').map(r => r.children[5].textContent);
  seen.tiers = all('#tiers tr').length;
  seen.notes = all('#detail .note').length;
  seen.wide = document.documentElement.scrollWidth <= innerWidth;
  const box = document.createElement('pre');
  box.id = 'seen'; box.textContent = JSON.stringify(seen);
  document.body.append(box);
})();
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("kind", ["all", "llm", "serving"])
def test_every_kind_of_plan_is_drawn_with_all_its_sections(kind: str, tmp_path: Path) -> None:
    made = planner.Plan.load(Path(__file__).parent / "data" / "fuzz" / f"plan-{kind}.json")
    seen = in_browser(render_report(made, sensitivity=False) + LOOK, tmp_path)
    assert seen["ready"] == "yes"
    assert seen["sections"] == list(made.decisions.present())
    assert seen["empty"] == []
    assert seen["wide"]
    assert len(seen["loads"]) == sum(level.fanout > 1 for level in made.topology.levels[1:]) + 1
    assert (seen["tiers"] > 0) == (made.decisions.tiers is not None)
    if kind == "all":
        assert seen["notes"] >= 2  # of the table that is shown first: its format, besides the runner-up
        assert any(load != "nothing" for load in seen["loads"])
        assert seen["links"] == made.topology.hosts
        assert "Tables" in seen["titles"]
    else:
        assert "layout" in seen["cards"]
        assert "Tables" not in seen["titles"]
    if kind == "serving":
        assert "throughput" not in seen["cards"]  # samples a second mean nothing to it
        assert "Modelled prompt, to its first token" in seen["titles"]


def test_command_line_with_a_measured_run(plan: planner.Plan, tmp_path: Path) -> None:
    file, run_file, out = tmp_path / "plan.json", tmp_path / "run.json", tmp_path / "r.html"
    plan.save(file)
    run_file.write_text(json.dumps({"step_seconds": [0.01, 0.012, 0.011]}))
    run = CliRunner().invoke(
        cli, ["report", str(file), "-o", str(out), "--measured", str(run_file), "--no-sensitivity", "--json"]
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["bytes"] == out.stat().st_size
    packed = re.search(r'type="application/octet-stream">([^<]*)<', out.read_text())
    assert packed is not None
    assert json.loads(base64.b64decode(packed[1]))["measured"]["median"] == 0.011
