"""Readers under damaged and hostile input: one planned error in one short message, no hang, no unbounded memory.

``FUZZ=20000`` runs so many cases a reader instead of some dozens.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import planner
from codegen.checkpoint import read_latest
from codegen.chrome_trace import measured_events
from codegen.runtime.tiered.commit import read_manifest
from codegen.runtime.tiered.table import Shape
from cost_models.calibration import default_calibration
from ir.constraints import Constraints
from ir.errors import PlannerError
from ir.growth import GrowthRequest, schedule
from ir.plan import Plan
from ir.reading import dump_record, loads_json, parse_record, read_json
from ir.sessions import SessionGroup, SessionStats
from ir.tables import load_tables
from ir.workload import FeatureStats, Workload
from planner.api import load_yaml
from planner.calibrate import load_calibration
from planner.diff import diff_plans
from planner.diff_render import render_diff
from planner.explain import explain_plan, explain_rank, explain_table
from planner.render import summary, to_text
from planner.report import render_report
from planner.report_measured import read_measured
from planner.verification import verify

CASES = int(os.environ.get("FUZZ", "60"))
SEEDS = Path(__file__).parent / "data" / "fuzz"
DEADLINE = 20.0  # seconds a document; far above what the slowest takes on a busy machine
FUZZ = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**62, 2**63 - 1, -(2**63), 2**63, 10**400, 0.5, -0.0, 5e-324),
    *(
        1.7976931348623157e308,
        float("inf"),
        float("-inf"),
        float("nan"),
        "",
        "x",
        "80 GiB",
        "1e999 GB",
        "\x00",
    ),
    *("\ud800", "\u202e\U0001f4a9" * 20, "a" * 5000, "../../etc/passwd", "-1", "[", "*" * 3000, [], {}, [[]]),
    *([1, 2], {"x": 1}, {"": {}}, [None], ["a"] * 50),
)


@contextmanager
def deadline(seconds: float = DEADLINE) -> Iterator[None]:
    """Fail when the body takes longer: a reader that hangs is a fault."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"a reader took longer than {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def refuses_or_reads(read: Callable[[], Any]) -> None:
    """The reader returns, or raises a planned error that is one short message."""
    said = ""
    with deadline():
        try:
            read()
        except PlannerError as error:
            said = str(error)
    assert len(said) < 4000
    assert "Traceback" not in said


def places(data: Any, trail: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to every value inside ``data``."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*trail, key)
        yield from places(value, (*trail, key))


def mutate(data: Any, seed: int) -> Any:
    """``data`` with one to three changes of its structure or its values."""
    dice = random.Random(seed)
    made = copy.deepcopy(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        trails = list(places(made))
        if not trails:
            return dice.choice(VALUES)
        # by depth first, so that the few keys at the top are changed as often as the many at the bottom
        depth = dice.choice(sorted({len(trail) for trail in trails}))
        *above, key = dice.choice([trail for trail in trails if len(trail) == depth])
        parent = made
        for step in above:
            parent = parent[step]
        change(parent, key, made, dice)
    return made


def change(parent: Any, key: Any, whole: Any, dice: random.Random) -> None:
    """One change at ``parent[key]``."""
    value = parent[key]
    match dice.randrange(7):
        case 0:
            del parent[key]
        case 1 | 2:
            parent[key] = copy.deepcopy(dice.choice(VALUES))
        case 3 if isinstance(value, (int, float)) and not isinstance(value, bool):
            real = float(value) if abs(value) < 1e300 else value  # an earlier change may have made it huge
            parent[key] = dice.choice((-value, value + 1, value - 1, value * 1000, 10**18, real, str(value)))
        case 3 | 4 if isinstance(parent, list):
            parent.insert(dice.randrange(len(parent) + 1), copy.deepcopy(value))
        case 5:
            parent[key] = [copy.deepcopy(value)]
        case 6 if isinstance(parent, dict):
            parent[dice.choice(("extra", "", "name", "\ud800", "a" * 3000))] = copy.deepcopy(value)
        case _:
            *above, other = dice.choice(list(places(whole)))
            for step in above:
                whole = whole[step]
            parent[key] = copy.deepcopy(whole[other])


def damage(text: str, seed: int) -> bytes:
    """Bytes of ``text`` cut, repeated or overwritten."""
    dice = random.Random(seed)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(dice.choice((1, 2, 8))):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(4):
            case 0:
                del data[at:]
            case 1:
                data[at : at + dice.randrange(1, 30)] = bytes(dice.randrange(256) for _ in range(3))
            case 2:
                data[at:at] = dice.choice(
                    (b"[" * 200, b'{"a":' * 200, b"\xff\xfe", b"9" * 5000, b'"', b",", b"\n\t")
                )
            case 3:
                data[at:at] = data[at // 2 : at]
    return bytes(data)


PLANS = {path.stem: json.loads(path.read_text()) for path in sorted(SEEDS.glob("plan-*.json"))}


def use_plan(plan: Plan, other: Plan) -> None:
    """What the command line does with a plan that it could read."""
    verify(plan)
    to_text(summary(plan))
    to_text(explain_plan(plan))
    to_text(explain_rank(plan, plan.world_size - 1))
    for table in plan.table_plans[:2]:
        to_text(explain_table(plan, table.name))
    to_text(render_diff(diff_plans(other, plan)))
    render_report(plan, sensitivity=False)


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_the_corpus_are_sound(name: str) -> None:
    plan = Plan.from_dict(PLANS[name])
    assert [finding for finding in verify(plan) if not finding.ok] == []
    use_plan(plan, plan)


@pytest.mark.parametrize("name", PLANS)
@FUZZ
@given(seed=st.integers(0, 2**32))
def test_plans(name: str, seed: int) -> None:
    data = mutate({key: value for key, value in PLANS[name].items() if key != "digest"}, seed)

    def read() -> None:
        plan = Plan.from_dict(loads_json(json.dumps(data), "plan"))
        use_plan(plan, Plan.from_dict(PLANS[name]))

    refuses_or_reads(read)


def constraints() -> dict[str, Any]:
    """Every request of the constraints, as the corpus of plans asked them."""
    asked = PLANS["plan-all"]["constraints"]
    rules = {"t*": {"sharding_types": ["row_wise", "table_wise"], "min_column_width": 8, "ranks": [0, 1]}}
    return {**asked, "tables": rules, "memory_limit": 2**33}


STATS = FeatureStats(3.5, (0.0, 0.1, 1.0), 0.5)
WORKLOAD = Workload(4096, {"a": STATS}, sessions=SessionStats(8.0, (SessionGroup(("a",), 0.9),)))
TABLES = {
    "dim": 16,
    "tables": [
        {"name": "a", "rows": 100, "dim": 64, "pooling_factor": 3},
        {"name": "b", "rows": 100, "features": [1.0, 2.5], "dtype": "fp16"},
        {"name": "c", "rows": 100, "features": ["x", "y"], "pooling": "mean"},
        {"name": "d", "rows": 100, "shares": "a", "pooling_factor": None, "features": [2.0]},
    ],
    "models": {
        "small": {"tables": [{"name": "a", "rows": 5, "dim": 4}]},
        "flat": [{"name": "a", "rows": 5, "dim": 4}],
    },
}
SHAPE = {
    **{"format": 1, "rows": 300, "dim": 8, "optimizer": "adagrad", "ordered": True},
    "ranges": [
        {"kind": "ram", "rows": 100, "page_bytes": 4096},
        {"kind": "block", "rows": 200, "page_bytes": 512},
    ],
}
TRACE = {"traceEvents": [{"ph": "X", "name": "a", "ts": 1.5, "dur": 2, "tid": 7}, {"ph": "M"}]}
RUN = {"step_seconds": [0.1, 0.2], "losses": [0.5], "world_size": 2}
LATEST = {"step": 12, "folder": "step-000000012", "model": "sha256:0", "plan": "sha256:1"}
GROWTH = {"steps": 1000, "sparsity": 0.5, "cycles": 3, "warmup": 0.1, "final": 0.2, "exclude": ["top.*"]}


def _manifest(path: Path) -> None:
    folder = path.parent / "table"
    folder.mkdir(exist_ok=True)
    (folder / "table.json").write_bytes(path.read_bytes())
    parse_record(Shape, read_manifest(folder), "manifest")


def _latest(path: Path) -> None:
    (path.parent / "latest").write_bytes(path.read_bytes())
    read_latest(path.parent)


def _as_file(record: Callable[[object, str], Any]) -> Callable[[Path], Any]:
    return lambda path: record(read_json(path, "file"), "file")


READERS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "topology.yaml": (planner.topology("h100-cxl-2x2").to_dict(), lambda path: planner.topology(path)),
    "constraints.yaml": (None, lambda path: Constraints.from_dict(load_yaml(path, "file"), "file")),
    "calibration.yaml": (
        {"calibration": dump_record(default_calibration(planner.topology("local-2")))},
        load_calibration,
    ),
    "workload.json": (WORKLOAD.to_dict(), _as_file(Workload.from_dict)),
    "tables.json": (
        TABLES,
        lambda path: [load_tables(path), load_tables(f"{path}#small"), load_tables(f"{path}#flat")],
    ),
    "trace.json": (TRACE, lambda path: json.dumps(measured_events([path]), allow_nan=False)),
    "run.json": (RUN, lambda path: json.dumps(dump_record(read_measured(path)), allow_nan=False)),
    "manifest.json": (SHAPE, _manifest),
    "latest.json": (LATEST, _latest),
    "growth.json": (GROWTH, _as_file(lambda data, what: schedule(parse_record(GrowthRequest, data, what)))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", READERS)
@FUZZ
@given(seed=st.integers(0, 2**32), raw=st.booleans())
def test_files(name: str, seed: int, raw: bool, folder: Path) -> None:
    document, read = READERS[name]
    document = constraints() if document is None else document
    path = folder / name
    dump = yaml.safe_dump if name.endswith("yaml") else json.dumps
    text = dump(document) if raw else dump(mutate(document, seed))
    path.write_bytes(damage(text, seed) if raw else text.encode("utf-8", "surrogatepass"))
    refuses_or_reads(lambda: read(path))


@pytest.mark.parametrize("name", READERS)
def test_the_documents_are_read_as_they_are(name: str, folder: Path) -> None:
    document, read = READERS[name]
    path = folder / name
    path.write_text((yaml.safe_dump if name.endswith("yaml") else json.dumps)(document or constraints()))
    read(path)
