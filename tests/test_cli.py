"""The command line: what is printed, and the exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import planner
from planner.__main__ import main as start
from planner.cli import cli, main


def run(*arguments: str) -> Result:
    """One command in this process."""
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table list of eight tables."""
    file = tmp_path_factory.mktemp("tables") / "tables.json"
    rows = [50_000, 20_000, 3, 900, 7_000, 40, 12_000, 100]
    entries = [
        {"name": f"t{i}", "rows": n, "dim": 32, "pooling_factor": i % 3 + 1} for i, n in enumerate(rows)
    ]
    file.write_text(json.dumps({"name": "eight", "tables": entries}))
    return file


@pytest.fixture(scope="module")
def plan(tables: Path) -> Path:
    """A plan file; tests leave it as it is."""
    file = tables.with_name("plan.json")
    assert run("compile", str(tables), "-t", "h100-2x4", "-o", str(file)).exit_code == 0
    return file


def test_compile_prints_the_headline_and_the_certificate(tables: Path) -> None:
    result = run("compile", str(tables), "--topology", "h100-2x4")
    assert result.exit_code == 0
    for word in ("certificate", "gap", "step", "memory", "modelled step", "lookup_forward"):
        assert word in result.output


def test_compile_json_is_the_plan_file(tables: Path, plan: Path) -> None:
    result = run("compile", str(tables), "-t", "h100-2x4", "--json")
    assert result.output == plan.read_text()


def test_print_ir_after_all_shows_each_pass(tables: Path) -> None:
    result = run("compile", str(tables), "-t", "h100-2x4", "--print-ir-after", "all")
    for name in ("capture", "sharding", "memory", "step"):
        assert f"// IR after {name}" in result.output
    only = run("compile", str(tables), "-t", "h100-2x4", "--print-ir-after", "sharding")
    assert only.output.count("// IR after") == 1


def test_explain_a_table_a_rank_and_the_whole(plan: Path) -> None:
    assert "why:" in run("explain", str(plan), "t0").output
    assert "rank 3 (host 0)" in run("explain", str(plan), "--rank", "3").output
    assert "assumptions" in run("explain", str(plan)).output
    data = json.loads(run("explain", str(plan), "--json").output)
    assert set(data["tables"]) == {f"t{i}" for i in range(8)}


def test_verify_says_feasible_and_fails_on_damage(plan: Path, tmp_path: Path) -> None:
    assert "the plan is feasible" in run("verify", str(plan)).output
    data = json.loads(plan.read_text())
    data.pop("digest")  # an edited plan without a digest is still checked
    data["table_plans"][0]["shards"].pop()
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(data))
    result = run("verify", str(broken))
    assert result.exit_code == 1
    assert "NOT feasible" in result.output
    assert json.loads(run("verify", str(broken), "--json").output)["ok"] is False


def test_verify_against_another_model(plan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"tables": [{"name": "t0", "rows": 5, "dim": 32, "pooling_factor": 1}]}))
    result = run("verify", str(plan), "--model", str(other))
    assert result.exit_code == 1
    assert "not in the model" in result.output


def test_diff_and_its_exit_code(tables: Path, plan: Path, tmp_path: Path) -> None:
    same = run("diff", str(plan), str(plan), "--exit-code")
    assert (same.exit_code, same.output.strip()) == (0, "the plans are identical")
    rules = tmp_path / "pins.yaml"
    rules.write_text(
        "tables:\n  t0: {sharding_types: [row_wise]}\n  t1: {sharding_types: [table_row_wise]}\n"
    )
    after = tmp_path / "after.json"
    assert run("compile", str(tables), "-t", "h100-2x4", "-c", str(rules), "-o", str(after)).exit_code == 0
    result = run("diff", str(plan), str(after), "--exit-code")
    assert result.exit_code == 1
    assert "of weights move" in result.output
    assert json.loads(run("diff", str(plan), str(after), "--json").output)["same"] is False


@pytest.mark.parametrize("command", ["run", "emit", "emit --target=torchao", "emit --target=script"])
def test_what_needs_layers_says_so_of_a_plan_from_a_table_list(plan: Path, command: str) -> None:
    refused = run(*command.split(), str(plan))
    assert refused.exit_code == 2
    assert "compiled from the table list" in refused.output
    assert "name the model that holds its tables with --model" in refused.output
    other = run(*command.split(), str(plan), "--model", str(plan.with_name("tables.json")))
    assert "has no layers" in other.output


def test_emit_names_every_host_in_the_command(tmp_path: Path) -> None:
    """The launcher's line says the same as the script's own."""
    file, script = tmp_path / "two.json", tmp_path / "train.py"
    planner.compile("dlrm-small", "h100-2x4", time_limit=0.5).save(file)
    command = run("emit", str(file), "-o", str(script)).output.splitlines()[0].partition("run: ")[2]
    assert "--nproc-per-node 4 --nnodes 2 " in command
    assert command.replace(str(script), "THIS_FILE") in script.read_text()


