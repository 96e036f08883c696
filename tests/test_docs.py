"""The documentation: links and names exist, its example runs and is right, and the site builds without a warning."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import planner
from examples.checkpoint_interval import CheckpointInterval, best_interval, overhead
from ir.constraints import Constraints
from ir.errors import InputError
from ir.plan import Plan
from passes.pipeline import PIPELINE, pipeline
from planner.cli import cli
from planner.models import resolve
from planner.verification import verify

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SYSTEMS = tuple(sorted((DOCS / "systems").glob("*.md")))
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")), *SYSTEMS)
ROOMS = "ir|cost_models|passes|codegen|planner"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def code(page: Path) -> Iterator[str]:
    """Fenced blocks, a line at a time with continuations joined, and code spans."""
    text = page.read_text()
    for block in re.findall(r"^```.*?\n(.*?)^```", text, flags=re.S | re.M):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


@pages
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    relative = [link for link in links if not link.startswith(("http:", "https:", "#"))]
    assert [link for link in relative if not (page.parent / link.split("#")[0]).exists()] == []


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    wrong = []
    for text in code(page):
        found = re.match(r"(?:\$ )?planner ([a-z]+)\b([^#|&]*)", text)
        if found is None:
            continue
        command = cli.commands.get(found[1])
        known = {name for option in command.params for name in option.opts} if command else set()
        known |= {"-h", "--help"}
        options = re.findall(r"(?<!\S)--?[a-z][a-z-]*", found[2])
        if command is None or not known.issuperset(options):
            wrong.append(text)
    assert wrong == []


@pages
def test_named_files_exist(page: Path) -> None:
    """Paths, and modules that are run or imported, are in the tree."""
    missing = []
    for text in code(page):
        for path in re.findall(
            rf"(?<![\w./])(?:{ROOMS}|benchmarks|tests|examples|docs)/[\w/]+\.[a-z]+\b", text
        ):
            missing += [] if (ROOT / path).exists() or path.endswith(".svg") else [path]
        for module in re.findall(r"python -m ((?:benchmarks|planner)[\w.]*)", text):
            place = ROOT / module.replace(".", "/")
            missing += [] if place.is_dir() or place.with_suffix(".py").exists() else [module]
    assert missing == []


@pages
def test_imported_names_exist(page: Path) -> None:
    missing = []
    for text in code(page):
        found = re.match(rf"from ((?:{ROOMS}|benchmarks)[\w.]*) import ([\w, ]+)", text)
        for name in re.findall(r"\w+", found[2]) if found else ():
            if name not in names_of(found[1]):
                missing.append(f"{found[1]}.{name}")
    assert missing == []


def names_of(module: str) -> set[str]:
    """What a module defines or imports at its top level, without running it."""
    place = ROOT / module.replace(".", "/")
    package = place / "__init__.py"
    tree = ast.parse((package if package.exists() else place.with_suffix(".py")).read_text())
    found = {path.stem for path in place.glob("*")} if place.is_dir() else set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


def records_of(kind: Any, found: dict[str, type] | None = None) -> dict[str, type]:
    """The records that a plan file is made of, by name."""
    found = {} if found is None else found
    for argument in typing.get_args(kind):
        records_of(argument, found)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__name__ not in found:
        found[kind.__name__] = kind
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            records_of(hints[field.name], found)
    return found


@pytest.mark.parametrize("record", records_of(Plan).values())
def test_the_schema_page_lists_every_field(record: type) -> None:
    page = (DOCS / "plan_schema.md").read_text()
    table = re.search(rf"^\| field of `{record.__name__}` .*?\n\n", page, flags=re.S | re.M)
    assert table is not None
    rows = re.findall(r"^\| `(\w+)` \|", table[0], flags=re.M)
    assert sorted(rows) == sorted(field.name for field in dataclasses.fields(record))
    assert re.findall(r"^\| `\w+` \| +\|$", table[0], flags=re.M) == []  # every one of them with words


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")
    listed = re.findall(r"^systems/(\w+)$", (DOCS / "systems.md").read_text(), flags=re.M)
    assert sorted(listed) == [page.stem for page in SYSTEMS]
    assert len(listed) == 14


@pages
def test_constraints_that_are_shown_can_be_read(page: Path) -> None:
    for block in re.findall(r"^```yaml\n# constraints.yaml\n(.*?)^```", page.read_text(), flags=re.S | re.M):
        Constraints.from_dict(yaml.safe_load(block))


def test_no_other_checkpoint_interval_is_cheaper() -> None:
    for save, mtbf in ((20.0, 1e6), (1.0, 3600.0), (300.0, 86_400.0)):
        chosen = best_interval(save, mtbf)
        least = min(overhead(seconds, save, mtbf) for seconds in np.geomspace(save, mtbf, 2000))
        assert overhead(chosen, save, mtbf) == pytest.approx(least, rel=1e-4)
        assert overhead(chosen, save, mtbf) <= least


def test_a_simulation_of_failures_loses_what_the_cost_model_says() -> None:
    """Exponential failures while a job saves and works in turn: what is not saved is done again."""
    save, mtbf = 20.0, 50_000.0
    interval = best_interval(save, mtbf)
    life = np.random.default_rng(0).exponential(mtbf, 200_000)
    kept = np.floor(life / (interval + save)) * interval  # work that a life leaves behind
    lost = life.sum() / kept.sum() - 1
    assert lost == pytest.approx(overhead(interval, save, mtbf), rel=0.05)


def test_the_example_pass_gives_a_plan_that_verifies() -> None:
    work = dataclasses.replace(resolve("dlrm-small").workload or planner.Workload(), optimizer="adagrad")
    plan = planner.compile(
        "dlrm-small", "local-2", work, passes=(*pipeline(), CheckpointInterval(bandwidth=1e6))
    )
    assert [finding.check for finding in verify(plan) if not finding.ok] == []
    assert plan.timeline.events[-1].name == "checkpoint"
    # fp32 weights, Adagrad's state beside a table's and Adam's two beside the others
    cells = [
        sum(shard.rows * shard.cols for t in plan.table_plans for shard in t.on_rank(rank)) for rank in (0, 1)
    ]
    state = 8 * max(cells) + 12 * plan.model.dense_params
    mtbf = 16_384 * 54 * 24 * 3600 / 419 / 2
    said = next(a for a in plan.assumptions if a.name == "checkpoint_every")
    assert float(said.value.removesuffix(" s")) == pytest.approx(math.sqrt(2 * state / 1e6 * mtbf), rel=1e-3)


def test_the_example_pass_says_what_must_come_before_it() -> None:
    table = ROOT / "planner/data/tables/criteo_kaggle.json"
    with pytest.raises(InputError, match="put it after"):
        planner.compile(str(table), "h100-1x2", passes=(CheckpointInterval(bandwidth=1e9), *PIPELINE))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")),
    reason="sphinx, myst-parser or furo is not installed: pip install -e '.[docs]'",
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        str(tmp_path / "trees"),
    ]
    done = subprocess.run(
        [*command, str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        assert (tmp_path / "html" / page.relative_to(DOCS).with_suffix(".html")).exists()
    assert (tmp_path / "html/schemas/plan.json").exists()
