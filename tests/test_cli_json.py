"""Every command answers in JSON that keeps its published schema; completion and progress on a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from rich.console import Console

import planner
from codegen.runtime.compare import Difference, RunResult
from codegen.runtime.spans import Span
from cost_models.calibration import default_calibration
from ir.reading import dump_record
from planner.cli import cli
from planner.cli_progress import search_progress
from planner.schema import RECORDS, json_schema, names
from planner.schema_outputs import OUTPUTS

ROWS = (50_000, 20_000, 3, 900)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A table list, two plans of it, and a trained model."""
    folder = tmp_path_factory.mktemp("json")
    tables = folder / "tables.json"
    entries = [{"name": f"t{i}", "rows": n, "dim": 32, "pooling_factor": i + 1} for i, n in enumerate(ROWS)]
    tables.write_text(json.dumps({"name": "four", "tables": entries}))
    planner.compile(str(tables), "h100-1x4", time_limit=0.5).save(folder / "plan.json")
    planner.compile(str(tables), "h100-1x2", time_limit=0.5).save(folder / "other.json")
    planner.compile("llama-tiny", "local-4").save(folder / "llama.json")
    (folder / "net.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Linear(64, 8)\n")
    named = {path.stem: str(path) for path in folder.iterdir()}
    return {**named, "out": str(folder / "out"), "net": f"{named['net']}:make"}


RUNS = [
    ("compile", "{tables} -t h100-1x2 --time-limit 0.5"),
    ("explain", "{plan}"),
    ("explain", "{llama}"),
    ("explain", "{plan} t0"),
    ("explain", "{plan} --rank 1"),
    ("explain", "{plan} t0 --why-not row_wise --time-limit 0.5"),
    ("explain", "{plan} t0 --why-not host=0"),
    ("diff", "{plan} {other}"),
    ("diff", "{plan} {plan}"),
    ("verify", "{plan}"),
    ("emit", "{llama} --target accelerate"),
    ("emit", "{llama} --target accelerate -o {out}.yaml"),
    ("report", "{plan} -o {out}.html --no-sensitivity"),
    ("trace", "{plan} -o {out}.trace.json"),
    ("whatif", "{plan}"),
    ("whatif", "{plan} --set host_size=2"),
    ("replan", "{plan} -t h100-1x2 --lost 2,3"),
    ("models", ""),
    ("topologies", ""),
    ("topologies", "h100-1x8"),
    ("formats", "mx6"),
    ("scale", "wukong -t h100-1x8 --budget-gflop 0.6 --tables {tables} --time-limit 0.2"),
    ("sensitivity", "{net} --format int8"),
    ("schema", "diff"),
    ("completion", "zsh"),
]


@pytest.mark.parametrize(("command", "arguments"), RUNS, ids=lambda part: part.replace("/", "_")[:40])
def test_answers_keep_their_schemas(command: str, arguments: str, files: dict[str, str]) -> None:
    line = [part.format(**files) for part in arguments.split()]
    run = CliRunner().invoke(cli, [command, *line, "--json"])
    assert run.exit_code == 0, run.output
    jsonschema.validate(json.loads(run.stdout), json_schema(command), jsonschema.Draft202012Validator)


def test_every_command_has_json_and_a_schema_and_is_tried() -> None:
    elsewhere = {"run", "calibrate", "doctor"}  # below, and where they are tested
    assert {command for command, _ in RUNS} | elsewhere == set(cli.commands)
    assert set(OUTPUTS) == {*cli.commands, "error"}
    for name, command in cli.commands.items():
        assert any("--json" in option.opts for option in command.params), name
    for name in names():
        jsonschema.Draft202012Validator.check_schema(json_schema(name))
    assert CliRunner().invoke(cli, ["schema"]).output.split() == [*RECORDS, *OUTPUTS]


