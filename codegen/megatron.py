"""A decoder's training plan as arguments of Megatron-LM.

Flags are those of Megatron-LM at commit d98e8a64dd (2026-08-22, core 0.20.0): ``megatron/training/arguments.py``
and the dataclasses it reads. Pipeline stages are written with ``--pipeline-model-parallel-layout``, which takes
uneven stages; its stages are listed chunk by chunk, rank by rank.
"""

from __future__ import annotations

import shlex

from codegen.emission import Emission, heading, schedule_limits, stage_layers, trained
from ir.decoder import LlmWorkload
from ir.parallelism import Layout, Parallelism
from ir.plan import Plan

VERSION = "d98e8a64dd (core 0.20.0)"
_SCHEDULES = {"1f1b": "1F1B", "interleaved_1f1b": "interleaved 1F1B"}


def emit_megatron(plan: Plan) -> Emission:
    """A shell script that sets ``MEGATRON_ARGS``; raises InputError where the plan trains no decoder."""
    made, fed = trained(plan, "Megatron-LM")
    _, limits = schedule_limits(made, _SCHEDULES, "Megatron-LM")
    limits += _limits(made, fed)
    arguments = [*_model(made, fed), *_mesh(made.layout), *_batch(made.layout, fed)]
    arguments += [*_sharding(made.layout), *_recompute(made.layout)]
    if made.layout.pipeline > 1:
        arguments.append(("--pipeline-model-parallel-layout", layout_text(made)))
        if made.layout.virtual_stages > 1:
            arguments.append(
                ("--microbatch-group-size-per-virtual-pipeline-stage", str(made.layout.contiguous))
            )
    lines = [*heading(plan, f"Megatron-LM {VERSION}", limits), "", "MEGATRON_ARGS=("]
    lines += ["  " + " ".join(shlex.quote(word) for word in words) for words in arguments]
    lines.append(")")
    command = f"torchrun --nnodes {plan.topology.hosts} --nproc-per-node {plan.topology.host_size}"
    return Emission(
        "\n".join(lines) + "\n",
        limits,
        f'. {{path}} && {command} pretrain_gpt.py "${{{{MEGATRON_ARGS[@]}}}}" (and data, tokenizer, learning rate)',
    )


def layout_text(made: Parallelism) -> str:
    """The stages in Megatron's letters: E embedding, t layer, L loss; ``"Et|tt|tL"``."""
    stages = ["t" * len(layers) for layers in stage_layers(made)]
    stages[0] = "E" + stages[0]
    stages[-1] += "L"
    return "|".join(stages)


def _model(made: Parallelism, fed: LlmWorkload) -> list[tuple[str, ...]]:
    shape = made.model
    flags: list[tuple[str, ...]] = [
        ("--num-layers", str(shape.layers)),
        ("--hidden-size", str(shape.hidden)),
        ("--ffn-hidden-size", str(shape.ffn)),
        ("--num-attention-heads", str(shape.heads)),
        ("--kv-channels", str(shape.head_dim)),
        ("--seq-length", str(fed.sequence)),
        ("--max-position-embeddings", str(fed.sequence)),
        ("--position-embedding-type", "rope"),
        ("--normalization", "RMSNorm"),
        ("--disable-bias-linear",),
    ]
    if shape.kv_heads != shape.heads:
        flags += [("--group-query-attention",), ("--num-query-groups", str(shape.kv_heads))]
    flags += [("--swiglu",)] if shape.gated else []
    flags += [] if shape.tied else [("--untie-embeddings-and-output-weights",)]
    flags += {"bf16": [("--bf16",)], "fp16": [("--fp16",)], "fp32": []}[fed.dtype]
    return [*flags, ("--optimizer", fed.optimizer)]


def _mesh(layout: Layout) -> list[tuple[str, ...]]:
    flags: list[tuple[str, ...]] = [
        ("--tensor-model-parallel-size", str(layout.tensor)),
        ("--context-parallel-size", str(layout.context)),
        ("--pipeline-model-parallel-size", str(layout.pipeline)),
        ("--use-tp-pp-dp-mapping",),  # pipeline ranks inside data ranks, as in the plan
    ]
    flags += [("--sequence-parallel",)] if layout.sequence_parallel else []
    flags += [("--cp-comm-type", "allgather")] if layout.context > 1 else []
    return flags


def _batch(layout: Layout, fed: LlmWorkload) -> list[tuple[str, ...]]:
    return [
        ("--micro-batch-size", str(layout.micro_batch)),
        ("--global-batch-size", str(fed.sequences)),
    ]


def _sharding(layout: Layout) -> list[tuple[str, ...]]:
    if layout.replicas == 1:
        return []
    copies: list[tuple[str, ...]] = []
    if layout.replicate > 1:
        copies.append(("--num-distributed-optimizer-instances", str(layout.replicate)))
    if layout.zero == 1:
        return [
            *copies,
            ("--use-distributed-optimizer",),
            ("--overlap-grad-reduce",),
            ("--overlap-param-gather",),
        ]
    strategy = {2: "optim_grads", 3: "optim_grads_params"}[layout.zero]
    return [
        *copies,
        ("--use-megatron-fsdp",),
        ("--use-distributed-optimizer",),
        ("--overlap-grad-reduce",),
        ("--overlap-param-gather",),
        ("--data-parallel-sharding-strategy", strategy),
        ("--no-gradient-accumulation-fusion",),
        ("--ckpt-format", "fsdp_dtensor"),
    ]


def _recompute(layout: Layout) -> list[tuple[str, ...]]:
    if layout.recompute == "none":
        return []
    if layout.recompute == "full":
        return [
            ("--recompute-granularity", "full"),
            ("--recompute-method", "uniform"),
            ("--recompute-num-layers", "1"),
        ]
    return [("--recompute-granularity", "selective"), ("--recompute-modules", "layernorm")]


def _limits(made: Parallelism, fed: LlmWorkload) -> tuple[str, ...]:
    layout = made.layout
    said = [
        "tokenizer, vocabulary size, data, learning rate, rotary base and norm epsilon are not part of a plan"
    ]
    if layout.recompute == "elementwise":
        said.append(
            "selective recomputation covers the norms' outputs, not the gated product of a dense feed-forward "
            "network: activations are larger than planned"
        )
    if layout.zero >= 2 and layout.replicas > 1 and layout.pipeline > 1:
        said.append(
            "Megatron-FSDP under a pipeline decides for itself after which micro-batches gradients are reduced"
        )
    if fed.dtype == "fp32":
        said.append("fused attention needs a 16-bit type; with fp32 Megatron keeps scores in memory")
    return tuple(said)
