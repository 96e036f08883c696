"""Emitters for trainers of decoders: names against checked-in field lists, meaning against the plan, and the
targets' own parsers where they are installed (pip install torchtitan==0.2.2, or 0.3.0, and accelerate==1.15.0;
Megatron-LM on the path)."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import shlex
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import planner
from codegen.accelerate import emit_accelerate
from codegen.emission import Emission
from codegen.megatron import emit_megatron
from codegen.torchtitan import emit_torchtitan
from codegen.torchtitan_python import emit_torchtitan_python
from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.parallelism import Parallelism, ParallelismConstraints
from planner.cli import cli
from planner.models import resolve
from planner.plan import Plan

FIELDS: dict[str, Any] = json.loads((Path(planner.__file__).parent / "data" / "emit_fields.json").read_text())
RULES = {
    "interleaved": ParallelismConstraints(
        tensor=2, pipeline=4, schedules=("interleaved_1f1b",), recompute=("none", "full"), zero=(1,)
    ),
    "zero_bubble": ParallelismConstraints(
        pipeline=2, schedules=("zero_bubble",), recompute=("elementwise",), zero=(2,)
    ),
    "flat": ParallelismConstraints(tensor=4, context=2, pipeline=1, recompute=("full",), zero=(3,)),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    model = resolve("llama3-8b").model
    fed = planner.Workload(llm=LlmWorkload(8192, 2**21))
    return {
        name: planner.compile(
            model, "h100-2x8", fed, constraints=planner.Constraints(parallelism=rules, memory_reserve=0.0)
        )
        for name, rules in RULES.items()
    }


def section(plan: Plan) -> Parallelism:
    assert plan.decisions.parallelism is not None
    return plan.decisions.parallelism


def flags_of(text: str) -> dict[str, str | bool]:
    """The shell array read back: flag to its argument, or True."""
    body = re.search(r"^MEGATRON_ARGS=\(\n(.*?)^\)", text, re.M | re.S)
    assert body is not None
    words, found = shlex.split(body[1], comments=True), {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            assert word not in found
            found[word] = True if after.startswith("--") else after
    return found


def values_fit(section: str, values: dict[str, Any], dialect: str = "torchtitan") -> None:
    """Every field is the section's and its value has the declared type."""
    known = FIELDS[dialect]["sections"][section]
    for name, value in values.items():
        assert name in known, f"{section} has no field {name}"
        declared = known[name]
        choices = re.findall(r"'([^']*)'", declared) if "Literal" in declared else None
        if choices:
            assert value in choices
        else:
            assert type(value).__name__ in declared or (
                isinstance(value, list) and declared.startswith("list")
            )


@pytest.mark.parametrize("name", list(RULES))
def test_torchtitan_names_and_meaning(plans: dict[str, Plan], name: str) -> None:
    plan = plans[name]
    made, read = section(plan), tomllib.loads(emit_torchtitan(plan).text)
    sections = {"job": "Job", "model": "Model", "training": "Training", "parallelism": "Parallelism"}
    for key, values in read.items():
        values_fit(sections.get(key, "ActivationCheckpoint"), values)
    degrees, batch = read["parallelism"], read["training"]
    product = degrees["data_parallel_replicate_degree"] * degrees["data_parallel_shard_degree"]
    product *= degrees["tensor_parallel_degree"] * degrees["context_parallel_degree"]
    assert product * degrees["pipeline_parallel_degree"] == 16
    assert batch["global_batch_size"] * batch["seq_len"] == 2**21
    assert read["model"]["flavor"] == "8B"
    if made.layout.pipeline > 1:
        parts = degrees["module_fqns_per_model_part"]
        listed = [fqn for part in parts for fqn in part]
        assert listed == ["tok_embeddings", *(f"layers.{i}" for i in range(32)), "norm", "output"]
        # a rank's parts are rank, rank + P, rank + 2 P: the layers the plan gives it
        for rank, own in enumerate(made.stages):
            counts = [sum(f.startswith("layers") for f in part) for part in parts[rank :: len(made.stages)]]
            assert counts == list(own)


