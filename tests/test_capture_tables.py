"""Models given as table lists: every shipped set reads, and mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ir.errors import InputError
from ir.tables import capture_tables, load_tables
from ir.verifier import model_faults

DATA = Path(__file__).parent.parent / "planner" / "data" / "tables"


def sets(file: Path) -> list[str]:
    data = json.loads(file.read_text())
    named = [name for key in ("models", "variants", "datasets") for name in data.get(key) or {}]
    return [f"{file}#{name}" for name in named] or [str(file)]


# sets whose source states no dim, no pooling factor, or neither
PARTIAL = {"kdd12": "table 'query' has no dim", "meta_dlrm_datasets_856": "table 't0' has no pooling factor"}


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(s, id=s.rpartition("/")[2])
        for f in sorted(DATA.glob("*.json"))
        if f.stem not in PARTIAL
        for s in sets(f)
    ],
)
def test_every_shipped_set_reads(source: str) -> None:
    path, _, name = source.partition("#")
    data = json.loads(Path(path).read_text())
    part: Any = next(
        (data[key][name] for key in ("models", "variants", "datasets") if name in data.get(key, ())), data
    )
    entries = part if isinstance(part, list) else part.get("tables") or part["features"]
    model, workload = load_tables(source)
    own = [entry for entry in entries if not entry.get("shares")]
    assert [(t.name, t.rows) for t in model.tables] == [(entry["name"], entry["rows"]) for entry in own]
    stated = sum(entry.get("pooling_factor", 1) for entry in entries)
    assert sum(stats.pooling_factor for stats in workload.features.values()) == pytest.approx(stated)
    assert {feature for t in model.tables for feature in t.features} == set(workload.features)
    assert not list(model_faults(model))


@pytest.mark.parametrize("name", PARTIAL)
def test_sets_that_lack_something_say_what(name: str) -> None:
    with pytest.raises(InputError, match=PARTIAL[name]):
        load_tables(DATA / f"{name}.json")


def test_shared_tables_and_several_features() -> None:
    model, workload = capture_tables(
        [
            {"name": "item", "rows": 10, "dim": 4, "features": [1, 30]},
            {"name": "user", "rows": 5, "dim": 4, "features": ["me", "friend"], "pooling_factor": 2},
            {"name": "history", "rows": 10, "pooling_factor": 50, "shares": "item"},
        ],
        "net",
    )
    assert [t.features for t in model.tables] == [("item_0", "item_1", "history"), ("me", "friend")]
    assert {key: stats.pooling_factor for key, stats in workload.features.items()} == {
        "item_0": 1,
        "item_1": 30,
        "me": 2,
        "friend": 2,
        "history": 50,
    }
    ids, lookup = model.ops
    assert ids.out_shape == (1, 5)
    assert lookup.out_shape == (1, 5 * 4)
    assert lookup.activation_bytes == 5 * 4 * 4
    assert lookup.tables == ("item", "user")


GOOD = {"name": "a", "rows": 3, "dim": 4}


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ([], "is empty"),
        ([GOOD, GOOD], "table 'a' appears twice"),
        ([{**GOOD, "rows": 0}], r"table 0 \('a'\): rows: Input should be greater than or equal to 1"),
        ([{**GOOD, "dim": 0}], "dim: Input should be greater"),
        ([{**GOOD, "rows": float("nan")}], "rows: Input should be a finite number"),
        ([{**GOOD, "pooling_factor": float("nan")}], "pooling_factor: Input should be a finite number"),
        ([{**GOOD, "pooling_factor": None}], "table 'a' has no pooling factor"),
        ([{**GOOD, "dim": None}], "table 'a' has no dim"),
        ([{**GOOD, "hotness": 3}], "hotness: unknown key"),
        ([{"rows": 3}], "table 0: name: missing"),
        ([3], "net, table 0"),
        ([{**GOOD, "shares": "b"}], "table 'a' shares 'b', which is not a table"),
        ([GOOD, {"name": "b", "rows": 4, "shares": "a"}], "has 4 rows but shares 'a', which has 3"),
        (
            [{**GOOD, "features": ["x"]}, {**GOOD, "name": "b", "features": ["x"]}],
            "feature 'x' appears twice",
        ),
    ],
)
def test_mistakes_are_named(tables: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        capture_tables(tables, "net")


@pytest.mark.parametrize(
    ("text", "chosen", "says"),
    [
        ("{", "", "is not JSON"),
        ("3", "", "must be a mapping"),
        ("{}", "", 'give it a list "tables"'),
        ('{"tables": 3}', "", 'holds no list "tables"'),
        ('{"models": {"one": {"tables": []}}}', "", "choose one of its sets, as .*#one"),
        ('{"models": {"one": {"tables": []}}}', "#on", r"no set 'on' \(did you mean 'one'\?\); it has one"),
        ('{"models": {"one": {"tables": []}}}', "#one", "is empty"),
        ('{"tables": []}', "#one", "has no set 'one'; it has none"),
    ],
)
def test_files_that_hold_no_list(tmp_path: Path, text: str, chosen: str, says: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(text)
    with pytest.raises(InputError, match=says):
        load_tables(f"{file}{chosen}")