def test_topologies_lists_and_prints_yaml_that_reads_back(tables: Path, tmp_path: Path) -> None:
    assert "h100-" in run("topologies").output
    file = tmp_path / "t.yaml"
    file.write_text(run("topologies", "a100-2x8").output)
    assert run("compile", str(tables), "-t", str(file)).exit_code == 0


def test_models_lists_the_zoo() -> None:
    assert "dlrm-dcnv2" in run("models").output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("compile", "nowhere.json", "-t", "h100-1x8"), 2, "does not exist"),
        (("compile", "{tables}", "-t", "h1000-1x8"), 2, "h1000-1x8"),
        (("compile", "dlrm-dcnv3", "-t", "h100-1x8"), 2, "did you mean"),
        (
            ("compile", "{tables}", "-t", "h100-1x8", "--batch", "1001"),
            2,
            "1001 does not divide over 8 ranks",
        ),
        (("compile", "{tables}", "-t", "h100-1x8", "--batch", "0"), 2, "at least 1"),
        (("compile", "{tables}", "-t", "h100-1x8", "--time-limit", "nan"), 2, "time_limit"),
        (
            ("compile", "{tables}", "-t", "h100-1x8", "--print-ir-after", "magic"),
            2,
            "there is no pass 'magic'",
        ),
        (("compile", "{tables}", "-t", "h100-1x8", "-o", "/no/such/folder/plan.json"), 2, "cannot write"),
        (("compile", "{huge}", "-t", "h100-1x8"), 3, "conflicting limits"),
        (("compile", "{zero}", "-t", "h100-1x8"), 2, "rows"),
        (("compile", "{twice}", "-t", "h100-1x8"), 2, "'t0'"),
        (("explain", "{plan}", "t99"), 2, "no table 't99'"),
        (("explain", "{plan}", "--rank", "8"), 2, "ranks 0..7"),
        (("explain", "{plan}", "--rank", "-1"), 2, "ranks 0..7"),
        (("verify", "missing.json"), 2, "does not exist"),
        (("compile", "{tables}"), 2, "Missing option"),
        (("compile", "{tables}", "-t", "h100-1x8", "-c", "{list}"), 2, "dictionary"),
        (("compile", "{tables}", "-t", "h100-1x8", "--batch", "9" * 23), 2, "use 1" + "0" * 23),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], code: int, message: str, tables: Path, plan: Path, tmp_path: Path
) -> None:
    def write(name: str, rows: list[int], names: list[str]) -> Path:
        file = tmp_path / f"{name}.json"
        entries = [
            {"name": n, "rows": r, "dim": 128, "pooling_factor": 1} for n, r in zip(names, rows, strict=True)
        ]
        file.write_text(json.dumps({"tables": entries}))
        return file

    files = {
        "{tables}": tables,
        "{plan}": plan,
        "{huge}": write("huge", [10**11], ["t0"]),
        "{zero}": write("zero", [0], ["t0"]),
        "{twice}": write("twice", [5, 6], ["t0", "t0"]),
        "{list}": tmp_path / "list.yaml",
    }
    files["{list}"].write_text("[]\n")
    result = run(*(str(files.get(argument, argument)) for argument in arguments))
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


PLANNER = (sys.executable, "-m", "planner")


def test_an_interrupted_process_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = (*PLANNER, "compile", "dlrm-dcnv2", "-t", "h100-16x8", "-o", str(out), "--json")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "ortools" not in maps.read_text():  # until the solver is loaded
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert (said[0], said[1].strip()) == ("", "interrupted")
    # Python ends by the signal itself where it came while a library ran exec(); shells call both 130
    assert process.returncode in (130, -signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_where_no_command_listens(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """While modules load, and in a process group whose launcher was stopped."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("planner.cli.main", interrupted)
    with pytest.raises(SystemExit) as done:
        start()
    assert (done.value.code, capfd.readouterr().err) == (130, "interrupted\n")


def test_an_output_that_takes_no_more() -> None:
    """A full disk is an error in one sentence; a reader that has left, and one that never was, are not."""
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            (*PLANNER, "models"), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (run.returncode, run.stderr) == (2, "error: cannot write the output: No space left on device\n")
    for shell in ("{} schema plan | true", "{} schema plan >&-"):
        run = subprocess.run(
            ("bash", "-c", shell.format(" ".join(PLANNER))), capture_output=True, text=True, check=False
        )
        assert run.stderr == ""


@pytest.mark.parametrize(
    "words", ["explain", "explian", "explain plan.json --rank many", "compile --no-such"]
)
def test_wrong_usage_is_an_object_too(words: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["planner", *words.split(), "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    answer = json.loads(capfd.readouterr().out)
    assert answer.keys() == {"error", "exit_code"}
    assert answer["exit_code"] == 2