def assignments_of(text: str) -> dict[str, ast.expr]:
    """What the emitted function assigns to fields of ``config``."""
    tree = ast.parse(text)
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    found = {}
    for statement in function.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
            found[statement.targets[0].attr] = statement.value
    return found


@pytest.mark.parametrize("name", list(RULES))
def test_torchtitan_functions_say_what_the_toml_says(plans: dict[str, Plan], name: str) -> None:
    """Names and types against the list of 0.3.0, values against the file of 0.2.2."""
    listed = FIELDS["torchtitan_python"]
    plan = plans[name]
    text, older = emit_torchtitan_python(plan).text, tomllib.loads(emit_torchtitan(plan).text)
    made = assignments_of(text)
    for field, kind in (("training", "TrainingConfig"), ("parallelism", "ParallelismConfig")):
        call = made[field]
        assert isinstance(call, ast.Call)
        assert ast.unparse(call.func) == kind
        values = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        values_fit(kind, values, "torchtitan_python")
        for key in values.keys() & older[field].keys() - {"module_fqns_per_model_part"}:
            assert values[key] == older[field][key]
        if "module_fqns_per_model_part" in values:
            parts = [
                [fqn.replace("lm_head", "output") for fqn in part]
                for part in values["module_fqns_per_model_part"]
            ]
            assert parts == older[field]["module_fqns_per_model_part"]
        if field == "training" and section(plan).layout.pipeline > 1:
            assert values["disable_cuda_graphs"] is True  # else Trainer.Config of 0.3.0 refuses
    policy = ast.unparse(made["activation_checkpoint"]).partition(".")[0]
    wanted = {"none": "None", "full": "FullAC", "elementwise": "SelectiveAC"}[section(plan).layout.recompute]
    assert policy == wanted
    assert policy == "None" or policy in listed["policies"]
    assert re.findall(r"config = (\w+)\(\)", text)[0] in listed["bases"]
    assert re.findall(r'model_registry\("(\w+)"\)', text)[0] in listed["flavors"]


@pytest.mark.parametrize("name", list(RULES))
def test_megatron_names_and_meaning(plans: dict[str, Plan], name: str) -> None:
    made, flags = section(plans[name]), flags_of(emit_megatron(plans[name]).text)
    known = FIELDS["megatron"]["flags"]
    for flag, value in flags.items():
        assert flag in known, f"Megatron has no {flag}"
        assert (known[flag] == 0) == (value is True)
        assert not isinstance(known[flag], list) or value in known[flag]
    assert flags["--global-batch-size"] == "256"
    if made.layout.pipeline > 1:
        stages = str(flags["--pipeline-model-parallel-layout"]).split("|")
        assert len(stages) == made.layout.pipeline * made.layout.virtual_stages
        assert stages[0][0] == "E"
        assert stages[-1][-1] == "L"
        for rank, own in enumerate(made.stages):
            assert [stage.count("t") for stage in stages[rank :: made.layout.pipeline]] == list(own)


def test_accelerate_names_and_meaning(plans: dict[str, Plan]) -> None:
    read = yaml.safe_load(emit_accelerate(plans["flat"]).text)
    assert set(read) <= set(FIELDS["accelerate"]["cluster"])
    for group in ("fsdp_config", "parallelism_config"):
        assert set(read[group]) <= set(FIELDS["accelerate"]["launch"])
    sizes = [value for key, value in read["parallelism_config"].items() if key.endswith("_size")]
    assert sizes == [1, section(plans["flat"]).layout.data, 4, 2]
    assert read["fsdp_config"]["fsdp_reshard_after_forward"] is True
    with pytest.raises(InputError, match="no pipeline dimension"):
        emit_accelerate(plans["interleaved"])


def test_what_a_target_lacks_is_said_in_the_file(plans: dict[str, Plan]) -> None:
    emitted = {
        "torchtitan": emit_torchtitan(plans["zero_bubble"]),
        "torchtitan 0.3": emit_torchtitan_python(plans["zero_bubble"]),
        "megatron": emit_megatron(plans["zero_bubble"]),
        "accelerate": emit_accelerate(plans["flat"]),
    }
    for made in emitted.values():
        assert made.limits
        assert all(f"# - {limit}" in made.text.splitlines() for limit in made.limits)

    def says(made: Emission, what: str) -> bool:
        return any(what in limit for limit in made.limits)

    assert says(emitted["megatron"], "no zero_bubble schedule")
    assert says(emitted["torchtitan"], "every second matrix product")
    assert says(emitted["accelerate"], "gradient_accumulation_steps")


