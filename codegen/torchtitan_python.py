"""A decoder's training plan as a configuration function of torchtitan 0.3 (Python).

Releases from 0.3.0 on have no configuration file: ``--module`` names a Python module and ``--config`` a function of
it that returns a ``Trainer.Config``. The function written here starts from torchtitan's own for the model and sets
the fields of 0.3.0 (PyPI; ``torchtitan/config/configs.py``) that a plan decides.
"""

from __future__ import annotations

from codegen.emission import Emission, heading, trained
from codegen.torchtitan import flavor_of, part_names, titan_limits, titan_schedule, training_values
from ir.parallelism import Layout, Parallelism
from ir.plan import Plan

VERSION = "0.3.0"

# the function of torchtitan 0.3.0, models/llama3/config_registry.py, that a flavor starts from
_BASES = {"8B": "llama3_8b", "70B": "llama3_70b", "405B": "llama3_405b", "": "llama3_debugmodel"}
_POLICIES = {"full": "FullAC", "elementwise": "SelectiveAC"}


def emit_torchtitan_python(plan: Plan) -> Emission:
    """The Python file of a training plan; its function is ``plan``.

    Raises:
        InputError: no training plan of a decoder, or a type that torchtitan cannot compute in.
    """
    made, fed = trained(plan, "torchtitan")
    layout, flavor = made.layout, flavor_of(made.model)
    schedule, limits = titan_schedule(made)
    limits += titan_limits(made, fed, flavor)
    training = training_values(layout, fed)
    if layout.pipeline > 1:
        training["disable_cuda_graphs"] = True  # 0.3.0 refuses a pipeline under CUDA graphs
    policy = _POLICIES.get(layout.recompute)
    base = _BASES[flavor]
    lines = heading(plan, f"torchtitan {VERSION}", limits)
    lines += ["from torchtitan.config import ParallelismConfig, TrainingConfig"]
    if policy is not None:
        lines.append(f"from torchtitan.distributed.activation_checkpoint import {policy}")
    lines += [
        "from torchtitan.models.llama3 import model_registry",
        f"from torchtitan.models.llama3.config_registry import {base}",
        "from torchtitan.trainer import Trainer",
        "",
        "",
        "def plan() -> Trainer.Config:",
        f"    config = {base}()",
    ]
    if flavor:
        lines.append(
            f'    config.model_spec = model_registry("{flavor}")  # without converters to other formats'
        )
    lines += _call("training", "TrainingConfig", training)
    lines += _call("parallelism", "ParallelismConfig", _parallelism(made, schedule))
    lines.append(f"    config.activation_checkpoint = {f'{policy}.Config()' if policy else None}")
    lines.append("    return config")
    command = f"torchrun --nnodes {plan.topology.hosts} --nproc-per-node {plan.topology.host_size}"
    module = '--module "$(basename {path} .py)" --config plan'
    return Emission(
        "\n".join(lines) + "\n",
        limits,
        f'PYTHONPATH="$(dirname {{path}})" {command} -m torchtitan.train {module}',
    )


def _parallelism(made: Parallelism, schedule: str) -> dict[str, object]:
    layout: Layout = made.layout
    values: dict[str, object] = {
        "data_parallel_replicate_degree": layout.replicate,
        "data_parallel_shard_degree": layout.data // layout.replicate,
        "fsdp_reshard_after_forward": "always" if layout.zero == 3 else "never",
        "tensor_parallel_degree": layout.tensor,
        "enable_sequence_parallel": True,
        "context_parallel_degree": layout.context,
        "context_parallel_load_balancer": "headtail",  # 2N chunks
        "pipeline_parallel_degree": layout.pipeline,
    }
    if layout.pipeline > 1:
        values |= {
            "pipeline_parallel_schedule": schedule,
            "pipeline_parallel_microbatch_size": layout.micro_batch,
            "module_fqns_per_model_part": part_names(made, "lm_head"),
        }
    return values


def _call(field: str, config: str, values: dict[str, object]) -> list[str]:
    """``config.field = Config(...)``; repr of strings, integers, booleans and lists of strings is Python."""
    return [
        f"    config.{field} = {config}(",
        *(f"        {name}={value!r}," for name, value in values.items()),
        "    )",
    ]
