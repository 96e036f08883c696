"""A tiny Llama trained on gloo in every kind of parallelism: losses, gradients and weights of the whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

import planner
from codegen.llm import parallel_model, run_decoder
from codegen.runtime.llm.limits import check_runs
from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.llm import DecoderModel
from ir.parallelism import ParallelismConstraints as Rules
from planner.cli import cli
from planner.models import resolve
from planner.plan import Plan
from planner.run_llm import compiled_for_run
from planner.zoo import build

# six layers of width 48 and 4 heads: small enough that a run is mostly process start
SIZES = {"layers": 6, "hidden": 48, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": 80, "sequence": 32}


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    found = resolve("llama-tiny", **SIZES).model
    assert isinstance(found, DecoderModel)
    return found


def compiled(model: DecoderModel, ranks: int, rules: Rules) -> Plan:
    fed = LlmWorkload(32, 32 * 8, dtype="fp32", optimizer="sgd")
    return planner.compile(
        model,
        f"local-{ranks}",
        planner.Workload(llm=fed),
        constraints=planner.Constraints(parallelism=rules),
    )


FOUR = {
    "tensor x pipeline": Rules(tensor=2, pipeline=2, micro_batch=1, schedules=("1f1b",)),
    "tensor x data": Rules(tensor=2, data=2, zero=(3,)),
    "pipeline x data": Rules(
        pipeline=2, data=2, virtual_stages=3, schedules=("interleaved_1f1b",), zero=(2,), recompute=("full",)
    ),
    "copies x shards": Rules(data=4, replicate=2, zero=(2,), micro_batch=1),
    "context x data": Rules(context=2, data=2, zero=(1,), micro_batch=1),
    "tensor x context": Rules(tensor=2, context=2, recompute=("elementwise",)),
    "context x pipeline": Rules(context=2, pipeline=2, schedules=("gpipe",)),
    "pipeline, zero bubble": Rules(pipeline=4, schedules=("zero_bubble",), recompute=("none",)),
}
TWO = {
    "context": Rules(context=2),
    "tensor": Rules(tensor=2),
    "pipeline": Rules(pipeline=2, recompute=("none",), schedules=("zero_bubble", "interleaved_1f1b")),
}


@pytest.mark.parametrize(("ranks", "name"), [(4, name) for name in FOUR] + [(2, name) for name in TWO])
def test_equal_to_the_whole_model(model: DecoderModel, ranks: int, name: str) -> None:
    plan = compiled(model, ranks, {4: FOUR, 2: TWO}[ranks][name])
    options = {**SIZES, "device": "cpu"}
    found = run_decoder(plan, "planner.zoo:build", ("llama-tiny",), options, steps=1, timeout=180)
    assert found.tensors == 6 * 9 + 3
    assert found.equal, found
    # two steps, so that the second loss depends on the gradients of the first
    assert found.parallel_losses[1] != pytest.approx(found.parallel_losses[0], rel=1e-4)


def test_what_cannot_run_is_refused_before_processes_start(model: DecoderModel) -> None:
    plan = compiled(model, 4, Rules(context=2, pipeline=2, schedules=("zero_bubble",)))
    with pytest.raises(InputError, match="splits the backward pass"):
        run_decoder(plan, "planner.zoo:build", ("llama-tiny",), {**SIZES, "device": "cpu"})
    split = Rules(data=2, pipeline=2, zero=(3,), schedules=("zero_bubble",))
    with pytest.raises(InputError, match=r"ZeRO-3\); compile with"):
        run_decoder(
            compiled(model, 4, split), "planner.zoo:build", ("llama-tiny",), {**SIZES, "device": "cpu"}
        )
    for rules in (Rules(context=2, pipeline=2), Rules(data=2, pipeline=2, zero=(3,))):
        runs = compiled_for_run("llama-tiny", "local-4", planner.Constraints(parallelism=rules))
        assert runs.decisions.parallelism is not None
        check_runs(runs.decisions.parallelism)
    big = planner.compile("llama3-8b", "h100-1x8")
    with pytest.raises(InputError, match="computes in bf16"):
        run_decoder(big, "planner.zoo:build", ("llama3-8b",), {"device": "cpu"})


@pytest.fixture
def single(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("single")
def test_apply_gives_a_trainable_decoder(model: DecoderModel) -> None:
    plan = compiled(model, 1, Rules())
    torch.manual_seed(0)
    whole = build("llama-tiny", **SIZES, device="cpu").module
    decoder = plan.apply(whole)
    ids = torch.randint(80, (8, 33))
    optimizer = torch.optim.SGD(list(decoder.parameters()), lr=0.5)
    losses = []
    for _ in range(5):
        losses.append(decoder.step(ids[:, :-1], ids[:, 1:]))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match="8 sequences of 32 tokens"):
        decoder.step(ids[:4, :-1], ids[:4, 1:])
    with pytest.raises(InputError, match="process group has 1"):
        parallel_model(compiled(model, 2, Rules()), whole)


def test_command_line() -> None:
    done = CliRunner().invoke(cli, ["run", "llama-tiny", "--topology", "local-2", "--steps", "1", "--json"])
    assert done.exit_code == 0, done.output
    read = json.loads(done.stdout)
    assert read["equal"]
    assert read["nproc"] == 2