def test_command_line(plans: dict[str, Plan], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plans["interleaved"].save(path)
    done = CliRunner().invoke(cli, ["emit", str(path), "--target", "megatron"])
    assert done.exit_code == 0
    assert flags_of(done.stdout)["--tensor-model-parallel-size"] == "2"
    assert "note: tokenizer" in done.stderr
    refused = CliRunner().invoke(cli, ["emit", str(path), "--target", "accelerate"])
    assert refused.exit_code == 2


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def titan(release: str) -> bool:
    return installed("torchtitan") and importlib.metadata.version("torchtitan").startswith(release)


@pytest.mark.skipif(not titan("0.3"), reason="torchtitan 0.3 is not installed")
@pytest.mark.parametrize("name", list(RULES))
def test_torchtitan_reads_its_function(
    plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from torchtitan.config import ConfigManager

    (tmp_path / f"planned_{name}.py").write_text(emit_torchtitan_python(plans[name]).text)
    monkeypatch.syspath_prepend(str(tmp_path))
    read = ConfigManager().parse_args(["--module", f"planned_{name}", "--config", "plan"])
    layout = section(plans[name]).layout
    assert read.parallelism.tensor_parallel_degree == layout.tensor
    assert read.parallelism.pipeline_parallel_degree == layout.pipeline
    assert read.training.seq_len == 8192


@pytest.mark.skipif(not titan("0.2"), reason="torchtitan 0.2.2 is not installed")
@pytest.mark.parametrize("name", list(RULES))
def test_torchtitan_reads_its_file(plans: dict[str, Plan], tmp_path: Path, name: str) -> None:
    from torchtitan.config import ConfigManager

    path = tmp_path / "titan.toml"
    path.write_text(emit_torchtitan(plans[name]).text)
    read = ConfigManager().parse_args(["--job.config_file", str(path)])
    assert read.parallelism.tensor_parallel_degree == section(plans[name]).layout.tensor
    assert read.training.seq_len == 8192


@pytest.mark.skipif(not installed("accelerate"), reason="accelerate 1.15.0 is not installed")
def test_accelerate_reads_its_file(
    plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import ParallelismConfig
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_extend_env_parallelism_config

    path = tmp_path / "accelerate.yaml"
    path.write_text(emit_accelerate(plans["flat"]).text)
    assert load_config_from_file(str(path)).num_processes == 16
    given = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    launched, _, _ = _validate_launch_command(given)
    assert launched.use_fsdp
    assert launched.fsdp_version == 2
    for key, value in prepare_extend_env_parallelism_config(launched, {}).items():
        monkeypatch.setenv(key, value)
    layout = section(plans["flat"]).layout
    read = ParallelismConfig()
    assert (read.dp_shard_size, read.tp_size, read.cp_size) == (layout.data, 4, 2)


@pytest.mark.skipif(not installed("megatron.training"), reason="Megatron-LM is not on the path")
@pytest.mark.parametrize("name", list(RULES))
def test_megatron_reads_its_arguments(plans: dict[str, Plan], name: str) -> None:
    import argparse

    import typing_extensions

    # Megatron-LM at this commit imports typing.override, which Python has from 3.12 on
    vars(typing).setdefault("override", typing_extensions.override)
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    body = re.search(r"^MEGATRON_ARGS=\(\n(.*?)^\)", emit_megatron(plans[name]).text, re.M | re.S)
    assert body is not None
    read = parser.parse_args(shlex.split(body[1], comments=True))
    layout = section(plans[name]).layout
    assert read.tensor_model_parallel_size == layout.tensor
    assert read.context_parallel_size == layout.context
    if layout.pipeline > 1:
        stages = PipelineParallelLayerLayout(read.pipeline_model_parallel_layout, layout.pipeline)
        stages.validate_layer_layout(num_layers=32, mtp_num_layers=None)
