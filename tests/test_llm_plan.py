"""Decoders at the front door: compile, verify, save, diff, explain, the command line, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import planner
from ir.decoder import LlmWorkload
from ir.errors import InfeasibleError, InputError
from ir.llm import DecoderModel
from ir.parallelism import Layout, Parallelism, ParallelismConstraints
from planner.cli import cli
from planner.models import resolve
from planner.plan import Plan
from planner.render import to_text


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    captured = resolve("llama3-8b").model
    assert isinstance(captured, DecoderModel)
    return captured


@pytest.fixture(scope="module")
def plan(model: DecoderModel) -> Plan:
    """8B on four hosts, with a pipeline so that every check has something to check."""
    schedules = ("interleaved_1f1b", "zero_bubble")
    return compiled(
        model, ParallelismConstraints(pipeline=4, schedules=schedules, recompute=("elementwise",), zero=(2,))
    )


def compiled(model: DecoderModel, rules: ParallelismConstraints | None, **llm: Any) -> Plan:
    fed = LlmWorkload(**{"sequence": 8192, "global_tokens": 2**22, **llm})
    made: Plan = planner.compile(
        model, "h100-4x8", planner.Workload(llm=fed), constraints=planner.Constraints(parallelism=rules)
    )
    return made


def section(plan: Plan) -> Parallelism:
    assert plan.decisions.parallelism is not None
    return plan.decisions.parallelism


def faults(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {finding.check: finding.faults for finding in planner.verify(plan) if finding.faults}


def test_a_plan_is_whole_and_verified(plan: Plan) -> None:
    made = section(plan)
    assert faults(plan) == {}
    assert made.layout.world == 32 == len(plan.memory)
    assert plan.certificate.gap == 0.0
    assert plan.certificate.objective == plan.timeline.step
    assert made.search.legal == made.search.evaluated + made.search.too_large + made.search.cut
    assert made.search.bound <= plan.timeline.step
    steps = [plan.timeline.step, *(other.step for other in made.alternatives)]
    assert steps == sorted(steps)
    assert len({made.layout.label, *(other.layout.label for other in made.alternatives)}) == 5
    assert plan.workload.global_batch == 512
    assert plan.model.dense_params == 8_030_261_248


def test_every_rank_gets_its_stage(plan: Plan) -> None:
    """Rank r has the mixed-radix coordinates of Llama 3: tensor, context, pipeline, data."""
    layout = section(plan).layout
    by_stage = {layout.stage_of(entry.rank): entry.used for entry in plan.memory}
    assert len(by_stage) == 4
    for entry in plan.memory:
        d, rest = divmod(entry.rank, layout.tensor * layout.context * layout.pipeline)
        assert d < layout.data
        assert by_stage[rest // (layout.tensor * layout.context)] == entry.used


def test_the_same_inputs_give_the_same_bytes(model: DecoderModel, plan: Plan) -> None:
    again = compiled(model, plan.constraints.parallelism)
    assert again.to_json() == plan.to_json()


def test_saved_and_loaded(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def edited(plan: Plan, **changes: Any) -> Plan:
    made = replace(section(plan), **changes)
    return replace(plan, decisions=replace(plan.decisions, parallelism=made))


def with_layout(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: edited(plan, layout=replace(section(plan).layout, **changes))


def lighter(plan: Plan) -> Plan:
    """A plan that claims two thirds of the memory."""
    memory = tuple(
        replace(entry, used={name: 2 * size // 3 for name, size in entry.used.items()})
        for entry in plan.memory
    )
    return replace(plan, memory=memory)


@pytest.mark.parametrize(
    ("damage", "check", "says"),
    [
        (with_layout(tensor=3), "parallelism", "needs"),
        (with_layout(tensor=64, data=1), "parallelism", "does not divide 32 heads"),
        (with_layout(context=16384), "parallelism", "cannot be split over context"),
        (with_layout(replicate=3), "parallelism", "3 copies do not divide"),
        (with_layout(micro_batches=7), "parallelism", "sequences of 8192 tokens are not"),
        (with_layout(contiguous=3), "parallelism", "N=3 must divide"),
        (with_layout(schedule="1f1b"), "parallelism", "one chunk a rank"),
        (lambda plan: edited(plan, stages=section(plan).stages[:-1]), "parallelism", "stages are not"),
        (
            lambda plan: edited(plan, model=replace(section(plan).model, layers=31)),
            "parallelism",
            "the model has 31",
        ),
        (lambda plan: edited(plan, tflops=section(plan).tflops * 1.01), "parallelism", "TFLOP/s a device"),
        (lambda plan: edited(plan, flops=section(plan).flops * 1.01), "parallelism", "model FLOP"),
        (lambda plan: edited(plan, seconds={"gemm": 1.0}), "parallelism", "add up to 1.0 s"),
        (lighter, "parallel_memory", "activations in flight need"),
        (with_layout(recompute="none"), "parallel_memory", "activations in flight need"),
        (with_layout(zero=1), "parallel_memory", "activations in flight need"),
    ],
)
def test_a_damaged_plan_is_refused(plan: Plan, damage: Callable[[Plan], Plan], check: str, says: str) -> None:
    found = faults(damage(plan))
    assert any(says in fault for fault in found[check])


def test_no_memory_left_is_infeasible_with_the_nearest_layout(model: DecoderModel) -> None:
    with pytest.raises(
        InfeasibleError, match=r"none of \d+ legal layouts fits .* the nearest is TP"
    ) as caught:
        planner.compile(
            model,
            "h100-1x2",
            planner.Workload(llm=LlmWorkload(8192, 2**20)),
            constraints=planner.Constraints(memory_limit=10**9),
        )
    assert "memory_limit" in caught.value.conflict


def test_the_405b_model_does_not_fit_eight_gpus() -> None:
    with pytest.raises(InfeasibleError, match=r"fits 63\.3 GiB a device"):
        planner.compile("llama3-405b", "h100-1x8", planner.Workload(llm=LlmWorkload(8192, 2**20)))


@pytest.mark.parametrize(
    ("workload", "says"),
    [
        (planner.Workload(llm=LlmWorkload(8192, 2**20 + 1)), "not a whole number of sequences of 8192"),
        (planner.Workload(global_batch=64, llm=LlmWorkload(8192, 2**22)), "contradicts llm.global_tokens"),
    ],
)
def test_workloads_that_contradict_themselves(
    model: DecoderModel, workload: planner.Workload, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        planner.compile(model, "h100-4x8", workload)


def test_a_batch_alone_counts_sequences(model: DecoderModel) -> None:
    made = planner.compile(model, "h100-4x8", planner.Workload(global_batch=64))
    assert made.workload.llm == LlmWorkload(8192, 64 * 8192)


def test_pins_hold_and_free_search_is_at_least_as_fast(model: DecoderModel) -> None:
    free, pinned = (
        section(compiled(model, None)),
        compiled(model, ParallelismConstraints(tensor=8, zero=(1,))),
    )
    assert section(pinned).layout.tensor == 8
    assert section(pinned).layout.zero == 1
    assert sum(free.seconds.values()) <= pinned.timeline.step


def test_no_legal_degrees(model: DecoderModel) -> None:
    with pytest.raises(InfeasibleError, match="no tensor, context, pipeline and data parallelism divides"):
        compiled(model, ParallelismConstraints(tensor=3))


def test_text_of_a_plan(model: DecoderModel, plan: Plan) -> None:
    layout: Layout = section(plan).layout
    assert layout.label in str(plan)
    assert "TFLOP/s a device" in str(plan)
    explained = plan.explain()
    assert "memory of a device, by pipeline rank" in explained
    assert "gemm_efficiency" in explained
    last = plan.explain(rank=31)
    assert "pipeline 3" in last
    other = compiled(model, None)
    assert section(other).layout.label in to_text_flat(plan.diff(other))
    assert plan.diff(plan) == "the plans are identical"
    with pytest.raises(InputError, match=r"ranks 0\.\.31"):
        plan.explain(rank=32)


def to_text_flat(text: str) -> str:
    return " ".join(text.split())


def test_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke
    path = str(tmp_path / "plan.json")
    made = run(
        cli,
        [
            "compile",
            "llama3-8b",
            "-t",
            "h100-2x8",
            "--sequence",
            "4096",
            "--global-tokens",
            "1048576",
            "-o",
            path,
        ],
    )
    assert made.exit_code == 0, made.output
    assert "4,096 tokens a sequence" in to_text_flat(made.output)
    assert run(cli, ["verify", path]).exit_code == 0
    explained = json.loads(run(cli, ["explain", path, "--json"]).output)
    assert explained["parallelism"]["layout"]["data"] >= 1
    assert json.loads(run(cli, ["models", "--json"]).output)["llama3-405b"]
    assert run(cli, ["compile", "llama3-8b", "-t", "h100-2x8", "--global-tokens", "1000"]).exit_code == 2


def test_summary_is_the_same_from_a_file(plan: Plan, tmp_path: Path) -> None:
    from planner.render import summary

    plan.save(tmp_path / "plan.json")
    assert to_text(summary(Plan.load(tmp_path / "plan.json"))) == str(plan)
