"""doctor finds what is there; the published schemas accept real files and refuse broken ones."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

import planner
from planner import doctor as doctor_module
from planner.cli import cli
from planner.schema import json_schema


def test_doctor_says_that_this_machine_can_plan_and_train() -> None:
    run = CliRunner().invoke(cli, ["doctor", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.output)
    jsonschema.validate(found, json_schema("doctor"))
    verdicts = {entry["name"]: entry["ok"] for entry in found["findings"]}
    assert verdicts["plan"]
    assert verdicts["train with TorchRec"]
    assert found["packages"]["torch"].startswith("2.13")


def test_a_broken_installation_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor_module.Finding:
        raise OSError("libgloo.so: cannot open")

    monkeypatch.setattr(doctor_module, "_plan", broken)
    run = CliRunner().invoke(cli, ["doctor"])
    assert run.exit_code == 1
    assert "libgloo.so" in run.output


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return planner.compile("dlrm-small", "local-2", time_limit=0.1)


@pytest.mark.parametrize("name", ["plan", "topology", "workload", "constraints"])
def test_schemas_are_valid_and_hold_for_real_files(name: str, plan: planner.Plan) -> None:
    run = CliRunner().invoke(cli, ["schema", name])
    schema = json.loads(run.output)
    jsonschema.Draft202012Validator.check_schema(schema)
    files = {
        "plan": plan.to_dict(),
        "topology": yaml.safe_load(yaml.safe_dump(plan.topology.to_dict())),
        "workload": plan.workload.to_dict(),
        "constraints": plan.constraints.to_dict(),
    }
    jsonschema.validate(json.loads(json.dumps(files[name])), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**files[name], "surprise": 1}, schema)


def test_unknown_schema() -> None:
    run = CliRunner().invoke(cli, ["schema", "plam"])
    assert run.exit_code == 2
    assert "did you mean 'plan'" in run.output
    assert json_schema("plan")["$comment"].startswith("format version")
