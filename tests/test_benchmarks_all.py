"""``make bench``: a failing or hanging benchmark does not stop the rest, and a second run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import all as bench

GOOD = """import json, pathlib, sys  # takes "--quick"
seen = pathlib.Path(__file__).with_suffix(".runs")
seen.write_text(seen.read_text() + "x" if seen.exists() else "x")
claim = {"id": "c", "value": 0.5, "target": 1.0, "sense": "<=", "ok": True}
print(json.dumps({"benchmark": "good", "claims": [claim], "rows": [], "notes": ["quick" if "--quick" in sys.argv else ""]}))
"""
BAD = 'import sys  # takes "--quick"\nsys.exit("no such table set")\n'
# A child of the benchmark that would live on if only the benchmark itself were stopped.
HANGS = """import pathlib, subprocess, sys, time  # takes "--quick"
pathlib.Path(__file__).with_suffix(".pid").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {
        "a_bad": BAD,
        "b_hangs": HANGS,
        "c_good": GOOD,
        "part": "x = 1\n",
        "_own": GOOD,
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_failures_are_reported_and_the_rest_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK_SECONDS", 2.0)
    names = bench.commands(folder)
    assert names == ["a_bad", "b_hangs", "c_good"]
    runner = bench.Runner(folder, folder / "results", quick=True)
    said: list[str] = []
    found = bench.run_all(runner, names, resume=False, minutes=1.0, say=said.append)
    assert "no such table set" in found["a_bad"]["failure"]
    assert "stopped after" in found["b_hangs"]["failure"]
    child = Path("/proc") / (folder / "b_hangs.pid").read_text() / "cmdline"
    assert not child.exists() or child.read_bytes() == b""  # gone, or dead and not yet collected
    assert found["c_good"]["notes"] == ["quick"]
    assert json.loads((folder / "results" / "c_good.json").read_text())["claims"][0]["ok"]
    page = "\n".join(bench.section(name, result, True) for name, result in found.items())
    assert (
        page.index("no such table set")
        < page.index("stopped after")
        < page.index("| c | 0.5 | <= 1.0 | yes |")
    )
    assert len(said) == 3

    again = bench.run_all(runner, ["a_bad", "c_good"], resume=True, minutes=1.0, say=said.append)
    assert "no such table set" in again["a_bad"]["failure"]
    assert again["c_good"]["claims"] == found["c_good"]["claims"]
    assert (folder / "c_good.runs").read_text() == "x"  # not run again
    over = bench.run_all(runner, ["c_good"], resume=False, minutes=0.0, say=said.append)
    assert "not run" in over["c_good"]["failure"]


def test_every_benchmark_is_listed_once_and_the_dearest_comes_last() -> None:
    names = bench.commands()
    assert len(set(names)) == len(names)
    assert names[-1] == "vs_torchrec"
    assert sorted(bench.commands(quick=True)) == sorted(names)
    assert "mlperf_replay" not in names  # a part of fidelity, not a benchmark
