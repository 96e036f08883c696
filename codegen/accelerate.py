"""A decoder's training plan as a configuration file of Hugging Face accelerate 1.15.0 (YAML).

Keys are the fields of ``ClusterConfig`` (``accelerate/commands/config/config_args.py``) and, inside
``fsdp_config`` and ``parallelism_config``, arguments of ``accelerate launch`` (``accelerate/commands/launch.py``).
"""

from __future__ import annotations

import json

from codegen.emission import Emission, Values, heading, trained
from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.parallelism import Layout
from ir.plan import Plan

VERSION = "1.15.0"


def emit_accelerate(plan: Plan) -> Emission:
    """The YAML file of a training plan without pipeline.

    Raises:
        InputError: no training plan of a decoder, or one with pipeline ranks, which accelerate does not have.
    """
    made, fed = trained(plan, "accelerate")
    layout = made.layout
    if layout.pipeline > 1:
        raise InputError(
            f"accelerate {VERSION} has no pipeline dimension and the plan is {layout.label}; compile with "
            "constraints.parallelism.pipeline: 1, or emit for torchtitan or megatron"
        )
    limits = _limits(layout, fed)
    top: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "mixed_precision": {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}[fed.dtype],
        "use_cpu": plan.topology.device.kind == "cpu",
        "debug": False,
        "num_machines": plan.topology.hosts,
        "num_processes": plan.world_size,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
    }
    groups: Values = {
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": layout.zero == 3,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_activation_checkpointing": layout.recompute == "full",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
        "parallelism_config": {
            "parallelism_config_dp_replicate_size": layout.replicate,
            "parallelism_config_dp_shard_size": layout.data // layout.replicate,
            "parallelism_config_tp_size": layout.tensor,
            "parallelism_config_cp_size": layout.context,
            "parallelism_config_cp_backend": "torch",
            "parallelism_config_cp_comm_strategy": "allgather",
        },
    }
    lines = [*heading(plan, f"accelerate {VERSION}", limits), *(_line(k, v) for k, v in top.items())]
    for name, fields in groups.items():
        lines += [f"{name}:", *(f"  {_line(key, value)}" for key, value in fields.items())]
    return Emission("\n".join(lines) + "\n", limits, "accelerate launch --config_file {path} train.py")


def _line(key: str, value: object) -> str:
    return f"{key}: {json.dumps(value)}"  # JSON scalars are YAML


def _limits(layout: Layout, fed: LlmWorkload) -> tuple[str, ...]:
    said = [
        f"batches are the script's: {layout.micro_batch} sequences of {fed.sequence} tokens a device and "
        f"Accelerator(gradient_accumulation_steps={layout.micro_batches})"
    ]
    if layout.recompute == "elementwise":
        said.append(
            "activation checkpointing is whole layers or nothing; nothing is recomputed, so activations are larger "
            "than planned"
        )
    if layout.zero == 1:
        said.append("FSDP2 shards gradients too (the plan is ZeRO-1); memory is less than planned")
    if layout.tensor > 1:
        said.append(
            "norms are not split over tensor ranks unless the model's own tensor-parallel plan does so"
        )
    return tuple(said)
