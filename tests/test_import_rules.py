"""The rooms' import direction, and what must stay unimported when a plan is only read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "ir": {"ir"},
    "cost_models": {"ir", "cost_models"},
    "passes": {"ir", "cost_models", "passes"},
    "codegen": {"ir", "codegen"},
    "planner": {"ir", "cost_models", "passes", "codegen", "planner"},
}


def project_imports(path: Path) -> set[str]:
    """Top-level project packages that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        found |= {name.split(".")[0] for name in names}
    return found & set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_each_room_imports_only_what_lies_below_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        above = project_imports(path) - ALLOWED[room]
        assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}"


def test_the_scanner_sees_a_planted_reverse_import(tmp_path: Path) -> None:
    planted = tmp_path / "bad.py"
    planted.write_text("def f():\n    from passes.sharding import Sharding\n")
    assert project_imports(planted) == {"passes"}


def loaded_modules(code: str) -> set[str]:
    """Which heavy modules a fresh interpreter holds after running ``code``."""
    probe = f"{code}\nimport sys; print(' '.join(m for m in ('torch', 'ortools', 'torchrec') if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import planner; planner.Plan; planner.Topology; planner.Workload",
        "import planner.cli, planner.explain, planner.diff, planner.verification, planner.render",
        "import planner; planner.topology('h100-16x8')",
        "import cost_models.embedding, cost_models.memory, cost_models.step, cost_models.placed",
    ],
)
def test_reading_a_plan_imports_neither_torch_nor_ortools(code: str) -> None:
    assert loaded_modules(code) == set()


def test_the_probe_notices_torch() -> None:
    assert "torch" in loaded_modules("import torch")


def test_every_public_name_resolves() -> None:
    import planner

    for name in planner.__all__:
        assert getattr(planner, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = planner.nonsense