def test_answers_of_runs_and_calibrations() -> None:
    """Records as the commands print them; that the commands do is tested with real processes elsewhere."""
    same = Difference(0.0, 0.0, "")
    given: dict[str, Any] = dict.fromkeys(RunResult.__dataclass_fields__, 1)
    given |= dict.fromkeys(("outputs", "losses", "weights", "updates"), same)
    given |= {"optimizer": "sgd", "dense_optimizer": "sgd", "notes": ("a",), "peak_rss": (1, 2)}
    given |= {"form": "composed", "lossy": "vectors travel in eb_lz"}
    given |= dict.fromkeys(("sharded_losses", "unsharded_losses"), (0.5,))
    given |= dict.fromkeys(("step_seconds", "unsharded_step_seconds"), (0.1, 0.2))
    result = RunResult(**given | {"spans": (Span(0, "all_reduce", "network", 0.0, 1.0),)})
    shown = json.loads(json.dumps(result.to_dict() | {"predicted_step": 0.1}))
    jsonschema.validate(shown, json_schema("run"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**shown, "surprise": 1}, json_schema("run"))
    machine = planner.topology("h100-1x8")
    made = {"topology": machine.to_dict(), "calibration": dump_record(default_calibration(machine))}
    jsonschema.validate(json.loads(json.dumps(made)), json_schema("calibrate"))


@pytest.mark.parametrize(
    "line",
    ["verify missing.json", "compile {tables} -t h1000-1x8", "explain {plan} t9 --why-not row_wise"],
)
def test_errors_keep_their_schema(line: str, files: dict[str, str]) -> None:
    run = CliRunner().invoke(cli, [*(part.format(**files) for part in line.split()), "--json"])
    assert run.exit_code == 2
    jsonschema.validate(json.loads(run.stdout), json_schema("error"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torchrec", "choose --target torchtitan, megatron or accelerate"),
        ("torchao", "is a decoder; choose --target"),
        ("vllm", "takes a decoder's serving plan"),
    ],
)
def test_a_target_of_another_kind_of_plan_is_named(target: str, message: str, files: dict[str, str]) -> None:
    run = CliRunner().invoke(cli, ["emit", files["llama"], "--target", target])
    assert run.exit_code == 2
    assert message in run.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("planner comp", {"plain,compile", "plain,completion"}),
        ("planner compile dlrm-dcn", {"plain,dlrm-dcnv2", "plain,dlrm-dcnv2-small"}),
        ("planner explain {plan} t", {f"plain,t{i}" for i in range(len(ROWS))}),
        ("planner explain {plan} t0 --why-not row", {"plain,row_wise"}),
        ("planner schema whati", {"plain,whatif"}),
    ],
)
def test_completion_knows_names(words: str, expected: set[str], files: dict[str, str]) -> None:
    line = words.format(**files)
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    run = CliRunner().invoke(
        cli, [], prog_name="planner", env={**environment, "_PLANNER_COMPLETE": "bash_complete"}
    )
    assert set(run.output.split()) == expected


def test_the_bash_script_loads_and_offers_commands() -> None:
    script = CliRunner().invoke(cli, ["completion", "bash"]).output
    ask = (
        f'{script}\nplanner() {{ {sys.executable} -m planner "$@"; }}\nexport -f planner\ncomplete -p planner'
    )
    run = subprocess.run(
        ["bash", "-c", ask], capture_output=True, text=True, env=dict(os.environ), check=True, timeout=60
    )
    assert "_planner_completion planner" in run.stdout


def test_progress_on_a_terminal_only() -> None:
    model = planner.Workload()
    for terminal, hidden in ((True, False), (True, True), (False, False)):
        screen = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        with search_progress(hidden=hidden, console=screen) as observers:
            planner.compile(
                "dlrm-small", "local-2", replace(model, global_batch=64), observers=observers, time_limit=0.2
            )
        said = screen.file.getvalue()  # type: ignore[attr-defined]
        shown = terminal and not hidden
        assert ("incumbent" in said and "bound" in said and "gap" in said) == shown
        assert bool(observers) == shown


def test_notebooks_show_plans_and_machines(files: dict[str, str]) -> None:
    machine = replace(planner.topology("h100-2x8"), name="<b>two</b>")
    shown = machine._repr_html_()
    for word in ("&lt;b&gt;two&lt;/b&gt;: 2 x 8", "<td>hbm</td>", "450 GB/s"):
        assert word in shown
    assert "tables on h100-1x4" in planner.Plan.load(files["plan"])._repr_html_()  # type: ignore[attr-defined]
