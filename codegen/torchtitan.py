"""A decoder's training plan as a configuration of torchtitan 0.2.2 (TOML).

Sections and fields are those of torchtitan 0.2.2 (PyPI; ``torchtitan/config/job_config.py``). Later releases
take Python functions instead: :mod:`codegen.torchtitan_python`.
"""

from __future__ import annotations

import json

from codegen.emission import Emission, Values, heading, plain, schedule_limits, stage_layers, trained
from ir.decoder import DecoderShape, LlmWorkload
from ir.errors import InputError
from ir.parallelism import Layout, Parallelism
from ir.plan import Plan

VERSION = "0.2.2"

# torch.distributed.pipelining names, by which torchtitan calls them
_SINGLE = {"gpipe": "GPipe", "1f1b": "1F1B"}
_MULTI = {"interleaved_1f1b": "Interleaved1F1B", "zero_bubble": "InterleavedZeroBubble"}

# torchtitan 0.2.2, models/llama3/__init__.py: (layers, hidden, heads, key-value heads) of its flavors
_FLAVORS = {(32, 4096, 32, 8): "8B", (80, 8192, 64, 8): "70B", (126, 16384, 128, 8): "405B"}


def emit_torchtitan(plan: Plan) -> Emission:
    """The TOML file of a training plan.

    Raises:
        InputError: no training plan of a decoder, or a type that torchtitan cannot compute in.
    """
    made, fed = trained(plan, "torchtitan")
    layout = made.layout
    schedule, limits = titan_schedule(made)
    flavor = flavor_of(made.model)
    limits += titan_limits(made, fed, flavor)
    model: dict[str, object] = {"name": "llama3", **({"flavor": flavor} if flavor else {})}
    sections: Values = {
        "job": {"description": f"{plain(plan.model.name)}, plan {plan.digest[7:23]}"},
        "model": model,
        "training": training_values(layout, fed),
        "parallelism": _parallelism(layout) | (_pipeline(made, schedule) if layout.pipeline > 1 else {}),
        "activation_checkpoint": _checkpointing(layout),
    }
    lines = heading(plan, f"torchtitan {VERSION}", limits)
    for name, fields in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in fields.items())]
    command = f"torchrun --nnodes {plan.topology.hosts} --nproc-per-node {plan.topology.host_size}"
    return Emission(
        "\n".join(lines) + "\n", limits, f"{command} -m torchtitan.train --job.config_file {{path}}"
    )


def flavor_of(model: DecoderShape) -> str:
    """torchtitan's name of the model; empty where it has none."""
    return _FLAVORS.get((model.layers, model.hidden, model.heads, model.kv_heads), "")


def titan_schedule(made: Parallelism) -> tuple[str, tuple[str, ...]]:
    """torch's name of the schedule, or that of the nearest, and what it lacks."""
    return schedule_limits(made, _MULTI if made.layout.virtual_stages > 1 else _SINGLE, "torchtitan")


def part_names(made: Parallelism, projection: str) -> list[list[str]]:
    """Modules of each stage; ``projection`` is what a release calls the output projection."""
    stages = [[f"layers.{layer}" for layer in layers] for layers in stage_layers(made)]
    stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", projection]
    return stages


def training_values(layout: Layout, fed: LlmWorkload) -> dict[str, object]:
    if fed.dtype == "fp16":
        raise InputError("torchtitan computes in bfloat16 or float32, not fp16; compile the plan for bf16")
    step = layout.micro_batch * layout.micro_batches
    return {
        # a pipeline cuts the local batch into micro-batches; without one torchtitan accumulates over local batches
        "local_batch_size": step if layout.pipeline > 1 else layout.micro_batch,
        "global_batch_size": step * layout.data,
        "seq_len": fed.sequence,
        "mixed_precision_param": {"bf16": "bfloat16", "fp32": "float32"}[fed.dtype],
        "mixed_precision_reduce": "float32",
    }


def _parallelism(layout: Layout) -> dict[str, object]:
    return {
        "data_parallel_replicate_degree": layout.replicate,
        "data_parallel_shard_degree": layout.data // layout.replicate,
        "fsdp_reshard_after_forward": "always" if layout.zero == 3 else "never",
        "tensor_parallel_degree": layout.tensor,
        "context_parallel_degree": layout.context,
        "context_parallel_load_balancer": "headtail",  # 2N chunks
        "context_parallel_rotate_method": "allgather",
        "pipeline_parallel_degree": layout.pipeline,
    }


def _pipeline(made: Parallelism, schedule: str) -> dict[str, object]:
    return {
        "pipeline_parallel_schedule": schedule,
        "pipeline_parallel_microbatch_size": made.layout.micro_batch,
        "module_fqns_per_model_part": part_names(made, "output"),
    }


def _checkpointing(layout: Layout) -> dict[str, object]:
    if layout.recompute == "elementwise":
        return {"mode": "selective", "selective_ac_option": "op"}
    return {"mode": layout.recompute}


def titan_limits(made: Parallelism, fed: LlmWorkload, flavor: str) -> tuple[str, ...]:
    """What torchtitan lacks or does otherwise, in both dialects."""
    layout, said = made.layout, ["tokenizer, data set and learning rate are not part of a plan"]
    if not flavor:
        said.append(
            f"torchtitan's llama3 has no flavor of {_sizes(made.model)}; register one and set model.flavor"
        )
    if layout.pipeline > 1 and layout.data * layout.context > 1:
        said.append(
            "torchtitan puts pipeline ranks outermost, the plan puts data ranks there; place hosts accordingly"
        )
    if layout.pipeline > 1 and layout.virtual_stages > 1:
        rounds = max(1, layout.micro_batches // layout.pipeline)
        torch_run = layout.micro_batches // rounds
        if layout.schedule == "interleaved_1f1b" and torch_run != layout.contiguous:
            said.append(
                f"torch runs {torch_run} micro-batches in a row through a chunk, the plan {layout.contiguous}"
            )
    if layout.recompute == "elementwise":
        said.append(
            "selective checkpointing by op also recomputes every second matrix product, the plan recomputes none"
        )
    if layout.zero == 2 and layout.pipeline > 1:
        said.append(
            "torch reduces a pipeline stage's gradients once a step, so they are held whole (the plan shards them)"
        )
    if layout.zero == 1 and layout.pipeline == 1:
        said.append(
            "FSDP2 reduces gradients each time a local batch ends; the plan reduces them once a step (ZeRO-1)"
        )
    if fed.optimizer != "adam":
        said.append(f"torchtitan builds Adam or AdamW, the plan counts {fed.optimizer}")
    return tuple(said)


def _sizes(shape: DecoderShape) -> str:
    return f"{shape.layers} layers of width {shape.hidden}, {shape.heads} heads and {shape.kv_heads} key-value heads"


def _toml(value: object) -> str:
    """A TOML value; JSON text of strings, integers, booleans and lists of strings is TOML."""
    return json.dumps(value)
