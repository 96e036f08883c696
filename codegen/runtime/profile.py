"""One training step of a plan under torch's profiler, on real gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codegen.runtime.launch import DEFAULT_TIMEOUT, Rank, launch
from codegen.torchrec_check import check
from ir.errors import InputError
from ir.plan import Plan

WARM_UP = 2  # steps before the profiled one: buffers and process groups are made in the first


def profile_plan(
    plan: Plan,
    folder: Path,
    *,
    factory: str,
    arguments: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
    batch: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> list[Path]:
    """Train three steps, the last under the profiler; the trace file of each rank, in ``folder``.

    Raises:
        InputError: the plan does not fit the model, or TorchRec would run it wrongly.
        LaunchError: a rank failed.
    """
    from codegen.runtime.models import ModelSpec

    spec = ModelSpec(factory, tuple(arguments), dict(options or {}))
    check(plan, spec.build(0)[0], device="cpu")
    size = batch or plan.workload.global_batch
    if size % plan.world_size:
        raise InputError(
            f"a global batch of {size} does not divide over {plan.world_size} ranks; use a multiple"
        )
    given = {
        "plan": plan.to_dict(),
        "model": {"factory": spec.factory, "arguments": list(spec.arguments), "options": spec.options},
        "batch": size,
        "folder": str(folder),
    }
    here = f"{__name__}:profile_rank"
    files = launch(here, plan.world_size, given, host_size=plan.topology.host_size, timeout=timeout)
    return [Path(file) for file in files]


def profile_rank(place: Rank, plan: dict[str, Any], model: dict[str, Any], batch: int, folder: str) -> str:
    """One process: warm up, profile a step, write its trace; returns the file."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from codegen.runtime.batches import RandomBatches
    from codegen.runtime.compare_rank import step_seed, train_step
    from codegen.runtime.models import ModelSpec
    from codegen.torchrec import sharded_model

    torch.set_num_threads(1)
    decided = Plan.from_dict(plan)
    spec = ModelSpec(model["factory"], tuple(model["arguments"]), model["options"])
    module, example = spec.build(0)
    batches = RandomBatches(module, decided.table_plans, decided.workload, batch, example)
    sharded = sharded_model(decided, module, dense_optimizer="sgd")
    parts = [batches(step_seed(0, step)).part(place.rank, place.world_size) for step in range(WARM_UP + 1)]
    for part in parts[:-1]:
        train_step(sharded, part)
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train_step(sharded, parts[-1])
    file = Path(folder) / f"rank{place.rank}.json"
    profiler.export_chrome_trace(str(file))
    return str(file)
